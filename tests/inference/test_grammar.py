"""Answers fit their grammar, and nothing else changes: not the draws beside them, not what is reported of them."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
import regex
import torch
from support.server import TEXT

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, Sampling, refine, schedules
from lrt.data.tokenizer import Tokenizer
from lrt.inference.engine import Engine
from lrt.inference.grammar import KINDS, LIMITS, LONGEST, Grammar, GrammarCompiler
from lrt.inference.job import log_probability
from lrt.inference.request import Completion, Request
from lrt.inference.sampling import Steering, draw_rows

WORDS = Tokenizer.train([TEXT] * 3, 300)
COMPILER = GrammarCompiler(WORDS)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colour": {"enum": ["red", "grün", 7, None]},
        "marks": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "colour"],
    "additionalProperties": False,
}
CALL = r"\+49 [0-9]{2,3}-[1-9][0-9]{3}( ext\. [0-9])?"
STOP = frozenset({WORDS.bos})


@pytest.fixture(scope="module")
def model() -> LatentRecurrentTransformer:
    torch.manual_seed(3)
    fields: dict[str, Any] = {"depth": 2, "width": 16, "heads": 2, "context": 256, "memory": MemoryConfig()}
    network = LatentRecurrentTransformer(ModelConfig(vocab_size=WORDS.vocab_size + 5, **fields)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return network


def asked(grammar: Grammar | None, **fields: Any) -> Request:
    return Request(**({"tokens": (WORDS.bos, 70, 71), "max_new_tokens": 200, "stop": STOP} | fields), grammar=grammar)


def text_of(completion: Completion) -> str:
    return WORDS.decode(completion.tokens)


def test_every_json_answer_fits_its_schema(model: LatentRecurrentTransformer):
    grammar = COMPILER.compile("json", PERSON)
    (done,) = Engine(model, rows=8).complete([asked(grammar, samples=40)])
    assert {completion.finish for completion in done} == {"stop"}
    assert len({text_of(completion) for completion in done}) == 40
    for completion in done:
        jsonschema.validate(json.loads(text_of(completion)), PERSON)


@pytest.mark.parametrize(
    ("kind", "source", "pattern"),
    [
        ("regex", CALL, CALL),
        ("regex", r"^\w{3}/\w\d$", r"[0-9A-Za-z_]{3}/[0-9A-Za-z_][0-9]"),
        ("choice", ["a\nb", 'ü"x', "  c", "a|b\\"], r'a\nb|ü"x|  c|a\|b\\'),
        ("grammar", 'start: "(" start ")" | "x"', r"\(*x\)*"),
        ("grammar", 'root ::= "yes" | "no"', "yes|no"),
        ("json", '{"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 4}', r"\[1(, ?1){1,3}\]"),
    ],
)
def test_every_answer_matches(model: LatentRecurrentTransformer, kind: str, source: Any, pattern: str):
    grammar = COMPILER.compile(kind, source)
    (done,) = Engine(model, rows=4).complete([asked(grammar, samples=12)])
    for completion in done:
        assert re.fullmatch(pattern, text_of(completion)), text_of(completion)
        assert completion.finish == "stop"


PAIRS = "(?:[a-e ]{1,3}[0-9]|[x-z]{2}){3}"
"""At no place one text only may follow: of that the library would take the tokenizer's own tokens."""


def fits_so_far(tokens: list[int], pattern: str) -> bool:
    """Whether some match begins with what the tokens spell, by another library."""
    return regex.fullmatch(pattern.encode(), b"".join(map(WORDS.spelling, tokens)), partial=True) is not None


def test_a_greedy_answer_is_that_of_a_loop_that_tries_every_token(model: LatentRecurrentTransformer):
    """Without engine, cache or llguidance: of the tokens that fit, the likeliest."""
    grammar = COMPILER.compile("regex", PAIRS)
    for first in (70, 80, 90, 100):
        tokens, new = [WORDS.bos, first], []
        while not re.fullmatch(PAIRS, WORDS.decode(new)):
            with torch.no_grad():
                hidden = refine(model, torch.tensor([tokens + new]), schedules.sequential()).hidden[0, -1]
            order = model.logits(hidden).argsort(descending=True).tolist()
            new.append(next(t for t in order if WORDS.spelling(t) and fits_so_far([*new, t], PAIRS)))
        greedy = asked(grammar, tokens=tuple(tokens), sampling=Sampling(temperature=0))
        ((done,),) = Engine(model, rows=1).complete([greedy])
        assert list(done.tokens) == new
        assert done.finish == "stop"


