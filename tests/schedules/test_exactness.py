"""One promise: every path computes the recurrence that the specification defines, or a stated approximation of it.

Everything is compared with `reference.py` (oracle, simulate), in float64 to 1e-10, on models whose parameters are
all random: the library's own initial values hold zeros behind which an error would hide.

B batch, T positions, D width.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support.models import (
    BATCH,
    CHOICES,
    EACH_DELAY,
    LENGTH,
    NONE,
    PAIRWISE,
    PRODUCT,
    TABLES,
    TOLERANCE,
    VISIBLE,
    VOCABULARY,
    assert_differs,
    assert_same,
    assert_same_gradients,
    configuration,
    decode,
    difference,
    documents_of,
    exact_schedules,
    gradients,
    label,
    oracle_rows,
    over,
    pairwise,
    random_model,
    random_tokens,
    unaligned,
    weights_of,
)
from support.oracle import simulate
from torch import Tensor

from lrt import MemoryConfig, ModelConfig, refine, schedules
from lrt.model.execution import EAGER, WHOLE
from lrt.schedules import refinement
from lrt.schedules.base import SCHEDULES, Pass, Passes, Simple
from lrt.schedules.work import free_passes, parts_of

EVERY = {**PAIRWISE, **PRODUCT, **EACH_DELAY, "none": NONE}


def recurs(config: ModelConfig) -> bool:
    """Whether a memory depends on the memory before it: some source lies at or above the first injected block."""
    first = min(config.injected_layers)
    return any(source >= first for source in config.sources)


RECURRENT = {name: config for name, config in {**PAIRWISE, **EACH_DELAY}.items() if recurs(config)}
# ---------------------------------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------------------------------

# Arguments for every schedule of the table; a new schedule needs an entry. Every stride and chunk divides 4, where
# `aligned` documents start.
EXAMPLES: dict[str, list[tuple[Any, ...]]] = {
    "plain": [()],
    "interleaved": [(2,), (4, (1.0, 0.0, 1.0, 2.0, 1.0))],
    "multi_refinement": [(2,), (1, None, True)],
    "chunked": [(1,), (4,)],
    "strided": [(2, 2), (4, 1)],
    "sequential": [(), (3,)],
    "settled": [(0, 1, 1), (1, 2, 1), (0, 4, 2)],
}


def examples() -> Iterator[Any]:
    """Every schedule of the table; one without an entry in EXAMPLES appears all the same, to fail by its name."""
    for name in SCHEDULES:
        for arguments in EXAMPLES.get(name, [None]):
            made = Simple(name, arguments) if arguments is not None else None
            yield pytest.param(made, id=repr(made) if made else f"{name}-without-example")


every_schedule = pytest.mark.parametrize("schedule", list(examples()))


def is_exact(schedule: Simple) -> bool:
    return schedule.name == "sequential" or (schedule.name, schedule.arguments) == ("chunked", (1,))


def ignores_alignment(schedule: Simple) -> bool:
    """Whether a document's passes are the same wherever it starts: one position at a time, or all at once."""
    return is_exact(schedule) or all(len(p.positions) == LENGTH for p in schedule.passes(LENGTH))


@dataclass(frozen=True)
class Given:
    """A schedule that is just its passes."""

    listed: Passes

    def draw(self) -> Given:
        return self

    def passes(self, length: int) -> Passes:
        return self.listed


def distinct_tokens(batch: int = BATCH, length: int = LENGTH, seed: int = 1) -> Tensor:
    """No token twice: a row of the embedding's gradient then belongs to one position."""
    order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return order[: batch * length].view(batch, length)


def aligned() -> Tensor:
    return documents_of((4, 5), (8, 1))


