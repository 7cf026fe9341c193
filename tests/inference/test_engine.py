"""The engine's rows get the tokens that each gets alone: ragged, replaced, forked, cancelled, reused.

B rows, T positions, S slots.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import random
import weakref
from concurrent.futures import Executor, Future
from typing import Any

import pytest
import torch
from support.generation import CONFIGS, CONTEXT, V, every_model
from support.models import EACH_DELAY, NONE, PAIRWISE, over, random_model

from lrt import ModelConfig, Sampling, refine, schedules
from lrt.inference import radix_tree
from lrt.inference.certificate import Certificate
from lrt.inference.cost_model import Calibration, Plan
from lrt.inference.engine import Engine
from lrt.inference.exactness import asked_bound, error_bound
from lrt.inference.radix_tree import common_prefix
from lrt.inference.request import Completion, Request
from lrt.inference.row_pool import KeptRow, PrefixCache, copy_row, row_bytes, rows_that_fit
from lrt.inference.sampling import Steering, draw_rows, uniform

WARM = Sampling(temperature=3.0)


def requests(count: int, seed: int = 0, **fields: Any) -> list[Request]:
    """Prompts of many lengths, answers of many lengths, greedy and drawn."""
    r = random.Random(seed)
    return [
        Request(
            tuple(r.randrange(V) for _ in range(r.randint(1, 8))),
            max_new_tokens=r.randint(1, 8),
            sampling=r.choice([Sampling(temperature=0), WARM, Sampling(temperature=2.0, top_k=9, top_p=0.9)]),
            seed=i,
            **fields,
        )
        for i in range(count)
    ]


def alone(model: Any, request: Request, sample: int = 0) -> list[int]:
    """What the request gives, every token from scratch by the exact schedule: no engine, no cache."""
    tokens = list(request.tokens)
    for _ in range(request.max_new_tokens or 0):
        with torch.no_grad():
            hidden = refine(model, torch.tensor([tokens]), schedules.sequential()).hidden[:, -1]
            seed = (request.seed + sample, len(tokens))
            tokens.append(int(draw_rows(model.logits(hidden), [request.sampling], [seed])))
    return tokens[len(request.tokens) :]


def answers(completions: list[list[Completion]]) -> list[list[int]]:
    return [list(c.tokens) for samples in completions for c in samples]


@over(PAIRWISE, more=EACH_DELAY)
def test_ragged_rows_that_are_replaced_give_what_each_gives_alone(config: ModelConfig):
    model, asked = random_model(config), requests(7)
    engine = Engine(model, rows=3)
    assert answers(engine.complete(asked)) == [alone(model, request) for request in asked]
    assert engine.idle
    assert engine.rows.used == 0


@every_model
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_number_of_rows_does_not_matter(config: ModelConfig, rows: int):
    model, asked = random_model(config), requests(9, seed=1)
    expected = answers(Engine(model, rows=9, mode="eager").complete(asked))
    assert answers(Engine(model, rows=rows).complete(asked)) == expected


@every_model
def test_samples_are_forks_of_one_prompt(config: ModelConfig):
    model = random_model(config)
    request = Request((3, 1, 4, 1, 5), 6, WARM, seed=7, samples=5)
    (samples,) = Engine(model, rows=3).complete([request])
    assert [list(c.tokens) for c in samples] == [alone(model, request, i) for i in range(5)]
    assert [c.reused_tokens for c in samples] == [0, 4, 4, 4, 4]  # all but the last, whose hidden state is needed
    assert len({c.tokens for c in samples}) == 5


@every_model
def test_prompts_that_begin_alike_reuse_what_was_computed(config: ModelConfig):
    model = random_model(config)
    first, second = Request((3, 1, 4, 1, 5, 9), 4, WARM), Request((3, 1, 4, 1, 7, 7, 2), 4, WARM)
    engine = Engine(model, rows=2, prefixes=10**6)
    for request in (first, second, first):
        ((done,),) = engine.complete([request])
        assert list(done.tokens) == alone(model, request)
    reused = done.reused_tokens
    assert reused == 5 if not model.config.unlimited_context else reused in (0, 5)
    row = next(iter(engine.prefixes.kept))
    engine.prefixes.budget = 1
    engine.prefixes.keep(dataclasses.replace(row, tokens=(1, 2)))
    assert (1, 2) not in {kept.tokens for kept in engine.prefixes.kept}


@pytest.mark.parametrize("mode", ["converged", "fast", "one_sweep"])
def test_prompts_are_prefilled_in_parallel(mode: Any):
    # In these models sweeps are far from exact; where nothing recurs they are, and so is a fallback.
    model, asked = random_model(NONE), requests(7)
    engine = Engine(model, rows=3, prefill=mode)
    completions = engine.complete(asked)
    assert answers(completions) == [alone(model, request) for request in asked]
    certificates = [c.certificate for samples in completions for c in samples]
    assert all((c is not None) == (len(r.tokens) > 1) for c, r in zip(certificates, asked, strict=True))


def test_parallel_prefill_of_a_recurrent_model_is_as_near_as_it_says():
    model, asked = random_model(CONFIGS["both"]), requests(7)
    engine = Engine(model, rows=3, prefill="converged")
    tokens, expected = answers(engine.complete(asked)), [alone(model, request) for request in asked]
    assert sum(a == b for a, b in zip(tokens, expected, strict=True)) >= 6


def test_tokens_end_with_a_stop():
    model = random_model(CONFIGS["both"])
    whole = alone(model, Request((3, 1), 8, WARM))
    engine = Engine(model, rows=2)
    by_token = Request((3, 1), 8, WARM, stop=frozenset({whole[2]}))
    by_sequence = Request((3, 1), 8, WARM, stop_sequences=((whole[3], whole[4]),))
    (first,), (second,) = engine.complete([by_token, by_sequence])
    assert list(first.tokens) == whole[: whole.index(whole[2]) + 1]
    assert list(second.tokens) == whole[:5]
    assert (first.finish, second.finish) == ("stop", "stop")


def test_events_stream_and_a_stream_that_is_left_is_cancelled():
    model = random_model(CONFIGS["both"])
    engine, request = Engine(model, rows=2), Request((3, 1, 4), 6, WARM)
    events = list(engine.stream(request))
    assert [e.token for e in events] == alone(model, request)
    assert [e.finish for e in events] == [None] * 5 + ["length"]
    left = engine.stream(request)
    next(left)
    left.close()
    assert engine.rows.used == 0
    assert engine.idle
    assert engine.finished(0) == engine.finished(1) == []  # nothing of them stays
    assert not engine.done


def test_a_stream_that_is_never_begun_costs_nothing_and_a_lost_one_is_cancelled():
    model = random_model(CONFIGS["both"])
    engine, request = Engine(model, rows=2), Request((3, 1, 4), 6, WARM)
    unused = engine.stream(request)
    assert engine.idle
    del unused
    assert engine.idle
    lost = engine.stream(request)
    next(lost)
    watched = weakref.ref(engine.running[0])
    del lost
    gc.collect()
    assert watched() is None
    assert engine.idle
    assert not engine.done
    assert not engine.streams
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.stream(Request(()))


QUICK = Calibration(1.0, {"converged": Plan(2, 1), "fast": Plan(2, 1)})
"""Sweeps everything but single tokens."""


@pytest.mark.parametrize("before", ["one_sweep", "fast", "converged"])
def test_a_prefix_serves_only_who_asks_for_no_more(before: Any):
    model, prompt = random_model(CONFIGS["both"]), (3, 1, 4, 1, 5, 9, 2, 6)
    engine = Engine(model, rows=2, prefixes=10**6, calibration=QUICK)
    ((first,),) = engine.complete([Request(prompt, 2, WARM, prefill=before)])
    assert first.certificate is not None
    exact = Request((*prompt, 7), 4, WARM, prefill="exact")
    ((done,),) = engine.complete([exact])
    assert list(done.tokens) == alone(model, exact)
    vouched = error_bound(first.certificate)
    assert done.reused_tokens == (len(prompt) if vouched == 0 else 0)
    ((again,),) = engine.complete([exact])
    assert again.reused_tokens == len(prompt)  # of the exact row
    assert list(again.tokens) == list(done.tokens)
    for mode in ("one_sweep", "fast", "converged"):
        fresh = Engine(model, rows=2, prefixes=10**6, calibration=QUICK)
        fresh.complete([Request(prompt, 2, WARM, prefill=before)])
        ((later,),) = fresh.complete([Request((*prompt, 7), 4, WARM, prefill=mode)])
        assert (later.reused_tokens > 0) == (vouched <= asked_bound(mode, model))
        if later.reused_tokens:  # what comes behind it is no more exact
            assert error_bound(later.certificate) == vouched


def test_a_prefix_serves_only_its_owner():
    model, prompt = random_model(CONFIGS["both"]), (3, 1, 4, 1, 5, 9, 2, 6)
    engine = Engine(model, rows=2, prefixes=10**6)
    asked = [Request((*prompt, 7), 3, WARM, owner=owner) for owner in ("a", "b", "", "a", "b", "")]
    done = [engine.complete([request])[0][0] for request in asked]
    assert [completion.reused_tokens for completion in done] == [0] * 3 + [len(prompt)] * 3
    assert {completion.tokens for completion in done} == {done[0].tokens}


def test_a_penalty_of_repetitions_counts_the_prompt():
    model, prompt = random_model(CONFIGS["both"]), (3, 1, 4, 1, 5)
    request = Request(prompt, 6, Sampling(temperature=0), steering=Steering(repetition=100.0, bias=((1, 30.0),)))
    ((plain,), (beside,)) = Engine(model, rows=2).complete([dataclasses.replace(request, steering=Steering()), request])
    text = list(prompt)
    for token in beside.tokens:  # from scratch, by a plain loop
        with torch.no_grad():
            hidden = refine(model, torch.tensor([text]), schedules.sequential()).hidden[0, -1]
            logits = model.logits(hidden).tolist()
        steered = [x / 100 if t in text and x > 0 else x * 100 if t in text else x for t, x in enumerate(logits)]
        steered[1] += 30
        assert token == max(range(len(steered)), key=steered.__getitem__)
        text.append(token)
    assert plain.tokens != beside.tokens


def test_samples_and_what_is_kept_of_them_are_as_exact_as_the_prompt():
    model, prompt = random_model(CONFIGS["both"]), (3, 1, 4, 1, 5, 9, 2, 6)
    engine = Engine(model, rows=2, prefixes=10**6, calibration=QUICK)
    (samples,) = engine.complete([Request(prompt, 3, WARM, samples=3, prefill="one_sweep")])
    assert [error_bound(sample.certificate) for sample in samples] == [math.inf] * 3
    assert {kept.error for kept in engine.prefixes.kept} == {math.inf}
    longer = Request((*prompt, *samples[2].tokens, 1), 3, WARM, prefill="exact")  # it goes on from a sample
    ((done,),) = engine.complete([longer])
    assert done.reused_tokens == 0
    assert list(done.tokens) == alone(model, longer)


def test_what_is_found_is_the_longest_beginning_that_is_exact_enough():
    """Against a search through all that is kept."""
    r = random.Random(0)
    model = random_model(CONFIGS["both"])
    errors = (None, *(certificate_of(residual) for residual in (1e-6, 5e-4, 0.1, None)))
    cache = PrefixCache(10**9, (1e-5, 1e-3))
    for step in range(400):
        text = tuple(r.randrange(3) for _ in range(r.randint(1, 9)))
        row = KeptRow(text, model.empty_state(1, 1), r.choice(errors), r.choice("ab"))
        cache.keep(row)
        assert cache.bytes == sum(kept.bytes for kept in cache.kept)
        if step % 3 == 0:
            cache.budget = cache.bytes - 1  # the least recently used goes
            cache.keep(KeptRow((9,), model.empty_state(1, 1), None))
            cache.budget = 10**9
        for error, owner in itertools.product((0.0, 1e-5, 1e-3, math.inf), "abc"):
            wanted = tuple(r.randrange(3) for _ in range(r.randint(1, 12)))
            serving = [kept for kept in cache.kept if kept.error <= error and kept.owner == owner]
            best = max((common_prefix(kept.tokens, wanted[:-1]) for kept in serving), default=0)
            prefix = cache.find(wanted, 1, error, owner)
            assert (0 if prefix is None else prefix[0]) == best
            if prefix is not None:
                assert common_prefix(prefix[1].tokens, wanted[:-1]) == best
                assert prefix[1].error <= error
                assert prefix[1].owner == owner
                assert next(reversed(cache.kept)) is prefix[1]


def test_finding_a_prefix_takes_as_long_with_many_kept(monkeypatch: pytest.MonkeyPatch):
    model, r, compared = random_model(CONFIGS["both"]), random.Random(0), []
    row = KeptRow((0,), model.empty_state(1, 1), None)
    cache, common = PrefixCache(10**9), [r.randrange(30) for _ in range(20)]
    monkeypatch.setattr(radix_tree, "common_prefix", lambda a, b: compared.append(len(a)) or common_prefix(a, b))
    work = []
    for count in (30, 2000):
        while len(cache.kept) < count:
            cache.keep(dataclasses.replace(row, tokens=(*common, *(r.randrange(30) for _ in range(20)))))
        compared.clear()
        prefix = cache.find([*common, *range(30, 50)], 1)
        assert prefix is not None
        assert prefix[0] == 20
        work.append(sum(compared))
    assert max(work) <= 40
    assert cache.bytes == 2000 * row.bytes


def certificate_of(residual: float | None) -> Certificate:
    return Certificate("sweeps", "", 1, 2, 3, residual, residual, contraction=0.5)


def test_a_cancelled_row_is_free_at_once_and_the_others_do_not_notice():
    model, asked = random_model(CONFIGS["channels"]), requests(6, seed=2)
    engine = Engine(model, rows=3)
    numbers = [engine.submit(request) for request in asked]
    engine.step()
    engine.cancel(numbers[0])
    engine.cancel(numbers[4])  # still waiting
    assert engine.rows.used <= 2
    while not engine.idle:
        engine.step()
    for number, request in zip(numbers, asked, strict=True):
        (done,) = engine.finished(number)
        if number in (numbers[0], numbers[4]):
            assert done.finish == "cancelled"
        else:
            assert list(done.tokens) == alone(model, request)


def test_log_probabilities_are_the_models_own():
    model = random_model(CONFIGS["both"])
    request = Request((3, 1, 4), 3, Sampling(temperature=3.0, top_k=2), logprobs=2)
    ((done,),) = Engine(model, rows=1).complete([request])
    text = list(request.tokens)
    for token, logprob in zip(done.tokens, done.logprobs, strict=True):
        with torch.no_grad():
            hidden = refine(model, torch.tensor([text]), schedules.sequential()).hidden[0, -1]
            log = model.logits(hidden).log_softmax(-1)
        assert logprob.logprob == pytest.approx(float(log[token]), abs=1e-5)
        assert [t for t, _ in logprob.alternatives] == log.topk(2).indices.tolist()
        text.append(token)
    assert (done.prompt_tokens, done.finish) == (3, "length")


def test_without_a_limit_a_row_fills_its_slots_and_a_sliding_one_goes_on():
    model = random_model(CONFIGS["both"])
    ((done,),) = Engine(model, rows=1).complete([Request((1, 2, 3), None)])
    assert len(done.tokens) == CONTEXT + 1 - 3
    sliding = random_model(CONFIGS["sliding"])
    stream = Engine(sliding, rows=1).stream(Request((1, 2, 3)))
    assert len(list(itertools.islice(stream, 5 * CONTEXT))) == 5 * CONTEXT


def test_float32_rows_differ_only_where_the_margin_is_small():
    config = CONFIGS["both"]
    asked = [Request(r.tokens, r.max_new_tokens, Sampling(temperature=0)) for r in requests(20, seed=3)]
    model = random_model(config, torch.float32)
    together = answers(Engine(model, rows=8).complete(asked))
    single = [answers(Engine(model, rows=1).complete([r]))[0] for r in asked]
    close = 0
    for request, a, b in zip(asked, together, single, strict=True):
        if a == b:
            continue
        at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        text = torch.tensor([[*request.tokens, *a[:at]]])
        best = model.logits(refine(model, text, schedules.sequential()).hidden[0, -1]).topk(2).values
        assert float(best[0] - best[1]) < 1e-4
        close += 1
    assert close <= 2


def test_the_memory_budget_says_how_many_rows_fit():
    model = random_model(CONFIGS["both"])
    engine = Engine(model, rows=2)
    state = engine.rows.state
    parts = (*state.keys, *state.values, state.memory, state.tokens, state.slot_positions)
    assert sum(p.numel() * p.element_size() for p in parts) == 2 * row_bytes(model, CONTEXT)
    assert rows_that_fit(model, 5 * row_bytes(model, CONTEXT) + 1, CONTEXT) == 5
    assert Engine(model, memory=3 * row_bytes(model, CONTEXT)).rows.free == 3
    with pytest.raises(ValueError, match=rf"a row of {CONTEXT} slots takes [\d,]+ bytes, and 100 are given"):
        Engine(model, memory=100)
    with pytest.raises(ValueError, match="4 rows of 16 slots exceed"):
        Engine(model, rows=4, memory=3 * row_bytes(model, CONTEXT))


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (Request(()), "the prompt is empty; give at least one token"),
        (Request((1,) * 17), f"17 tokens and 1 new ones exceed the {CONTEXT} slots"),
        (Request((1,) * 10, 8), f"10 tokens and 8 new ones exceed the {CONTEXT} slots"),
        (Request((1, V)), rf"token \[{V}\] is not in the vocabulary of {V}"),
        (Request((1,), -1), "max_new_tokens is -1; it must be at least 0"),
        (Request((1,), samples=0), "samples is 0; it must be at least 1"),
        (Request((1,), logprobs=-1), "logprobs is -1"),
        (Request((1,), stop_sequences=((),)), "a stop sequence is empty"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_an_error_at_once(request_: Request, named: str):
    engine = Engine(random_model(CONFIGS["both"]), rows=1)
    with pytest.raises(ValueError, match=named):
        engine.submit(request_)
    assert engine.idle


def test_no_new_tokens_are_none():
    ((done,),) = Engine(random_model(CONFIGS["both"]), rows=1).complete([Request((1, 2), 0)])
    assert done.tokens == ()


def test_what_is_drawn_depends_on_seed_and_position_alone():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = draw_rows(logits, [WARM, Sampling(0.5), WARM], [(0, 4), (1, 4), (0, 5)])
    for i, (sampling, seed) in enumerate([(WARM, (0, 4)), (Sampling(0.5), (1, 4)), (WARM, (0, 5))]):
        assert draw_rows(logits[i : i + 1], [sampling], [seed]) == together[i]
    assert len({float(uniform(seed, position)) for seed in range(9) for position in range(9)}) == 81


def test_one_sample_is_cancelled_alone():
    model = random_model(CONFIGS["both"])
    request = Request((3, 1, 4), 6, WARM, samples=3)
    for cancelled in range(3):
        engine = Engine(model, rows=2)
        number = engine.submit(request)
        engine.step()
        engine.cancel(number, cancelled)
        while not engine.idle:
            engine.step()
        done = engine.finished(number)
        assert [c.finish == "cancelled" for c in done] == [i == cancelled for i in range(3)]
        assert all(list(c.tokens) == alone(model, request, c.sample) for c in done if c.sample != cancelled)


def test_requests_choose_how_their_prompt_is_computed():
    model = random_model(CONFIGS["both"])
    prompt = (3, 1, 4, 1, 5, 9, 2, 6)
    modes: tuple[Any, ...] = ("converged", None, "one_sweep", "exact")
    quick = Calibration(1.0, {"converged": Plan(2, 1), "fast": Plan(2, 1)})
    engine = Engine(model, rows=4, calibration=quick)
    completions = engine.complete([Request(prompt, 4, WARM, prefill=mode) for mode in modes])
    certificates = [done.certificate for (done,) in completions]
    assert [None if c is None else c.path for c in certificates][1:] == [None, "single", None]
    assert certificates[0] is not None
    assert certificates[0].path in ("sweeps", "fallback")
    assert answers(completions)[1] == answers(completions)[3] == alone(model, Request(prompt, 4, WARM))
    with pytest.raises(ValueError, match="prefill is 'quick'; choose one of exact"):
        engine.submit(Request(prompt, prefill="quick"))  # pyright: ignore[reportArgumentType]


def test_prompts_that_are_prefilled_one_by_one_do_not_see_each_other():
    model, asked = random_model(CONFIGS["both"]), requests(7)
    expected = answers([Engine(model, rows=1, prefill="converged").complete([request])[0] for request in asked])
    engine = Engine(model, rows=5, prefill="converged", prompts=1)
    assert answers(engine.complete(asked)) == expected
    for request in asked:
        engine.submit(request)
    first = engine.step()
    assert len({event.request for event in first}) < 5  # one was swept; only prompts of one token need no sweep
    with pytest.raises(ValueError, match="prompts is 0"):
        Engine(model, prompts=0)


def test_penalties_and_biases_are_a_rows_own():
    model, plain = random_model(CONFIGS["both"]), requests(3)
    steered = [
        Request((3, 1), 8, Sampling(temperature=0), steering=Steering(bias=((5, 100.0),))),
        Request((3, 1), 8, Sampling(temperature=0), steering=Steering(bias=((5, 100.0),), presence=1e3)),
        Request((3, 1), 8, Sampling(temperature=0), steering=Steering(bias=((5, 100.0),), frequency=30.0), logprobs=0),
    ]
    tokens = answers(engine_of(model).complete([*plain, *steered]))
    assert tokens[:3] == [alone(model, request) for request in plain]
    assert tokens[3] == [5] * 8
    assert tokens[4][0] == 5
    assert len(set(tokens[4])) == 8  # none twice
    assert tokens[5][:3] == [5, 5, 5]
    assert tokens[5].count(5) in (3, 4)
    with pytest.raises(ValueError, match="presence is steered by nan"):
        Steering(presence=float("nan"))
    with pytest.raises(ValueError, match="of the bias is not in the vocabulary"):
        engine_of(model).submit(Request((3,), steering=Steering(bias=((V, 1.0),))))


def engine_of(model: Any) -> Engine:
    return Engine(model, rows=6)


def test_streams_that_take_turns_each_get_their_own_tokens():
    model = random_model(CONFIGS["both"])
    asked = [Request((3, 1, 4), 3, WARM, seed=1), Request((1, 5), 6, WARM, seed=2)]
    engine = Engine(model, rows=2)
    rounds = itertools.zip_longest(*[engine.stream(request) for request in asked])
    events = list(zip(*itertools.islice(rounds, 20), strict=True))
    assert [[e.token for e in some if e is not None] for some in events] == [alone(model, r) for r in asked]
    assert not engine.streams


def test_any_temperature_draws_a_token_of_the_vocabulary():
    logits = torch.tensor([[1.0, 14.0, -14.0]])
    for temperature in (1e-39, 1e-3, 1e30, float("inf")):
        assert 0 <= int(draw_rows(logits, [Sampling(temperature)], [(0, 0)])) < 3
    with pytest.raises(ValueError, match="temperature is nan"):
        Sampling(float("nan"))


def test_prompts_with_several_samples_do_not_wait_for_each_other():
    model, steps = random_model(NONE), 0
    engine = Engine(model, rows=16)
    for seed in range(8):
        engine.submit(Request(tuple(range(1, 11)), 3, seed=seed, samples=2))
    while not engine.idle:
        engine.step()
        steps += 1
    assert steps <= 10 + 3 + 1


class Held(Executor):
    """Runs what it is given when the test says so."""

    def __init__(self) -> None:
        self.work: list[tuple[Future[Any], Any]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.work.append((future, lambda: fn(*args, **kwargs)))
        return future

    def finish(self) -> None:
        for future, run in self.work:
            if future.set_running_or_notify_cancel():
                future.set_result(run())
        self.work.clear()


def test_prompts_in_the_background_keep_nobody_waiting():
    model, prompt = random_model(CONFIGS["both"]), (3, 1, 4, 1, 5, 9, 2, 6)
    long = Request(prompt, 3, WARM, samples=2, prefill="one_sweep", seed=4)
    short = Request((3, 1), 4, WARM, prefill="exact")
    (expected,) = Engine(model, rows=3, calibration=QUICK).complete([long])
    held = Held()
    engine = Engine(model, rows=3, calibration=QUICK, background=held)
    numbers = [engine.submit(long), engine.submit(short), engine.submit(long)]
    for _ in range(6):
        engine.step()
    assert [c.finish for c in engine.finished(numbers[1])] == ["length"]
    assert len(engine.prefilling) == 2
    assert not engine.idle
    engine.cancel(numbers[2])
    held.finish()
    while not engine.idle:
        engine.step()
    done = engine.finished(numbers[0])
    assert [c.tokens for c in done] == [c.tokens for c in expected]
    assert [error_bound(c.certificate) for c in done] == [math.inf] * 2
    assert [c.finish for c in engine.finished(numbers[2])] == ["cancelled"] * 2
    assert engine.rows.used == 0


def test_a_prompt_in_the_background_goes_on_from_what_is_known():
    model, prompt = random_model(CONFIGS["both"]), (3, 1, 4, 1, 5, 9, 2, 6)
    held, asked = Held(), Request((*prompt, 5, 3, 5), 3, WARM, prefill="one_sweep")
    engine = Engine(model, rows=2, calibration=QUICK, background=held, prefixes=10**6)
    engine.complete([Request(prompt, 1, WARM, prefill="exact")])
    kept = next(iter(engine.prefixes.kept))
    before = [buffer.clone() for buffer in kept.state.keys]
    number = engine.submit(asked)
    engine.step()
    held.finish()
    while not engine.idle:
        engine.step()
    (done,) = engine.finished(number)
    assert done.reused_tokens == len(prompt)
    beside = Engine(model, rows=2, calibration=QUICK, prefixes=10**6)
    beside.complete([Request(prompt, 1, WARM, prefill="exact")])
    assert done.tokens == beside.complete([asked])[0][0].tokens
    assert all(torch.equal(a, b) for a, b in zip(before, kept.state.keys, strict=True))


def test_a_row_may_be_copied_onto_itself():
    """To forget what comes behind a place."""
    model = random_model(next(iter(PAIRWISE.values())))
    state = model.empty_state(1, 8).in_place()
    with torch.no_grad():
        _, state = model(torch.tensor([[3, 1, 4, 1, 5]]), range(5), state)
    copy_row(state, 0, state, 0, 3)
    assert state.tokens[0].tolist() == [3, 1, 4, -1, -1, -1, -1, -1]
    assert state.slot_positions[0].tolist() == [0, 1, 2, -1, -1, -1, -1, -1]