def test_a_text_that_must_follow_is_written_in_its_own_tokens(model: LatentRecurrentTransformer):
    ((done,),) = Engine(model, rows=1).complete([asked(COMPILER.compile("choice", ["hello there, naïve café"]))])
    assert list(done.tokens) == WORDS.encode("hello there, naïve café")


def test_drawn_answers_are_drawn_from_what_fits(model: LatentRecurrentTransformer):
    grammar, sampling = COMPILER.compile("regex", "[a-e]{6}"), Sampling(1.3, top_k=4, top_p=0.9)
    letters = {i for i in range(WORDS.vocab_size) if re.fullmatch(b"[a-e]+", WORDS.spelling(i))}
    tokens, new, text = [WORDS.bos, 70, 71], [], ""
    while len(text) < 6:
        with torch.no_grad():
            logits = model.logits(refine(model, torch.tensor([tokens + new]), schedules.sequential()).hidden[:, -1])
        left = [i for i in letters if len(WORDS.spelling(i)) <= 6 - len(text)]
        masked = torch.full_like(logits, -torch.inf)
        masked[:, left] = logits[:, left]
        new.append(int(draw_rows(masked, [sampling], [(9, len(tokens + new))])))
        text = WORDS.decode(new)
    ((done,),) = Engine(model, rows=1).complete([asked(grammar, sampling=sampling, seed=9)])
    assert list(done.tokens) == new


def test_neighbours_draw_what_they_draw_alone(model: LatentRecurrentTransformer):
    grammar = COMPILER.compile("json", PERSON)
    plain = [asked(None, tokens=(WORDS.bos, i), seed=i, max_new_tokens=30, logprobs=2) for i in range(60, 66)]
    alone = [Engine(model, rows=1).complete([request])[0][0] for request in plain]
    mixed = [r for request in plain for r in (request, asked(grammar, seed=request.seed))]
    together = Engine(model, rows=5).complete(mixed)
    assert [samples[0].tokens for samples in together[::2]] == [completion.tokens for completion in alone]
    fitting = [samples[0].tokens for samples in together[1::2]]
    assert fitting == [Engine(model, rows=1).complete([r])[0][0].tokens for r in mixed[1::2]]


def test_log_probabilities_are_the_models_own(model: LatentRecurrentTransformer):
    request = asked(COMPILER.compile("regex", CALL), logprobs=3)
    ((done,),) = Engine(model, rows=1).complete([request])
    tokens = [*request.tokens, *done.tokens]
    with torch.no_grad():
        hidden = refine(model, torch.tensor([tokens]), schedules.sequential()).hidden[0]
    for i, logprob in enumerate(done.logprobs, len(request.tokens)):
        expected = log_probability(model.logits(hidden[i - 1]).detach(), tokens[i], 3)
        assert logprob.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert [token for token, _ in logprob.alternatives] == [token for token, _ in expected.alternatives]


def test_an_answer_may_end_where_the_grammar_lets_it_and_no_sooner(model: LatentRecurrentTransformer):
    bos = WORDS.bos
    end = Request((bos, 70), 20, stop=STOP, grammar=COMPILER.compile("regex", "abc(de)*"), samples=16)
    (done,) = Engine(model, rows=4).complete([end])
    for completion in done:
        assert re.fullmatch("abc(de)*" if completion.finish == "stop" else "abc(de)*d?", text_of(completion))
        assert (completion.tokens[-1] == bos) == (completion.finish == "stop")
    without = Request((bos, 70), 20, grammar=COMPILER.compile("regex", "abc(de)*"))  # nothing can end it
    assert Engine(model, rows=1).complete([without])[0][0].finish == "length"


def test_what_a_stop_sequence_or_the_length_ends_stays_ended(model: LatentRecurrentTransformer):
    grammar = COMPILER.compile("regex", "x{100}")
    (x,) = WORDS.encode("x")
    ((short,),) = Engine(model, rows=1).complete([asked(grammar, max_new_tokens=5)])
    assert (short.tokens, short.finish) == ((x,) * 5, "length")
    ((stopped,),) = Engine(model, rows=1).complete([asked(grammar, stop_sequences=((x, x, x),))])
    assert (stopped.tokens, stopped.finish) == ((x,) * 3, "stop")