def simulate_rows(
    model: Any, tokens: Tensor, schedule: Any, documents: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """`simulate` over a batch: (B, T, D), and (B, n, D) of every pass."""
    passes = schedule.passes(tokens.shape[1])
    weights, config = weights_of(model), model.config
    rows = [
        simulate(weights, config, tokens[b], passes, None if documents is None else documents[b])
        for b in range(len(tokens))
    ]
    return torch.stack([h for h, _ in rows]), [torch.stack(p) for p in zip(*(ps for _, ps in rows), strict=True)]


def gradient_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return difference(torch.cat([g.flatten() for g in a.values()]), torch.cat([g.flatten() for g in b.values()]))


@pytest.fixture(autouse=True, params=["by classes", pytest.param("by masks", marks=pytest.mark.slow)], name="path")
def choose_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every promise holds on both paths of `refine`: by residue classes, where a schedule allows, and by the State.

    The second is slow for their number alone; in `make test` it is what schedules of no common stride take here.
    """
    if request.param == "by masks":
        monkeypatch.setattr(refinement, "common_stride", lambda *_: None)


# ---------------------------------------------------------------------------------------------------------------------
# The tests' own ground
# ---------------------------------------------------------------------------------------------------------------------
def test_every_schedule_of_the_table_has_examples():
    missing, stale = set(SCHEDULES) - set(EXAMPLES), set(EXAMPLES) - set(SCHEDULES)
    assert not missing, f"give EXAMPLES arguments for {sorted(missing)}: the tests below run over the table"
    assert not stale, f"EXAMPLES names {sorted(stale)}, which are no longer schedules"


def test_the_configurations_cover_every_pair_of_choices():
    assert 20 <= len(PAIRWISE) <= 40
    assert len(set(PAIRWISE.values())) == len(PAIRWISE)


@over(PAIRWISE, step=5)
def test_the_oracle_is_the_simulation_of_one_position_at_a_time(config: ModelConfig):
    model = random_model(config)
    with torch.no_grad():
        simulated, _ = simulate_rows(model, random_tokens(), schedules.sequential(), unaligned())
        assert_same(simulated, oracle_rows(model, random_tokens(), unaligned()))


@over(RECURRENT)
def test_recurrence_matters_in_these_models(config: ModelConfig):
    # Otherwise every equality below would hold for a model without memory as well.
    model, tokens = random_model(config), random_tokens()
    with torch.no_grad():
        plain, sequential = (refine(model, tokens, s).hidden for s in (schedules.plain(), schedules.sequential()))
    assert_differs(plain, sequential, "plain and sequential")


# ---------------------------------------------------------------------------------------------------------------------
# Exact paths
# ---------------------------------------------------------------------------------------------------------------------
@over(EVERY)
def test_exact_schedules_and_decoding_equal_the_oracle(config: ModelConfig):
    model, tokens = random_model(config), random_tokens()
    with torch.no_grad():
        expected = oracle_rows(model, tokens)
        for schedule in exact_schedules(LENGTH):
            assert_same(refine(model, tokens, schedule).hidden, expected, repr(schedule))
        assert_same(decode(model, tokens, model.empty_state(BATCH, LENGTH)), expected, "decoding")
        assert_same(decode(model, tokens, model.empty_state(BATCH, LENGTH).in_place()), expected, "decoding in place")


@over(PAIRWISE, more=EACH_DELAY)
def test_exact_schedules_and_decoding_equal_the_oracle_over_packed_documents(config: ModelConfig):
    model, tokens = random_model(config), random_tokens()
    with torch.no_grad():
        expected = oracle_rows(model, tokens, unaligned())
        for schedule in exact_schedules(LENGTH):
            assert_same(refine(model, tokens, schedule, documents=unaligned()).hidden, expected, repr(schedule))
        state = model.empty_state(BATCH, LENGTH, documents=unaligned())
        assert_same(decode(model, tokens, state), expected, "decoding")


@over(PAIRWISE, more=EACH_DELAY)
def test_prefill_split_anywhere_then_decoding_equals_the_oracle(config: ModelConfig):
    model, tokens = random_model(config), random_tokens()
    with torch.no_grad():
        expected = oracle_rows(model, tokens)
        for split in range(1, LENGTH):
            # Passes over the first `split` positions, on each path of an exact prefill in turn.
            schedule = exact_schedules(split)[split % len(exact_schedules(split))]
            state = model.empty_state(BATCH, LENGTH)
            for p in schedule.passes(split):
                prefilled, state = model(tokens[:, p.slice], p.positions, state)
            continued = decode(model, tokens, state, start=split)
            assert_same(continued, expected[:, split:], f"{schedule!r}, split at {split}")
            assert_same(prefilled, expected[:, p.slice], "the last pass of the prefill")


@over(PAIRWISE, step=2)
def test_refine_and_decoding_continue_from_the_state_of_refine(config: ModelConfig):
    # Tokens given with a state stand behind those it holds.
    model, tokens = random_model(config), random_tokens()
    with torch.no_grad():
        expected = oracle_rows(model, tokens, aligned())
        state, start = model.empty_state(BATCH, LENGTH, documents=aligned()), 0
        for stop in (3, 7):
            chunk = tokens[:, start:stop]
            out = refine(model, chunk, schedules.strided(chunk.shape[1], 1), state=state)
            assert_same(out.hidden, expected[:, start:stop], f"tokens {start} to {stop}")
            state, start = out.state, stop
        assert_same(decode(model, tokens, state, start=start), expected[:, start:], "decoding")


@over(PAIRWISE, step=2)
def test_a_second_prefill_chunk_continues_the_first(config: ModelConfig):
    # The carried memory of the first chunk must reach the second (style.md: "a second prefill chunk forgets it").
    model, tokens, split = random_model(config), random_tokens(), 4
    with torch.no_grad():
        state = model.empty_state(BATCH, LENGTH)
        hidden = []
        for start, stop in ((0, split), (split, LENGTH)):
            for _ in range(stop - start):  # as many full passes over the chunk as it has positions: exact
                chunk, state = model(tokens[:, start:stop], range(start, stop), state)
            hidden.append(chunk)
        assert_same(torch.cat(hidden, dim=1), oracle_rows(model, tokens))


@over(PAIRWISE, step=3)
def test_float32_stays_near_the_float64_oracle(config: ModelConfig):
    model, tokens = random_model(config, torch.float32), random_tokens()
    with torch.no_grad():
        expected = oracle_rows(random_model(config), tokens)
        for schedule in exact_schedules(LENGTH):
            assert_same(refine(model, tokens, schedule).hidden, expected, repr(schedule))
        assert_same(decode(model, tokens, model.empty_state(BATCH, LENGTH)), expected, "decoding")


# ---------------------------------------------------------------------------------------------------------------------
# Approximate schedules: how far they are exact
# ---------------------------------------------------------------------------------------------------------------------
@over(RECURRENT)
def test_n_full_passes_make_the_first_n_delays_exact(config: ModelConfig):
    # A pass moves what is remembered by its delay: by the shortest, where layers are read at several.
    delay = min(delay for source, delay in zip(config.sources, config.delays, strict=True) if source > 0)
    model, tokens = random_model(config), random_tokens()
    with torch.no_grad():
        expected = oracle_rows(model, tokens)
        for refinements in (0, 1, 2):
            hidden = refine(model, tokens, schedules.multi_refinement(refinements)).hidden
            # The pass with zero memory already makes the first `delay` positions exact, each refinement as many more.
            exact = delay * (refinements + 1)
            assert_same(hidden[:, :exact], expected[:, :exact], f"{refinements} refinements")
            assert difference(hidden[:, exact], expected[:, exact]) > 1e-6, "exact further than promised: vacuous"


@over(RECURRENT)
def test_n_strided_sweeps_make_the_first_n_groups_exact(config: ModelConfig):
    model, tokens = random_model(config), random_tokens()
    with torch.no_grad():
        expected = oracle_rows(model, tokens)
        for groups, sweeps in ((2, 1), (2, 3), (3, 2), (4, 2)):
            hidden = refine(model, tokens, schedules.strided(groups, sweeps)).hidden
            exact = groups * sweeps
            assert_same(hidden[:, :exact], expected[:, :exact], f"strided({groups}, {sweeps})")
            assert difference(hidden[:, exact:], expected[:, exact:]) > 1e-6, "exact further than promised: vacuous"


@every_schedule
@over(PAIRWISE, step=4, more=EACH_DELAY)
def test_schedules_equal_their_simulation(config: ModelConfig, schedule: Simple):
    # Values of every pass and gradients of every parameter, whatever the schedule approximates or cuts.
    model, tokens = random_model(config), random_tokens()
    out = refine(model, tokens, schedule, documents=unaligned())
    expected, passes = simulate_rows(model, tokens, schedule, unaligned())
    assert_same(out.hidden, expected)
    for (p, positions, hidden), simulated in zip(out.passes, passes, strict=True):
        assert list(positions) == list(p.positions)
        assert_same(hidden, simulated, repr(p))
    assert_same_gradients(gradients(model, out.hidden), gradients(model, expected))


# Orders that no schedule of the table has: what counts as written, and by which pass last, must not rely on them.
ODD_PASSES: dict[str, Passes] = {
    "back to front": (Pass(6, LENGTH), Pass(3, 6), Pass(0, 3), Pass(3, LENGTH)),
    "a part again": (Pass(0, LENGTH), Pass(2, 5)),
    "mixed strides": (Pass(1, LENGTH, 4), Pass(0, LENGTH, 2), Pass(5, 8), Pass(0, LENGTH)),
    "different ends": (Pass(0, 7, 2), Pass(1, LENGTH, 2), Pass(2, 6), Pass(0, LENGTH)),
    "detached classes": (Pass(0, LENGTH), Pass(1, LENGTH, 2, detach_memory=True), Pass(0, LENGTH, 2), Pass(2, 8)),
    "free classes": (Pass(0, LENGTH, 3), Pass(0, LENGTH, 2, grad=False), Pass(1, LENGTH, 2), Pass(0, 5)),
}


@pytest.mark.parametrize("name", list(ODD_PASSES))
@over(PAIRWISE, step=6)
def test_any_list_of_passes_equals_its_simulation(config: ModelConfig, name: str):
    model, tokens, schedule = random_model(config), random_tokens(), Given(ODD_PASSES[name])
    out = refine(model, tokens, schedule)
    expected, passes = simulate_rows(model, tokens, schedule)
    for (p, _, hidden), simulated in zip(out.passes, passes, strict=True):
        assert_same(hidden, simulated, repr(p))
    assert_same(out.hidden, expected)
    assert_same_gradients(gradients(model, out.hidden), gradients(model, expected))


@every_schedule
def test_out_hidden_is_each_position_by_its_last_pass(schedule: Simple):
    model, tokens = random_model(configuration({"source": "L"})), random_tokens()
    out = refine(model, tokens, schedule)
    assert [p for p, _, _ in out.passes] == list(schedule.passes(LENGTH))
    expected = torch.zeros_like(out.hidden)
    for p, _, hidden in out.passes:
        expected[:, p.slice] = hidden
    assert torch.equal(out.hidden, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Causality, documents
# ---------------------------------------------------------------------------------------------------------------------
@every_schedule
@over(PAIRWISE, step=4)
def test_no_schedule_lets_values_flow_from_later_tokens(config: ModelConfig, schedule: Simple):
    model, tokens = random_model(config), random_tokens()
    with torch.no_grad():
        before = refine(model, tokens, schedule).hidden
        for t in (1, 4, LENGTH - 1):
            changed = tokens.clone()
            changed[:, t] = (tokens[:, t] + 1) % VOCABULARY
            after = refine(model, changed, schedule).hidden
            # Tighter than TOLERANCE: the same sums over the same numbers; only masked zeros may be summed differently.
            assert float((after - before)[:, :t].abs().max()) <= 1e-12, f"token {t}"
            assert_differs(after[:, t], before[:, t], f"token {t}")


@every_schedule
@over(PAIRWISE, step=4)
def test_no_schedule_lets_gradients_flow_from_later_tokens(config: ModelConfig, schedule: Simple):
    model, tokens = random_model(config), distinct_tokens()
    hidden = refine(model, tokens, schedule).hidden
    tables = {name: p for name, p in weights_of(model).items() if name.endswith(TABLES)}
    direction = torch.randn(hidden[:, 0].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for t in (0, 3, LENGTH - 2):
        loss = (hidden[:, t] * direction).sum()
        grads = torch.autograd.grad(loss, list(tables.values()), retain_graph=True, allow_unused=True)
        for name, g in zip(tables, grads, strict=True):
            assert g is not None, f"{name} has no gradient"
            assert not g[tokens[:, t + 1 :]].any(), f"position {t} reads later rows of {name}"
            # With one token per position, a row without a gradient would also be one the test looks at in vain.
            assert g[tokens[:, t]].any(), f"position {t} does not read its own row of {name}"


@every_schedule
@over(PAIRWISE, step=4, more=EACH_DELAY)
def test_packed_documents_equal_the_documents_alone(config: ModelConfig, schedule: Simple):
    model, tokens = random_model(config), random_tokens()
    layouts = [aligned(), unaligned()] if ignores_alignment(schedule) else [aligned()]
    with torch.no_grad():
        for documents in layouts:
            packed = refine(model, tokens, schedule, documents=documents).hidden
            for row, number in itertools.product(range(BATCH), range(int(documents.max()) + 1)):
                inside = documents[row] == number
                if inside.any():
                    alone = refine(model, tokens[row : row + 1, inside], schedule).hidden
                    assert_same(packed[row : row + 1, inside], alone, f"row {row}, document {number}")


@every_schedule
@over(PAIRWISE, step=4, more=EACH_DELAY)
def test_gradients_do_not_cross_documents(config: ModelConfig, schedule: Simple):
    model, tokens, documents = random_model(config), distinct_tokens(), aligned()
    hidden = refine(model, tokens, schedule, documents=documents).hidden
    last = documents == documents.amax(dim=1, keepdim=True)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (g,) = torch.autograd.grad((hidden * direction)[last].sum(), [weights_of(model)["embedding.weight"]])
    assert not g[tokens[~last]].any()
    assert g[tokens[last]].any(dim=-1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Without recurrence
# ---------------------------------------------------------------------------------------------------------------------
TOKEN_SHIFT = {
    label(choice): configuration({**choice, "source": "0"})
    for choice in pairwise({name: values for name, values in CHOICES.items() if name != "source"})[::2]
}
CONVOLUTIONS = {name: config for name, config in EACH_DELAY.items() if not recurs(config)}
FLAT = {"none": NONE, **TOKEN_SHIFT, **CONVOLUTIONS}
# `strided` has no full pass first: its first sweep attends only to what is written.
every_schedule_but_strided = pytest.mark.parametrize(
    "schedule", [example for example in examples() if not str(example.id).startswith("strided")]
)


@every_schedule_but_strided
@over(FLAT)
def test_without_recurrence_every_schedule_equals_plain(config: ModelConfig, schedule: Simple):
    model, tokens = random_model(config), random_tokens()
    expected = refine(model, tokens, schedules.plain(), documents=unaligned()).hidden
    hidden = refine(model, tokens, schedule, documents=unaligned()).hidden
    assert_same(hidden, expected)
    if all(p.grad for p in schedule.passes(LENGTH)):
        # Not even `detach` or `backprop` cuts layer 0: it is computed from the token whenever it is read.
        assert_same_gradients(gradients(model, hidden), gradients(model, expected))


@over(FLAT)
def test_without_recurrence_plain_is_exact(config: ModelConfig):
    model, tokens = random_model(config), random_tokens()
    assert_same(refine(model, tokens, schedules.plain()).hidden, oracle_rows(model, tokens))


@over(TOKEN_SHIFT, more=CONVOLUTIONS)
def test_layer_0_reaches_the_embedding_after_gradient_free_passes(config: ModelConfig):
    # One full sweep after a free pass recomputes all keys and values, so nothing is missing from the gradient.
    model, tokens = random_model(config), random_tokens()
    settled = refine(model, tokens, schedules.settled(1, 1, 1)).hidden
    plain = refine(model, tokens, schedules.plain()).hidden
    assert_same_gradients(gradients(model, settled), gradients(model, plain))


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------
@over(EVERY)
def test_sequential_has_the_gradients_of_the_oracle(config: ModelConfig):
    model, tokens = random_model(config), random_tokens(batch=1, length=6)
    expected = gradients(model, oracle_rows(model, tokens))
    assert_same_gradients(gradients(model, refine(model, tokens, schedules.sequential()).hidden), expected)
    # A parameter without a gradient is one that the equalities say nothing about. The head only reads `hidden`.
    dead = {name for name, g in expected.items() if not name.startswith("head.") and not g.any()}
    assert not dead


@over(PAIRWISE, step=2, more=EACH_DELAY)
def test_interleaved_in_order_has_the_gradients_of_the_oracle(config: ModelConfig):
    # The other differentiable exact path: a wrong clone of a buffer shows here and not in the values.
    model, tokens = random_model(config), random_tokens()
    expected = gradients(model, oracle_rows(model, tokens, unaligned()))
    out = refine(model, tokens, schedules.interleaved(LENGTH), documents=unaligned())
    assert_same_gradients(gradients(model, out.hidden), expected)


@over(RECURRENT, step=2)
def test_truncated_back_propagation_differs_only_when_it_truncates(config: ModelConfig):
    model, tokens = random_model(config), random_tokens()

    def through(backprop: int | None) -> dict[str, Tensor]:
        return gradients(model, refine(model, tokens, schedules.sequential(backprop)).hidden)

    full = through(None)
    for backprop in (LENGTH, LENGTH + 5):
        assert gradient_difference(through(backprop), full) <= TOLERANCE[torch.float64]
    for backprop in (1, 3):
        assert gradient_difference(through(backprop), full) > VISIBLE


@over(RECURRENT, step=2)
def test_gradient_free_passes_are_detached_buffers(config: ModelConfig):
    model, tokens, schedule = random_model(config), random_tokens(), schedules.settled(1, 2, 1)
    out = refine(model, tokens, schedule)
    quiet = [p for p in schedule.passes(LENGTH) if not p.grad]
    assert quiet
    for p, _, hidden in out.passes:
        assert hidden.requires_grad == p.grad

    state = model.empty_state(BATCH, LENGTH, tokens=tokens)
    with torch.no_grad():
        for p in quiet:
            _, state = model(tokens[:, p.slice], p.positions, state)
    expected = torch.zeros_like(out.hidden)
    for p in schedule.passes(LENGTH)[len(quiet) :]:
        hidden, state = model(tokens[:, p.slice], p.positions, state)
        expected = expected.slice_scatter(hidden, 1, p.start, p.stop, p.stride)
    assert_same(out.hidden, expected)
    assert_same_gradients(gradients(model, out.hidden), gradients(model, expected))


@over(RECURRENT, step=3)
def test_detach_memory_cuts_the_memory_and_nothing_else(config: ModelConfig):
    model, tokens = random_model(config), random_tokens()

    def under(first: Pass) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of the library and of the simulation: the halves read memory, keys and values of `first`."""
        schedule = Given((first, Pass(0, LENGTH, 2), Pass(1, LENGTH, 2)))
        expected, _ = simulate_rows(model, tokens, schedule)
        return gradients(model, refine(model, tokens, schedule).hidden), gradients(model, expected)

    whole, cut, free = (Pass(0, LENGTH), Pass(0, LENGTH, detach_memory=True), Pass(0, LENGTH, grad=False))
    by_name = {}
    for name, first in (("whole", whole), ("cut", cut), ("free", free)):
        by_name[name], expected = under(first)
        assert_same_gradients(by_name[name], expected, name)
    # Three different gradients: memory was cut, keys and values were not.
    for a, b in itertools.combinations(by_name, 2):
        assert gradient_difference(by_name[a], by_name[b]) > VISIBLE, (a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Streams and ragged batches
# ---------------------------------------------------------------------------------------------------------------------
def sliding(choice: dict[str, Any], window: int) -> ModelConfig:
    """A model in which every layer slides, so that its slots may be reused."""
    return replace(configuration({**choice, "window_pattern": "S"}), window=window, context=8)


STREAMS = {
    f"{source}-{injection}-delay={delay}-window={window}": sliding(
        {"source": source, "injection": injection, "delay": delay, "kv_heads": 1, "value_embeddings": "all"}, window
    )
    for source, injection, delay, window in (
        ("L", "both", 1, 3),
        ("0", "both", 1, 3),
        ("1", "residual", 2, 4),
        ("(0,L)sum", "key_value", 1, 2),
        ("(0,L)channels", "both", 3, 1),  # the memory reaches further back than the window
        ("(1,L)channels", "key_value", 4, 3),
    )
}
STREAMS |= {
    f"delays-{name}-window={window}": replace(
        EACH_DELAY[f"delays-{name}"], window_pattern="S", window=window, context=8
    )
    for name, window in (("convolution", 2), ("(L,L)at(1,3)channels", 1), ("(0,L)at(1,2)channels", 4))
}


@over(STREAMS)
@pytest.mark.parametrize("spare", [0, 1, 5], ids=lambda spare: f"{spare}-slots-to-spare")
def test_an_endless_stream_in_few_slots_equals_the_oracle(config: ModelConfig, spare: int):
    model, tokens = random_model(config), random_tokens(length=23)  # far past the context of 8
    slots = max(config.sliding_window, *(delay + 1 for delay in config.delays)) + spare
    with torch.no_grad():
        assert_same(decode(model, tokens, model.empty_state(BATCH, slots)), oracle_rows(model, tokens))


@over(STREAMS)
@pytest.mark.parametrize("chunk", [2, 5], ids=lambda chunk: f"chunks-of-{chunk}")
def test_a_stream_in_chunks_that_wrap_around_equals_its_simulation(config: ModelConfig, chunk: int):
    # Several positions in one call overwrite slots that its first positions may still attend to, if there are too few.
    # Within a chunk a token is known before it is read: each call notes its own first.
    model, tokens = random_model(config), random_tokens(length=23)
    slots = chunk + max(config.sliding_window - 1, *config.delays)
    schedule = schedules.chunked(chunk)
    with torch.no_grad():
        state, hidden = model.empty_state(BATCH, slots), []
        for p in schedule.passes(tokens.shape[1]):
            h, state = model(tokens[:, p.slice], p.positions, state)
            hidden.append(h)
        expected, _ = simulate_rows(model, tokens, schedule)
        assert_same(torch.cat(hidden, dim=1), expected)
        assert_same(refine(model, tokens, schedule).hidden, expected, "past the context, a slot for each position")


@over(PAIRWISE, step=2, more=EACH_DELAY)
def test_ragged_positions_equal_row_by_row(config: ModelConfig):
    model, tokens, documents = random_model(config), random_tokens(), unaligned()
    # Per row: a start of different length, positions out of step, recomputed, and with gaps.
    calls = [
        torch.tensor([[0, 1, 2], [0, 1, 2]]),
        torch.tensor([[3, 4], [1, 3]]),
        torch.tensor([[0], [4]]),
        torch.tensor([[2, 5, 6], [0, 5, 8]]),
        torch.tensor([[7, 8], [6, 7]]),
    ]
    with torch.no_grad():
        state = model.empty_state(BATCH, LENGTH, documents=documents, tokens=tokens)
        rows = [slice(b, b + 1) for b in range(BATCH)]
        alone = [model.empty_state(1, LENGTH, documents=documents[r], tokens=tokens[r]) for r in rows]
        for positions in calls:
            hidden, state = model(tokens.gather(1, positions), positions, state)
            for b, r in enumerate(rows):
                expected, alone[b] = model(tokens[r, positions[b]], positions[b], alone[b])
                assert_same(hidden[r], expected, f"row {b}, positions {positions[b].tolist()}")


@over(PAIRWISE, step=2, more=EACH_DELAY)
def test_ragged_decoding_equals_the_oracle(config: ModelConfig):
    # Row 1 is two positions behind row 0, as in a batch of prompts of different lengths.
    model, tokens, behind = random_model(config), random_tokens(), 2
    with torch.no_grad():
        expected = oracle_rows(model, tokens)
        state = model.empty_state(BATCH, LENGTH)
        for t in range(LENGTH):
            positions = torch.tensor([[t], [max(0, t - behind)]])
            hidden, state = model(tokens.gather(1, positions), positions, state)
            assert_same(hidden, torch.stack([expected[b, positions[b]] for b in range(BATCH)]), f"step {t}")


@over(PAIRWISE, step=6)
def test_a_state_stays_valid_after_a_call(config: ModelConfig):
    # Two continuations of one State, as in beam search: the first must leave nothing behind for the second.
    model, tokens = random_model(config), random_tokens()
    with torch.no_grad():
        _, state = model(tokens[:, :4], range(4), model.empty_state(BATCH, LENGTH))
        for positions in (range(4, 6), torch.tensor([[4, 5], [3, 4]]), range(1, 3), torch.tensor([[0, 2], [1, 3]])):
            before, _ = model(tokens[:, 4:5], range(4, 5), state)
            model((tokens[:, :2] + 1) % VOCABULARY, positions, state)
            after, _ = model(tokens[:, 4:5], range(4, 5), state)
            assert torch.equal(after, before)


def as_rows(positions: Tensor) -> Tensor:
    return positions.expand(BATCH, -1)


POSITIONS: dict[str, Callable[[range], Any]] = {
    "range": lambda positions: positions,
    "int64": lambda positions: torch.tensor(list(positions)),
    "int32": lambda positions: torch.tensor(list(positions), dtype=torch.int32),
    "int64-rows": lambda positions: as_rows(torch.tensor(list(positions))),
    "int32-rows": lambda positions: as_rows(torch.tensor(list(positions), dtype=torch.int32)),
}


@pytest.mark.parametrize("form", list(POSITIONS))
def test_positions_mean_the_same_in_every_form(form: str):
    model, tokens = random_model(configuration({"source": "L"})), random_tokens()
    with torch.no_grad():
        expected = refine(model, tokens, schedules.interleaved(2)).hidden
        state, hidden = model.empty_state(BATCH, LENGTH), torch.zeros_like(expected)
        for p in schedules.interleaved(2).passes(LENGTH):
            hidden[:, p.slice], state = model(tokens[:, p.slice], POSITIONS[form](p.positions), state)
        assert_same(hidden, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Random configurations
# ---------------------------------------------------------------------------------------------------------------------
def random_config(pick: random.Random) -> ModelConfig:
    """Anything a configuration may say, far from the lists above: other depths, orders of sources, windows, delays."""
    depth = pick.choice([1, 2, 3, 4])
    heads = pick.choice([1, 2, 4])
    sources = tuple(pick.sample(range(depth + 1), pick.randint(1, min(3, depth + 1))))
    memory = MemoryConfig(
        injection=pick.choice(["residual", "key_value", "both", "both"]),
        projection=pick.choice(["shared", "layerwise"]),
        source=pick.choice([sources, sources, sources[0], None]),
        combine=pick.choice(["sum", "channels"]),
        initial=pick.choice(["zeros", "embedding"]),
        delay=pick.randint(1, 4),
        layers=pick.choice([None, tuple(pick.sample(range(1, depth + 1), pick.randint(1, depth)))]),
    )
    return ModelConfig(
        depth=depth,
        width=pick.choice([8, 12]),
        heads=heads,
        kv_heads=pick.choice([g for g in (1, 2, 4) if heads % g == 0]),
        head_size=pick.choice([2, 4, 6]),
        vocab_size=VOCABULARY,
        context=16,
        value_embeddings=pick.choice(["none", "alternate", "all"]),
        window_pattern="".join(pick.choice("SL") for _ in range(pick.randint(1, 4))),
        window=pick.randint(1, 6),
        mlp_width=pick.randint(1, 20),
        rope_base=pick.choice([100.0, 10000.0]),
        memory=memory,
    )


def random_schedule(pick: random.Random) -> Simple:
    small = pick.randint(1, 4)
    return pick.choice(
        [
            schedules.plain(),
            schedules.interleaved(small),
            schedules.multi_refinement(small, detach=pick.random() < 0.5),
            schedules.chunked(small),
            schedules.strided(small, pick.randint(1, 3)),
            schedules.sequential(small),
            schedules.settled(pick.randint(0, 2), small, pick.randint(1, 2)),
        ]
    )


def random_documents(pick: random.Random, length: int) -> Tensor | None:
    if pick.random() < 0.3:
        return None
    borders = [[t > 0 and pick.random() < 0.3 for t in range(length)] for _ in range(BATCH)]
    return torch.tensor(borders).long().cumsum(dim=1)


def with_delays(config: ModelConfig, pick: random.Random) -> ModelConfig:
    """The same with up to five sources, each at a delay of its own."""
    reads = [(pick.randint(0, config.depth), pick.randint(1, 4)) for _ in range(pick.randint(1, 5))]
    source, delay = zip(*dict.fromkeys(reads), strict=True)
    return replace(config, memory=replace(config.memory, source=source, delay=delay))


@pytest.mark.parametrize("seed", range(24))
def test_random_configurations_equal_the_oracle(seed: int):
    pick = random.Random(seed)
    equals_the_oracle(random_config(pick), pick, seed)


@pytest.mark.parametrize("seed", range(16))
def test_random_delays_equal_the_oracle(seed: int):
    pick = random.Random(f"delays {seed}")
    equals_the_oracle(with_delays(random_config(pick), pick), pick, seed)


def equals_the_oracle(config: ModelConfig, pick: random.Random, seed: int) -> None:
    length = pick.randint(1, 12)
    schedule, documents = random_schedule(pick), random_documents(pick, length)
    model, tokens = random_model(config, seed=seed), random_tokens(length=length, seed=seed)

    exact = refine(model, tokens, schedules.sequential(), documents=documents).hidden
    expected = oracle_rows(model, tokens, documents)
    assert_same(exact, expected, "sequential")
    assert_same_gradients(gradients(model, exact), gradients(model, expected), "sequential")

    out = refine(model, tokens, schedule, documents=documents)
    expected, _ = simulate_rows(model, tokens, schedule, documents)
    assert_same(out.hidden, expected, repr(schedule))
    assert_same_gradients(gradients(model, out.hidden), gradients(model, expected), repr(schedule))


# ---------------------------------------------------------------------------------------------------------------------
# Passes that end at the highest remembered layer
# ---------------------------------------------------------------------------------------------------------------------

FREE: dict[str, tuple[bool, ...]] = {
    "plain()": (False,),
    "interleaved(2, (0.0, 1.0, 1.0))": (False, False, False),  # class 0 still reads the first pass's class 1
    "multi_refinement(2)": (False, False, False),
    "multi_refinement(2, (0.0, 0.0, 1.0))": (True, True, False),
    "multi_refinement(2, (1.0, 0.0, 0.0))": (False, True, False),
    "chunked(4)": (False,) * 3,
    "strided(2, 2)": (False,) * 4,
    "settled(0, 1, 1)": (True, False),
    "settled(2, 1, 2)": (True, True, True, False, False),
    "settled(0, 2, 1)": (False, False, False),
    "settled(1, 2, 1)": (False,) * 5,
}


@pytest.mark.parametrize(("text", "free"), FREE.items())
def test_a_pass_is_free_where_its_keys_are_replaced_before_they_are_seen(text: str, free: tuple[bool, ...]):
    assert free_passes(schedules.parse(text).passes(LENGTH)) == free


SHAPES: dict[str, dict[str, Any]] = {
    "": {},
    "windows": {"window_pattern": "SLS", "window": 3},
    "loops": {"loops": 2},
    "some-layers": {"layers": (2, 3)},
    "delay": {"delay": 2, "initial": "embedding"},
}
MEMORY_FIELDS = ("layers", "delay", "initial")


def shallow_sources() -> Iterator[Any]:
    """Configurations of three blocks whose memory is known before the last of them has run."""
    sources: list[tuple[Any, str]] = [(0, "sum"), (1, "sum"), (2, "sum"), ((0, 2), "sum")]
    sources += [((0, 1), "channels"), ((1, 2), "channels")]
    kinds = (("both", "layerwise"), ("key_value", "shared"), ("residual", "shared"))
    # Every source with every shape; the kinds of injection take turns, and meet every source and every shape.
    for i, ((source, combine), (name, fields)) in enumerate(itertools.product(sources, SHAPES.items())):
        injection, projection = kinds[i % len(kinds)]
        recalled = {k: v for k, v in fields.items() if k in MEMORY_FIELDS}
        memory = MemoryConfig(injection, projection, source, combine, **recalled)  # type: ignore[arg-type]
        config = replace(
            configuration({"depth": 3, "value_embeddings": "alternate"}),
            memory=memory,
            **{k: v for k, v in fields.items() if k not in MEMORY_FIELDS},
        )
        yield pytest.param(config, id=f"{source}-{injection}-{projection}-{name}".replace(" ", ""))


@pytest.mark.parametrize("config", list(shallow_sources()))
def test_free_passes_that_end_at_the_source_change_no_number(config: ModelConfig):
    model, tokens = random_model(config), random_tokens()
    middle = schedules.multi_refinement(2, (1.0, 0.0, 0.0))
    for schedule, packed in ((schedules.settled(1, 1, 1), unaligned()), (middle, None)):
        whole, ended = (refine(model, tokens, schedule, packed, execution=e) for e in (WHOLE, EAGER))
        free = free_passes(schedule.passes(LENGTH))
        for early, (_, _, reference), (_, _, hidden) in zip(free, whole.passes, ended.passes, strict=True):
            assert hidden.shape[1] == (0 if early else LENGTH)
            assert_same(hidden, reference[:, : hidden.shape[1]])
        for reference, left in zip(buffers(whole.state), buffers(ended.state), strict=True):
            assert_same(left, reference)
        assert_same_gradients(gradients(model, ended.hidden), gradients(model, whole.hidden))


def buffers(state: Any) -> list[Tensor]:
    return [*state.keys, *state.values, state.memory]


def test_a_pass_that_ends_at_the_source_runs_no_block_above_it():
    """Blocks 1 and 2 of three remember layer 2: of four passes, three stop there. Token shift needs none of these."""
    for source, runs in (((0, 2), [4, 4, 1]), ((0, 0), [1, 1, 1]), ((0, 3), [4, 4, 4])):
        memory = MemoryConfig(source=source, combine="channels", projection="layerwise")
        model = random_model(replace(configuration({"depth": 3}), memory=memory))
        called: list[torch.nn.Module] = []
        for block in model.blocks:
            block.register_forward_hook(lambda module, *_, called=called: called.append(module))
        refine(model, random_tokens(), schedules.settled(2, 1, 1), execution=EAGER)
        assert [called.count(block) for block in model.blocks] == runs


def delayed() -> Iterator[Any]:
    """Those at delays of their own that remember a layer, and one whose first pass leaves its channel out."""
    memory = MemoryConfig(source=(0, 0, 2), combine="channels", delay=(2, 1, 1), projection="layerwise")
    yield pytest.param(replace(configuration({"depth": 3}), memory=memory), id="delays-first-channels")
    for name, config in EACH_DELAY.items():
        if config.stored_sources:
            yield pytest.param(config, id=name)


def layered_sources() -> Iterator[Any]:
    """Configurations of three blocks in which a remembered layer enters from the second or third on."""
    memories: list[tuple[Any, Any]] = [
        ((0, 2), ((1, 2, 3), (2, 3))),
        ((0, 0, 3), ((1, 2, 3), (1, 2, 3), (3,))),
        ((0, 0, 3), (None, None, (2, 3))),
        ((2, 3), ((2,), (3, 2))),
        ((3, 0), ((2, 3), (1, 3))),
        ((3,), ((2, 3),)),
    ]
    kinds = (("both", "layerwise"), ("key_value", "shared"), ("residual", "shared"))
    shapes = {"": {}, **{name: SHAPES[name] for name in ("windows", "loops", "delay")}}
    for i, ((source, layers), (name, fields)) in enumerate(itertools.product(memories, shapes.items())):
        injection, projection = kinds[i % len(kinds)]
        recalled = {k: v for k, v in fields.items() if k in MEMORY_FIELDS}
        own = tuple(each or (1, 2, 3) for each in layers)
        memory = MemoryConfig(injection, projection, source, "channels", layers=own, **recalled)  # type: ignore[arg-type]
        config = replace(
            configuration({"depth": 3, "value_embeddings": "alternate"}),
            memory=memory,
            **{k: v for k, v in fields.items() if k not in MEMORY_FIELDS},
        )
        yield pytest.param(config, id=f"{source}-{layers}-{injection}-{projection}-{name}".replace(" ", ""))


SHARING = [
    "settled(0, 1, 1)",
    "settled(1, 1, 2)",
    "settled(1, 2, 1)",
    "interleaved(2)",
    "multi_refinement(2)",
    "plain()",
]


@pytest.mark.parametrize("config", [*layered_sources(), *delayed()])
def test_blocks_that_all_passes_share_change_no_number(config: ModelConfig):
    model, tokens = random_model(config), random_tokens()
    for text, packed in zip(SHARING, (None, unaligned()) * 3, strict=True):
        whole, shared = (refine(model, tokens, schedules.parse(text), packed, execution=e) for e in (WHOLE, EAGER))
        for (p, _, reference), (_, _, hidden) in zip(whole.passes, shared.passes, strict=True):
            if p.loss_weight:
                assert_same(hidden, reference)
        for reference, left in zip(buffers(whole.state), buffers(shared.state), strict=True):
            assert_same(left, reference)
        ours, theirs = (
            gradients(model, torch.cat([h for p, _, h in run.passes if p.loss_weight], 1)) for run in (shared, whole)
        )
        assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("path", ["by classes"], indirect=True)
def test_blocks_below_the_first_that_reads_a_remembered_layer_run_once():
    """Layer 2 of three enters from block 2 on: block 1 runs once, and block 3 in the last pass alone."""
    for layers, text, runs in (
        (((1, 2, 3), (2, 3)), "settled(2, 1, 1)", [1, 4, 1]),
        (((1, 2, 3), (2, 3)), "multi_refinement(2)", [1, 3, 3]),
        (((1, 2, 3), (2, 3)), "interleaved(2)", [1, 3, 3]),
        # The free sweep's keys are seen by graded classes: the first three passes share, those behind them do not.
        (((1, 2, 3), (2, 3)), "settled(1, 2, 1)", [3, 5, 5]),
        (((1, 2, 3), (3,)), "settled(2, 1, 1)", [4, 4, 1]),  # layer 2 is no more recurrent, and not shared
        (((1, 2, 3), (1, 2)), "settled(2, 1, 1)", [4, 4, 1]),
    ):
        memory = MemoryConfig(source=(0, 2), combine="channels", projection="layerwise", layers=layers)
        model = random_model(replace(configuration({"depth": 3}), memory=memory))
        called: list[torch.nn.Module] = []
        for block in model.blocks:
            block.register_forward_hook(lambda module, *_, called=called: called.append(module))
        refine(model, random_tokens(), schedules.parse(text), execution=EAGER)
        assert [called.count(block) for block in model.blocks] == runs, (layers, text)


@pytest.mark.parametrize(
    "layers", [((1, 2, 3), (1, 2, 3), (2, 3)), ((1, 2), (1, 2), (2, 3))], ids=["all", "state alone"]
)
def test_a_pass_that_leaves_channels_out_gives_every_parameter_a_gradient(layers: Any):
    """DDP expects one of each: zeros for what is left out. Block 3 may read a remembered layer alone."""
    memory = MemoryConfig(source=(0, 0, 3), combine="channels", projection="layerwise", layers=layers)
    model = random_model(replace(configuration({"depth": 3}), memory=memory))
    hidden = refine(model, random_tokens(), schedules.plain(), execution=EAGER).hidden
    read = {name: p for name, p in model.named_parameters() if name != "head.weight"}
    each = torch.autograd.grad(hidden.square().sum(), list(read.values()), allow_unused=True)
    assert [name for name, gradient in zip(read, each, strict=True) if gradient is None] == []


def test_latent_thoughts_are_read_by_the_next_pass_so_that_none_ends_early():
    config = replace(NONE, thoughts=1)
    passes = schedules.settled(1, 1, 1).passes(LENGTH)
    assert [part.blocks for part in parts_of(config, passes, EAGER, strided=True)] == [range(config.kv_layers)] * len(
        passes
    )
