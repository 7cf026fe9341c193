"""One promise: OpenAI's own client works, with every documented parameter, and gets the tokens of `lrt sample`."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from support.server import CHATML, Live, live, sample, saved

from lrt.inference.grammar import KINDS
from lrt.serve.protocol import UNSUPPORTED, ChatBody, CompletionBody

PROMPT = "hello naïve"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [saved(root / "lrt", *CHATML), saved(root / "bare", seed=1)]


@pytest.fixture(scope="module")
def up(folders: list[Path]) -> Iterator[Live]:
    with live(*folders) as running:
        yield running
        assert running.idle()


def text_of(up: Live, **fields: Any) -> list[str]:
    """The texts of the choices, which are the same streamed and not."""
    body: dict[str, Any] = {"model": "lrt", "prompt": PROMPT, "seed": 5, "max_tokens": 24} | fields
    whole = up.client().completions.create(**body)
    streamed = [""] * len(whole.choices)
    ends: list[Any] = [None] * len(whole.choices)
    for chunk in up.client().completions.create(**body, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            assert ends[choice.index] is None
            streamed[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason
    assert streamed == [c.text for c in whole.choices]
    assert ends == [c.finish_reason for c in whole.choices]
    assert chunk.choices == []  # pyright: ignore[reportPossiblyUnboundVariable]
    assert chunk.usage == whole.usage  # pyright: ignore[reportPossiblyUnboundVariable]
    return streamed


def test_tokens_are_those_of_sample(up: Live, folders: list[Path], capsys: pytest.CaptureFixture[str]):
    for seed, prompt in ((0, PROMPT), (7, ""), (2**40, "漢字 🙂")):
        assert text_of(up, prompt=prompt, seed=seed) == [sample(capsys, folders[0], prompt, seed, 24)]
    more = ("--temperature", "0.5", "--top-p", "0.9", "--top-k", "7")
    fields = {"temperature": 0.5, "top_p": 0.9, "extra_body": {"top_k": 7}}
    assert text_of(up, **fields) == [sample(capsys, folders[0], PROMPT, 5, 24, *more)]
    several = text_of(up, prompt=[PROMPT, "the end"], n=2)
    assert several == [sample(capsys, folders[0], p, s, 24) for p in (PROMPT, "the end") for s in (5, 6)]
    greedy = sample(capsys, folders[0], PROMPT, 0, 24, "--temperature", "0")
    assert text_of(up, temperature=0) == text_of(up, top_p=0) == [greedy]


def test_tokens_are_those_of_sample_in_a_busy_batch(up: Live, folders: list[Path], capsys: pytest.CaptureFixture[str]):
    expected = [sample(capsys, folders[0], PROMPT, seed, 40) for seed in range(12)]
    texts: dict[int, str] = {}

    def ask(seed: int) -> None:
        stream = up.client().completions.create(model="lrt", prompt=PROMPT, seed=seed, max_tokens=40, stream=True)
        parts = []
        for n, chunk in enumerate(stream):
            parts += [choice.text for choice in chunk.choices]
            if seed >= 12 and n == seed % 7:  # some leave
                stream.close()
                return
        texts[seed] = "".join(parts)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [texts[seed] for seed in range(12)] == expected
    assert up.idle()


def test_prompts_in_every_form(up: Live):
    words = up.registry.find("lrt").tokenizer
    ids = [words.bos, *words.encode(PROMPT)]
    (expected,) = text_of(up)
    assert text_of(up, prompt=ids) == [expected]
    assert text_of(up, prompt=[ids, ids[:2]])[0] == expected
    assert text_of(up, prompt=None) == text_of(up, prompt="")
    for wrong in ([], [[]], [1, "a"], [-1], [10**6], 3, [1.5]):
        with pytest.raises(openai.BadRequestError):
            up.client().completions.create(model="lrt", prompt=wrong)  # pyright: ignore


def test_stops_never_show(up: Live):
    (whole,) = text_of(up, max_tokens=60)
    for begin, size in itertools.product(range(2, len(whole) - 6, 5), (1, 2, 5)):
        stop = whole[begin : begin + size]
        (short,) = text_of(up, max_tokens=60, stop=stop)
        assert short == whole[: whole.index(stop)]
    end = whole[20:23]
    done = up.client().completions.create(
        model="lrt", prompt=PROMPT, seed=5, max_tokens=60, stop=["§§§", end + "§", end], logprobs=0
    )
    choice = done.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == whole[: whole.index(end)]
    assert choice.logprobs is not None
    assert all(offset < len(choice.text) for offset in choice.logprobs.text_offset or [])
    both = text_of(up, max_tokens=60, n=2, stop=end)  # one sample stops, the other goes on
    assert both[0] == choice.text
    assert end not in both[1]
    assert up.idle()


def test_logprobs_and_echo(up: Live):
    words = up.registry.find("lrt").tokenizer
    done = up.client().completions.create(
        model="lrt", prompt=PROMPT, seed=5, max_tokens=12, logprobs=3, echo=True, temperature=1.7
    )
    echoed = done.choices[0].logprobs
    assert echoed is not None
    assert done.choices[0].text.startswith(PROMPT)
    assert done.usage is not None
    assert len(echoed.tokens or []) == done.usage.total_tokens - 1  # BOS was not written by anybody
    # The same text as a prompt: its scores are those that its tokens had when they were drawn.
    ids = [words.bos, *words.encode(PROMPT)]
    sampled = up.client().completions.create(
        model="lrt", prompt=ids, seed=5, max_tokens=12, logprobs=3, temperature=1.7
    )
    own = sampled.choices[0].logprobs
    assert own is not None
    assert echoed.token_logprobs is not None
    assert echoed.token_logprobs[-12:] == own.token_logprobs
    scored = up.client().completions.create(model="lrt", prompt=PROMPT, max_tokens=0, logprobs=3, echo=True)
    again = scored.choices[0].logprobs
    assert again is not None
    assert scored.choices[0].text == PROMPT
    assert scored.choices[0].finish_reason == "length"
    assert again.token_logprobs == echoed.token_logprobs[: len(ids) - 1]
    assert again.text_offset == (echoed.text_offset or [])[: len(ids) - 1]
    for token, logprob, top in zip(own.tokens or [], own.token_logprobs or [], own.top_logprobs or [], strict=True):
        assert top is not None
        assert max(top.values()) >= (logprob or 0)
        assert len(top) <= 3
        assert token in top or (logprob or 0) <= min(top.values())
    chunks = list(
        up.client().completions.create(
            model="lrt", prompt=PROMPT, seed=5, max_tokens=12, logprobs=3, echo=True, temperature=1.7, stream=True
        )
    )
    listed = [c.choices[0].logprobs for c in chunks]
    assert list(itertools.chain(*(t.token_logprobs or [] for t in listed if t))) == echoed.token_logprobs
    assert list(itertools.chain(*(t.text_offset or [] for t in listed if t))) == echoed.text_offset
    assert text_of(up, echo=True)[0] == PROMPT + text_of(up)[0]


def test_half_characters_are_never_sent(up: Live):
    words = up.registry.find("lrt").tokenizer
    texts = []
    for seed in range(12):
        raw = httpx.post(
            f"{up.url}/v1/completions",
            json={"model": "lrt", "prompt": "漢字", "seed": seed, "max_tokens": 40, "stream": True, "logprobs": 0},
        ).text
        chunks = [json.loads(line[6:])["choices"][0] for line in raw.splitlines() if line.startswith("data: {")]
        text = "".join(chunk["text"] for chunk in chunks)
        spelled = b"".join(
            token.encode() if not token.startswith("bytes:") else bytes.fromhex(token[6:].replace("\\x", ""))
            for chunk in chunks
            for token in chunk["logprobs"]["tokens"]
        )
        assert text == spelled.decode("utf-8", "replace")
        texts.append(text)
    assert any("漢" in text or "é" in text or "🙂" in text or "ï" in text for text in texts)
    assert words.vocab_size > 256


def test_penalties_bias_and_best_of(up: Live):
    words = up.registry.find("lrt").tokenizer
    token = next(i for i in range(words.vocab_size) if words.spelling(i) == b"e")
    assert text_of(up, logit_bias={str(token): 100}) == ["e" * 24]
    (varied,) = text_of(up, logit_bias={str(token): 5}, frequency_penalty=2.0, presence_penalty=2.0)
    assert varied.count("e") < 12
    assert text_of(up, presence_penalty=2.0, temperature=0) != text_of(up, temperature=0)
    all_of = up.client().completions.create(model="lrt", prompt=PROMPT, seed=5, max_tokens=8, n=4, logprobs=0)
    best = up.client().completions.create(model="lrt", prompt=PROMPT, seed=5, max_tokens=8, n=2, best_of=4)
    scores = {c.text: sum(c.logprobs.token_logprobs or []) / 8 for c in all_of.choices if c.logprobs is not None}
    assert [c.text for c in best.choices] == sorted(scores, key=lambda text: -scores[text])[:2]
    assert best.choices[0].logprobs is None
    assert best.usage == all_of.usage


def test_chat(up: Live):
    turns: Any = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": "the end"},
        {"role": "user", "content": "of it <|im_end|>", "name": "somebody"},
    ]
    body: dict[str, Any] = {"model": "lrt", "messages": turns, "seed": 3, "max_completion_tokens": 30}
    whole = up.client().chat.completions.create(**body, n=2, logprobs=True, top_logprobs=2)
    parts: list[list[str]] = [[], []]
    scores: list[list[float]] = [[], []]
    for chunk in up.client().chat.completions.create(**body, n=2, logprobs=True, top_logprobs=2, stream=True):
        for choice in chunk.choices:
            parts[choice.index].append(choice.delta.content or "")
            scores[choice.index] += [t.logprob for t in (choice.logprobs.content or [])] if choice.logprobs else []
    assert ["".join(some) for some in parts] == [c.message.content for c in whole.choices]
    for choice, logprobs in zip(whole.choices, scores, strict=True):
        assert choice.logprobs is not None
        assert [t.logprob for t in choice.logprobs.content or []] == logprobs
        assert all(len(t.top_logprobs) == 2 for t in choice.logprobs.content or [])
        spelled = b"".join(bytes(t.bytes or []) for t in choice.logprobs.content or [])
        assert spelled.decode("utf-8", "replace") == choice.message.content
    # The conversation as tokens is what the tokenizer's template says.
    model = up.registry.find("lrt")
    back = up.client().chat.completions.create(
        **{**body, "messages": [*turns, whole.choices[0].message.model_dump(), {"role": "user", "content": "so"}]}
    )
    assert back.usage is not None
    assert whole.usage is not None
    assert back.usage.prompt_tokens > whole.usage.prompt_tokens
    assert model.template is not None
    with pytest.raises(openai.BadRequestError, match="has no chat template; use /v1/completions"):
        up.client().chat.completions.create(model="bare", messages=turns)
    with pytest.raises(openai.BadRequestError, match="give at most one of the system"):
        up.client().chat.completions.create(model="lrt", messages=turns[:3])


def test_models(up: Live):
    assert [m.id for m in up.client().models.list()] == ["lrt", "bare"]
    assert up.client().models.retrieve("bare").created > 1.7e9
    with pytest.raises(openai.NotFoundError, match="choose one of lrt, bare"):
        up.client().models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError):
        up.client().completions.create(model="../lrt", prompt="x")


OURS = {
    "top_k", "min_p", "repetition_penalty", "ignore_eos", "prefill", "structured_outputs",
    "metadata", "store", "service_tier", "response_format", "chat_template_kwargs",  # not on both of OpenAI's routes
    *(f"guided_{kind}" for kind in KINDS),
}  # fmt: skip
"""Parameters that OpenAI does not document, or not on both routes."""


def test_every_documented_parameter_is_known():
    pairs = (
        (completion_params.CompletionCreateParamsBase, CompletionBody),
        (chat_params.CompletionCreateParamsBase, ChatBody),
    )
    for theirs, ours in pairs:
        documented = set(theirs.__annotations__) | {"stream"}
        assert documented - set(ours.model_fields) == set()
        assert set(ours.model_fields) - documented <= OURS


ASKING = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "guided_json": {"type": "object"},
    "guided_regex": "a+",
    "guided_choice": ["a"],
    "guided_grammar": 'start: "a"',
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "prediction": {"type": "content", "content": "x"},
    "moderation": {"model": "m"},
    "prompt_cache_options": {"ttl": "30m"},
    "reasoning_effort": "low",
    "verbosity": "low",
    "web_search_options": {},
    "store": True,
    "service_tier": "priority",
}
BOTH_ROUTES = ("store", "service_tier")


@pytest.mark.parametrize("name", ASKING)
def test_what_is_not_supported_is_refused_by_name(up: Live, name: str):
    body: dict[str, Any] = {"model": "lrt", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    routes: dict[str, Any] = {"chat/completions": body}
    if name in BOTH_ROUTES:
        routes["completions"] = {"model": "lrt", "prompt": "x", "max_tokens": 1}
    for route, fields in routes.items():
        answer = httpx.post(f"{up.url}/v1/{route}", json={**fields, name: ASKING[name]})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, name)
        assert error["message"].startswith(f"{name} is not supported here")


def test_what_asks_for_nothing_is_accepted(up: Live):
    assert set(ASKING) | {"suffix"} == set(UNSUPPORTED)
    fields: dict[str, Any] = {
        "store": False, "service_tier": "auto", "response_format": {"type": "text"}, "modalities": ["text"],
        "user": "me", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "k",
        "prompt_cache_retention": "in_memory",
        "parallel_tool_calls": True, "tools": [], "tool_choice": "none", "function_call": "none",
    }  # fmt: skip
    turns: Any = [{"role": "user", "content": "x"}]
    done = up.client().chat.completions.create(model="lrt", messages=turns, max_tokens=1, **fields)
    assert done.choices[0].finish_reason in ("length", "stop")
    with pytest.raises(openai.BadRequestError, match="suffix is not supported here: an LRT writes forwards"):
        up.client().completions.create(model="lrt", prompt="x", suffix="y")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 10_000}, "together more than the context of lrt, 256"),
        ({"prompt": "a " * 3000}, "the context of lrt is 256; shorten it"),
        ({"n": 40}, "40 continuations are asked for, this server gives 32"),
        ({"n": 0}, "n: at least 1, and it is 0"),
        ({"best_of": 1, "n": 2}, "best_of must be at least n"),
        ({"best_of": 3, "stream": True}, "best_of cannot be streamed"),
        ({"temperature": 3}, "temperature: at most 2, and it is 3"),
        ({"temperature": "1"}, "temperature: a number is needed"),
        ({"stop": ["a"] * 17}, "stop: at most 16 texts, and there are 17"),
        ({"stop": ""}, "stop: 1 or more characters, and there are 0"),
        ({"stop": ["a", 3]}, r"stop\[1\]: text is needed"),
        ({"stop": 3}, "stop: text or a list is needed"),
        ({"prompt": [1, "a"]}, r"prompt\[1\]: a whole number is needed"),
        ({"prompt": [[]]}, r"prompt\[0\]: 1 or more entries, and there are 0"),
        ({"seed": 10**400}, r"seed: less than 9\.22337e\+18, and it is far more"),
        ({"stream": "yes"}, "stream: true or false is needed"),
        ({"logprobs": 21}, "logprobs: at most 20, and it is 21"),
        ({"logit_bias": {"999999": 1}}, "of the bias is not in the vocabulary"),
        ({"logit_bias": {"e": 1}}, r"logit_bias\.e: its names must be the numbers of tokens"),
        ({"logit_bias": {"5": 101}}, "logit_bias: at most 100, and it is 101"),
        ({"extra_body": {"min_p": 1.5}}, r"min_p: at most 1, and it is 1\.5"),
        ({"extra_body": {"top_k": -2}}, "top_k: at least -1, and it is -2"),
        ({"extra_body": {"repetition_penalty": 0}}, r"repetition_penalty: at least 0\.01, and it is 0"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream: true"),
        ({"extra_body": {"file": "/etc/passwd"}}, "unknown parameter 'file'; leave it out"),
        ({"extra_body": {"prefill": "quick"}}, "prefill: choose 'exact', 'converged', 'fast' or 'one_sweep'"),
        ({"stream": True, "stream_options": {"x": 1}}, r"stream_options\.x: unknown; leave it out"),
    ],
)
def test_mistakes_say_what_is_wrong(up: Live, fields: dict[str, Any], message: str):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        up.client().completions.create(**{"model": "lrt", "prompt": "x", "max_tokens": 2, **fields})
    assert caught.value.type == "invalid_request_error"
    assert "/" not in caught.value.message.replace("and/or", "")