def test_a_grammar_that_grows_too_large_ends_its_answer_alone(model: LatentRecurrentTransformer):
    engine = Engine(model, rows=2)
    large = asked(COMPILER.compile("regex", "(a{1000}){1000}"))
    (first,), (second,) = engine.complete([large, asked(COMPILER.compile("regex", CALL))])
    assert first.finish == "failed"
    assert re.fullmatch(CALL, text_of(second))
    assert engine.idle


AMBIGUOUS = 'start: s "."\ns: s s | "a" | "b" | s s s'
"""Of n letters there are exponentially many readings."""


def test_an_answer_whose_grammar_has_failed_is_never_whole(
    model: LatentRecurrentTransformer, monkeypatch: pytest.MonkeyPatch
):
    """All tokens may be drawn then; the likeliest is a stop token, or ends a stop sequence."""
    monkeypatch.setitem(LIMITS, "step_max_items", 300)
    wanted = Steering(bias=((WORDS.bos, 50.0), (WORDS.encode(".")[0], -50.0)))
    for fields in ({}, {"stop": frozenset(), "stop_sequences": ((WORDS.bos,),)}):
        request = asked(COMPILER.compile("grammar", AMBIGUOUS), steering=wanted, **fields)
        ((done,),) = Engine(model, rows=1).complete([request])
        assert (done.tokens[-1], done.finish) == (WORDS.bos, "failed")
        assert len(done.tokens) > 1


def test_a_small_grammar_of_many_readings_soon_fails():
    state, (a,) = COMPILER.compile("grammar", AMBIGUOUS).start(), WORDS.encode("a")
    letters = 0
    while not state.failed and letters < 300:
        state.allowed([], WORDS.vocab_size)
        state.push(a)
        letters += 1
    assert 5 < letters < 300


def test_a_grammar_has_so_much_time(model: LatentRecurrentTransformer, monkeypatch: pytest.MonkeyPatch):
    request = asked(COMPILER.compile("regex", "x{100}"))
    ((done,),) = Engine(model, rows=1).complete([request])
    assert (len(done.tokens), done.finish) == (100, "stop")
    monkeypatch.setattr("lrt.inference.grammar.SECONDS", 0.0)
    monkeypatch.setattr("lrt.inference.grammar.SECONDS_PER_TOKEN", 0.0)
    ((done,),) = Engine(model, rows=1).complete([request])
    assert (len(done.tokens), done.finish) == (1, "failed")


def test_an_empty_answer_is_whole_without_a_stop_token(model: LatentRecurrentTransformer):
    for fields in ({}, {"stop": frozenset()}):
        ((done,),) = Engine(model, rows=1).complete([asked(COMPILER.compile("regex", ""), **fields)])
        assert (text_of(done), done.finish) == ("", "stop")


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("regex", "(", "the regex cannot be followed: .*invalid regex"),
        ("regex", "(?=a)b", "the regex cannot be followed: .*invalid regex"),
        ("json", "{", "the json cannot be followed: EOF while parsing"),
        ("json", {"type": "nonsense"}, "Invalid type: nonsense"),
        ("json", {"$ref": "http://localhost/x"}, "does not fetch resources"),
        ("json", {"not": {}}, "Unimplemented keys"),
        ("grammar", "start: x", 'unknown name: "x"'),
        ("regex", "a" * (LONGEST + 1), "has 65,537 characters, 65,536 are taken; shorten it"),
        ("yaml", "", f"unknown kind of grammar 'yaml'; choose one of {', '.join(KINDS)}"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(kind: str, source: Any, message: str):
    with pytest.raises(ValueError, match=message):
        COMPILER.compile(kind, source)


def test_a_grammar_belongs_to_its_vocabulary(model: LatentRecurrentTransformer):
    small = ModelConfig(depth=2, width=16, heads=2, vocab_size=260, context=64)
    with pytest.raises(ValueError, match="the grammar is over 300 tokens, the vocabulary has 260; compile it"):
        asked(COMPILER.compile("regex", "a"), max_new_tokens=5).check(small, 64)
