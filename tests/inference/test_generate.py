"""Generation is the recurrence itself: its tokens, its distribution, its limits, and the scores of what it would say.

B batch, T positions, V vocabulary.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from support.generation import CONFIGS, CONTEXT, V, configuration, every_model
from support.models import TOLERANCE, VISIBLE, assert_same, documents_of, random_model
from torch import Tensor

from lrt import MemoryConfig, ModelConfig, Sampling, generate, refine, schedules, score
from lrt.inference.decoders import FusedDecoder
from lrt.inference.engine import Engine
from lrt.inference.request import Request
from lrt.inference.session import Session
from lrt.model.transformer import LatentRecurrentTransformer

GREEDY = Sampling(temperature=0)


def prompt(batch: int = 2, length: int = 4, seed: int = 1) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


def drawn(model: Any, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """All generated tokens (B, n)."""
    return torch.stack(list(generate(model, tokens, *args, **kwargs)), dim=1)


def from_scratch(model: Any, tokens: Tensor) -> Tensor:
    """Logits (B, V) after `tokens`, by the exact schedule over all of them."""
    with torch.no_grad():
        return model.logits(refine(model, tokens, schedules.sequential()).hidden[:, -1])


def long_copy(model: Any, context: int) -> Any:
    """The same weights with a longer context (and the same windows)."""
    config = model.config
    copy = LatentRecurrentTransformer(replace(config, context=context, window=config.sliding_window)).double().eval()
    copy.load_state_dict(model.state_dict())
    return copy


def assert_greedy(model: Any, tokens: Tensor, generated: Tensor, oracle: Any = None) -> None:
    """Each generated token is the argmax of logits recomputed from scratch."""
    text = tokens
    for following in generated.T:
        logits = from_scratch(oracle or model, text)
        assert torch.equal(following, logits.argmax(-1))
        text = torch.cat([text, following.unsqueeze(1)], dim=1)


# What is generated
@every_model
@pytest.mark.parametrize("length", [1, 5])
def test_greedy_generation_is_the_argmax_recomputed_from_scratch(config: ModelConfig, length: int):
    model, tokens = random_model(config), prompt(length=length)
    generated = drawn(model, tokens, 10, GREEDY)
    assert generated.shape == (2, 10)
    assert_greedy(model, tokens, generated)


@dataclass(frozen=True)
class Recording(Sampling):
    """Draws as it should, and keeps the logits."""

    seen: list[Tensor] = field(default_factory=list, compare=False)

    def pick(self, logits: Tensor, uniform: Tensor) -> Tensor:
        self.seen.append(logits)
        return super().pick(logits, uniform)


@every_model
def test_the_logits_of_every_step_are_those_recomputed_from_scratch(config: ModelConfig):
    model, text, sampling = random_model(config), prompt(), Recording(temperature=5.0)
    generated = drawn(model, text, 10, sampling)
    assert len(set(generated.flatten().tolist())) > 8  # a text with some variety
    for logits, following in zip(sampling.seen, generated.T, strict=True):
        assert_same(logits, from_scratch(model, text))
        text = torch.cat([text, following.unsqueeze(1)], dim=1)


def test_the_recurrence_decides_tokens():
    # Otherwise the tests above would hold for a generator that forgets the memory.
    model, tokens = random_model(CONFIGS["both"]), prompt(length=CONTEXT)
    choices = [
        model.logits(refine(model, tokens, schedule).hidden).argmax(-1)
        for schedule in (schedules.plain(), schedules.sequential())
    ]
    assert float((choices[0] != choices[1]).double().mean()) > 0.2


def test_rows_of_a_batch_are_independent():
    model, tokens = random_model(CONFIGS["both"]), prompt(batch=3)
    together = drawn(model, tokens, 8, GREEDY)
    assert torch.equal(together, torch.cat([drawn(model, row.unsqueeze(0), 8, GREEDY) for row in tokens]))
    assert len({tuple(row.tolist()) for row in together}) == 3


def test_without_a_limit_it_fills_the_context():
    model = random_model(CONFIGS["both"])
    for length in (1, 4, CONTEXT):
        # The last token drawn is never fed back, so it may stand behind the context.
        tokens = prompt(length=length)
        generated = drawn(model, tokens, sampling=GREEDY)
        assert generated.shape == (2, CONTEXT + 1 - length)
        assert torch.equal(generated, drawn(model, tokens, CONTEXT + 1 - length, GREEDY))


@pytest.mark.parametrize("delay", [1, 5])
def test_a_sliding_model_generates_past_its_context(delay: int):
    model = random_model(configuration(window_pattern="S", window=3, context=8, memory=MemoryConfig(delay=delay)))
    tokens, oracle = prompt(length=5), long_copy(model, 64)
    generated = drawn(model, tokens, 25, GREEDY)
    assert_greedy(model, tokens, generated, oracle)
    endless = generate(model, tokens, sampling=GREEDY)
    assert torch.equal(torch.stack(list(itertools.islice(endless, 25)), dim=1), generated)
    # A prompt longer than the context is no limit either.
    long = prompt(length=20)
    assert_greedy(model, long, drawn(model, long, 6, GREEDY), oracle)


def test_a_sliding_model_keeps_a_window_only(monkeypatch: pytest.MonkeyPatch):
    model, slots = random_model(CONFIGS["sliding"]), []
    whole = LatentRecurrentTransformer.empty_state

    def counted(self: Any, batch: int, count: int, *rest: Any) -> Any:
        slots.append(count)
        return whole(self, batch, count, *rest)

    monkeypatch.setattr(LatentRecurrentTransformer, "empty_state", counted)
    drawn(model, prompt(), 200, GREEDY)
    next(generate(model, prompt()))
    assert slots == [model.config.lookback + 1] * 2


# Drawing
@every_model
def test_generate_a_session_and_the_engine_draw_the_same_tokens(config: ModelConfig):
    """Row i with seed + i, which is also sample i of a request: a draw is a function of (seed, position)."""
    model, text, seed = random_model(config), prompt(batch=1), 7
    sampling = Sampling(temperature=3.0, top_p=0.95)
    rows = drawn(model, text.expand(3, -1), 8, sampling, seed=seed).tolist()
    assert len(set(map(tuple, rows))) == 3
    start = tuple(text[0].tolist())
    for i, row in enumerate(rows):
        session = Session.start(model, start, "exact", seed + i).generate(8, sampling)
        assert list(session.tokens[len(start) :]) == row
    (samples,) = Engine(model, rows=2, slots=CONTEXT).complete([Request(start, 8, sampling, seed, samples=3)])
    assert [list(sample.tokens) for sample in samples] == rows


def test_equal_seeds_give_equal_tokens_and_others_do_not():
    model, tokens = random_model(CONFIGS["both"]), prompt()
    sampling = Sampling(temperature=3.0)
    first = drawn(model, tokens, 10, sampling, seed=4)
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(first, drawn(model, tokens, 10, sampling, seed=4))
    assert not torch.equal(first, drawn(model, tokens, 10, sampling, seed=5))
    before = torch.random.get_rng_state()
    drawn(model, tokens, 3, sampling)
    assert torch.equal(before, torch.random.get_rng_state())


def test_tokens_are_drawn_from_the_distribution():
    model, n = random_model(CONFIGS["both"]), 4000
    sampling = Sampling(temperature=2.0, top_k=6)
    tokens = prompt(batch=1).expand(n, -1)
    counts = torch.bincount(drawn(model, tokens, 1, sampling, seed=0)[:, 0], minlength=V)
    expected = sampling.probabilities(from_scratch(model, tokens[:1]))[0].double()
    spread = (n * expected * (1 - expected)).sqrt()
    assert bool(((counts - n * expected).abs() <= 5 * spread).all())
    assert int((counts > 0).sum()) == 6


P = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
"""Two distributions, the second all ties."""
NO = 0.0


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), P),
        (Sampling(top_k=4), P),
        (Sampling(top_k=9), P),  # more than there are
        (Sampling(top_k=2), [[NO, 4 / 7, NO, 3 / 7], [0.25] * 4]),  # ties of the last are all kept
        (Sampling(top_k=1), [[NO, 1, NO, NO], [0.25] * 4]),
        (Sampling(top_p=1.0), P),
        (Sampling(top_p=0.95), [[0.1, 0.4, 0.2, 0.3], [0.25] * 4]),
        (Sampling(top_p=0.75), [[NO, 4 / 9, 2 / 9, 3 / 9], [1 / 3, 1 / 3, 1 / 3, NO]]),  # ties in order
        (Sampling(top_p=0.65), [[NO, 4 / 7, NO, 3 / 7], [1 / 3, 1 / 3, 1 / 3, NO]]),
        (Sampling(top_p=0.3), [[NO, 1, NO, NO], [0.5, 0.5, NO, NO]]),
        (Sampling(top_p=1e-9), [[NO, 1, NO, NO], [1, NO, NO, NO]]),  # never nothing
        (Sampling(min_p=0.5), [[NO, 4 / 9, 2 / 9, 3 / 9], [0.25] * 4]),
        (Sampling(min_p=0.51), [[NO, 4 / 7, NO, 3 / 7], [0.25] * 4]),
        (Sampling(min_p=1), [[NO, 1, NO, NO], [0.25] * 4]),
        # p counts what min-p has left: 4/9, then 7/9.
        (Sampling(min_p=0.5, top_p=0.7), [[NO, 4 / 7, NO, 3 / 7], [1 / 3, 1 / 3, 1 / 3, NO]]),
        # After the temperature: 9/16 and 4/16 of the likeliest.
        (Sampling(temperature=0.5, min_p=0.3), [[NO, 16 / 25, NO, 9 / 25], [0.25] * 4]),
        # Squared and normalised.
        (Sampling(temperature=0.5), [[1 / 30, 16 / 30, 4 / 30, 9 / 30], [0.25] * 4]),
        (Sampling(temperature=0.5, top_k=3), [[NO, 16 / 29, 4 / 29, 9 / 29], [0.25] * 4]),
        # p counts what k has left: 4/9, then 7/9.
        (Sampling(top_k=3, top_p=0.7), [[NO, 4 / 7, NO, 3 / 7], [1 / 3, 1 / 3, 1 / 3, NO]]),
        # p counts after the temperature: 16/30.
        (Sampling(temperature=0.5, top_p=0.5), [[NO, 1, NO, NO], [0.5, 0.5, NO, NO]]),
    ],
    ids=str,
)
def test_probabilities_by_hand(sampling: Sampling, expected: Any):
    found = sampling.probabilities(P.log() + 3.0)  # logits are free up to a constant
    expected = torch.as_tensor(expected)
    assert torch.equal(found > 0, expected > 0)
    assert torch.allclose(found, expected, atol=1e-6)


def test_top_p_of_1_drops_nothing():
    # In float32 the running sum of a large vocabulary reaches 1 before its end.
    logits = 4 * torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Sampling(top_p=1.0).probabilities(logits) > 0, Sampling().probabilities(logits) > 0)


def test_top_p_keeps_the_fewest_that_reach_p():
    logits = 2 * torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    whole = logits.softmax(-1)
    for p in (0.2, 0.5, 0.9):
        for before, after in zip(whole, Sampling(top_p=p).probabilities(logits), strict=True):
            kept = after > 0
            assert before[kept].sum() >= p - 1e-6
            assert before[kept].sum() - before[kept].min() < p
            assert before[kept].min() >= before[~kept].max()
            assert torch.allclose(after[kept], before[kept] / before[kept].sum())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": -0.1}, r"temperature is -0\.1; it must be at least 0"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, r"top_p is 0\.0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, r"top_p is 1\.1; it must be above 0 and at most 1"),
    ],
)
def test_bad_sampling_is_an_error(fields: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=named):
        Sampling(**fields)


# Limits
@pytest.mark.parametrize(
    ("length", "wanted", "named"),
    [
        (0, 5, r"shape \(2, 0\).*at least one token"),
        (CONTEXT + 1, None, f"{CONTEXT + 1} tokens and 1 new ones exceed the context of {CONTEXT}"),
        (CONTEXT + 1, 1, f"{CONTEXT + 1} tokens and 1 new ones exceed"),
        (4, CONTEXT - 2, f"4 tokens and {CONTEXT - 2} new ones exceed the context of {CONTEXT}; shorten"),
        (4, -1, "max_new_tokens is -1; it must be at least 0"),
    ],
)
def test_what_cannot_be_generated_is_an_error_before_any_work(
    length: int, wanted: int | None, named: str, monkeypatch: pytest.MonkeyPatch
):
    model = random_model(CONFIGS["both"])
    monkeypatch.setattr(LatentRecurrentTransformer, "empty_state", None)
    with pytest.raises(ValueError, match=named):
        generate(model, prompt(length=length), wanted)  # the call, not the first token


@pytest.mark.parametrize("name", ["both", "sliding"])
@pytest.mark.parametrize("length", [1, 4, CONTEXT])
def test_no_new_tokens_are_none(name: str, length: int):
    assert list(generate(random_model(CONFIGS[name]), prompt(length=length), 0)) == []


def test_a_prompt_without_a_batch_is_an_error():
    with pytest.raises(ValueError, match=r"shape \(4,\); give \(batch, at least one token\)"):
        generate(random_model(CONFIGS["both"]), prompt()[0])


def test_generation_is_lazy(monkeypatch: pytest.MonkeyPatch):
    model, calls = random_model(CONFIGS["both"]), []
    step = FusedDecoder.__call__

    def counted(self: Any, tokens: Tensor, positions: Any) -> Any:
        calls.extend(set(positions))
        return step(self, tokens, positions)

    monkeypatch.setattr(FusedDecoder, "__call__", counted)
    tokens = generate(model, prompt(length=4), 10)
    assert calls == []  # nothing before it is asked for
    next(tokens)
    assert calls == [0, 1, 2, 3]  # the prompt
    next(tokens)
    assert calls == [0, 1, 2, 3, 4]
    assert len(list(tokens)) == 8
    assert calls == list(range(4 + 10 - 1))  # the last token is not fed back


# Scores
@every_model
@pytest.mark.parametrize("documents", [None, documents_of((1, 5, 3, 4), (3, 6, 2, 2))], ids=["whole", "packed"])
def test_score_is_the_sequential_schedule(config: ModelConfig, documents: Tensor | None):
    model, tokens = random_model(config), prompt(length=13)
    nats = score(model, tokens, documents)
    inputs = None if documents is None else documents[:, :-1]
    hidden = refine(model, tokens[:, :-1], schedules.sequential(), inputs).hidden
    expected = -model.logits(hidden).log_softmax(-1).gather(2, tokens[:, 1:].unsqueeze(2)).squeeze(2)
    assert nats.shape == (2, 12)
    assert_same(nats, expected)
    assert not nats.requires_grad


def test_packed_documents_score_as_they_do_alone():
    model, tokens, lengths = random_model(CONFIGS["both"]), prompt(batch=1, length=12), (5, 4, 3)
    packed, start = score(model, tokens, documents_of(lengths)), 0
    for length in lengths:
        alone = score(model, tokens[:, start : start + length])
        assert_same(packed[:, start : start + length - 1], alone)
        start += length
    assert float((packed - score(model, tokens)).abs().max()) > VISIBLE


@every_model
def test_score_is_independent_of_batch_size_and_row_order(config: ModelConfig):
    model, tokens = random_model(config), prompt(batch=5, length=11)
    together = score(model, tokens)
    for parts in ((1, 1, 1, 1, 1), (2, 3), (4, 1)):
        assert_same(torch.cat([score(model, part) for part in tokens.split(parts)]), together)
    order = torch.tensor([3, 0, 4, 2, 1])
    assert_same(score(model, tokens[order]), together[order])


def test_score_agrees_with_what_is_generated():
    model, tokens = random_model(CONFIGS["both"]), prompt()
    generated = drawn(model, tokens, 8, GREEDY)
    text = torch.cat([tokens, generated], dim=1)
    for t, nats in enumerate(score(model, text)[:, 3:].T):
        best = from_scratch(model, text[:, : 4 + t]).log_softmax(-1).amax(-1)
        assert float((nats + best).abs().max()) <= TOLERANCE[torch.float64] * float(best.abs().max())


def test_score_tells_of_its_progress_and_needs_two_tokens():
    told: list[float] = []
    score(random_model(CONFIGS["both"]), prompt(batch=3, length=6), advance=lambda amount, text="": told.append(amount))
    assert told == [3] * 5
    with pytest.raises(ValueError, match=r"shape \(2, 1\); scoring needs at least two per row"):
        score(random_model(CONFIGS["both"]), prompt(length=1))


def test_score_is_limited_by_the_context_unless_every_layer_slides():
    # The last token is a target only, so context + 1 tokens fit.
    assert score(random_model(CONFIGS["both"]), prompt(length=CONTEXT + 1)).shape == (2, CONTEXT)
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} positions exceed the context of {CONTEXT}"):
        score(random_model(CONFIGS["both"]), prompt(length=CONTEXT + 2))
    sliding, tokens = random_model(CONFIGS["sliding"]), prompt(length=3 * CONTEXT)
    assert_same(score(sliding, tokens), score(long_copy(sliding, 4 * CONTEXT), tokens))
