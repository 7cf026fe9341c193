"""How a step is computed changes no numbers: compiled or not, recomputed or kept. And it does what it says.

B batch, T positions.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import (
    CORNER,
    LENGTH,
    assert_same,
    assert_same_gradients,
    configuration,
    difference,
    gradients,
    oracle_rows,
    random_model,
    random_tokens,
    unaligned,
    weights_of,
)
from torch import Tensor
from torch._dynamo.utils import counters

from lrt import MemoryConfig, ModelConfig, refine, schedules
from lrt.distributed.objective import make_objective
from lrt.experiments.bench.peak import LiveBytes
from lrt.model.execution import EAGER, WHOLE, Execution
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.loss import StepLoss
from lrt.utils.torch_private import missing_compiler

compiles = pytest.mark.skipif(missing_compiler("cpu") is not None, reason="needs a C++ compiler")
CONFIG = configuration({**CORNER, "value_embeddings": "alternate"})


def batch(rows: int = 2, length: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(CONFIG.vocab_size, (rows, length + 1), generator=generator)
    return text[:, :-1], text[:, 1:]


def step(model: Any, schedule: Any, execution: Execution, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Loss and gradients of one step."""
    tokens, targets = (x.to(model.head.weight.device) for x in batch(length=16))
    model.zero_grad()
    loss = make_objective(model, dtype)(StepLoss.of(schedule, [targets], execution=execution), tokens, targets, None)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**grads, "loss": loss.detach()}


def test_auto_is_for_long_runs():
    never, words = Execution().resolve(999, "cpu")
    assert (never.compile, words) == ("never", "uncompiled passes (999 steps are fewer than 1,000)")
    if missing_compiler("cpu") is None:
        always, words = Execution(recompute="passes").resolve(1000, "cpu")
        assert always == Execution("always", "passes")
        assert words == "compiled passes (1,000 steps are at least 1,000), recomputing passes"
    assert Execution("never").resolve(10**6, "cpu")[1] == "uncompiled passes (compile is never)"
    assert Execution().resolve(10**6, "mps")[0].compile == "never"
    assert Execution("always").resolve(1, "mps")[0].compile == "always"
    for wrong in ({"compile": "sometimes"}, {"recompute": "all"}):
        with pytest.raises(ValueError, match="choose one of"):
            Execution(**wrong)  # type: ignore[arg-type]


# Compiled


@compiles
@pytest.mark.slow  # compiling three sizes of pass in three kinds of block
def test_compiled_passes_equal_the_oracle():
    """Values and gradients of exact schedules in float64: full passes, classes, single positions; packed documents."""
    model, tokens, documents = random_model(CONFIG), random_tokens(), unaligned()
    expected = oracle_rows(model, tokens, documents)
    wanted = gradients(model, expected)
    for schedule in (schedules.interleaved(LENGTH), schedules.sequential()):
        out = refine(model, tokens, schedule, documents, execution=Execution("always"))
        assert_same(out.hidden, expected, repr(schedule))
        assert_same_gradients(gradients(model, out.hidden), wanted, repr(schedule))


@compiles
@pytest.mark.slow
def test_a_mixture_is_compiled_once_and_without_graph_breaks():
    torch._dynamo.reset()
    counters.clear()
    model = random_model(CONFIG)
    mixture = [schedules.interleaved(2), schedules.settled(0, 1, 1)]
    steps = [step(model, s, Execution("always")) for s in mixture]
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    for _, s in zip(range(4), itertools.cycle(mixture), strict=False):
        step(model, s, Execution("always"))
    assert counters["stats"]["unique_graphs"] == compiled
    assert not counters["graph_break"]
    for actual, s in zip(steps, mixture, strict=True):
        assert_same_gradients(actual, step(model, s, EAGER), repr(s))


@pytest.mark.slow
@compiles
def test_sequential_compiles_one_position_not_their_sequence():
    """However long the row: nothing is unrolled in time."""
    model = random_model(CONFIG)

    def graphs(length: int) -> int:
        torch._dynamo.reset()
        counters.clear()
        with torch.no_grad():
            refine(model, random_tokens(length=length), schedules.sequential(), execution=Execution("always"))
        return counters["stats"]["unique_graphs"]

    assert graphs(2) == graphs(12)


ALIKE = ModelConfig(
    depth=2, width=32, heads=2, vocab_size=CONFIG.vocab_size, context=16, value_embeddings="all",
    memory=MemoryConfig(source=(0, 2), projection="layerwise"),
)  # fmt: skip
"""Blocks of one kind, which take one form of each function."""
LAYERED = replace(
    ALIKE,
    depth=3,
    memory=MemoryConfig(
        source=(0, 0, 2), combine="channels", projection="layerwise", layers=((1, 2, 3), (1, 2, 3), (2, 3))
    ),
)
"""Passes share block 1, a free one ends behind block 2, and a first one goes without layer 2's channel."""
BFLOAT16 = 2**-4
"""The most by which a whole gradient in bfloat16 may differ, over its norm: compiled ones from uncompiled ones, as
sums and activations are rounded elsewhere, and either from float32's. Seen: 0.02 to 0.05, of each kind."""


def whole(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for name, g in gradients.items() if name != "loss"])


@compiles
@pytest.mark.parametrize(
    "schedule",
    [
        schedules.settled(1, 1, 1),
        pytest.param(schedules.plain(), marks=pytest.mark.slow),
        pytest.param(schedules.interleaved(2), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_compiled_steps_in_either_precision_equal_uncompiled_ones(schedule: Any):
    """Recomputed or not, which changes no bit."""
    model = random_model(ALIKE, torch.float32)
    exact, rounded = step(model, schedule, EAGER), step(model, schedule, EAGER, torch.bfloat16)
    half = step(model, schedule, Execution("always"), torch.bfloat16)
    assert_same_gradients(step(model, schedule, Execution("always")), exact)
    for other in (rounded, exact):
        assert difference(whole(half), whole(other)) < BFLOAT16
        assert float((half["loss"] - other["loss"]).abs() / other["loss"]) < 2**-7
    assert all(g.dtype == torch.float32 for g in half.values())
    for dtype, recompute in itertools.product((torch.float32, torch.bfloat16), ("blocks", "passes")):
        kept, made_again = (step(model, schedule, Execution("always", r), dtype) for r in ("nothing", recompute))
        for name in kept:
            assert torch.equal(kept[name], made_again[name]), (dtype, recompute, name)


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("schedule", [schedules.settled(1, 1, 1), schedules.interleaved(2)], ids=repr)
def test_compiled_steps_run_only_the_blocks_that_are_needed(schedule: Any):
    model = random_model(LAYERED)
    assert_same_gradients(step(model, schedule, Execution("always")), step(model, schedule, WHOLE))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_steps_on_a_gpu_equal_uncompiled_ones():
    model, schedule = random_model(ALIKE, torch.float32).cuda(), schedules.settled(1, 1, 1)
    for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, BFLOAT16)):
        steps = [step(model, schedule, execution, dtype) for execution in (EAGER, Execution("always"))]
        assert difference(whole(steps[1]), whole(steps[0])) < allowed


@compiles
def test_blocks_of_one_kind_share_a_form_the_first_too():
    """The first is given x_0 as its stream."""

    def graphs(depth: int) -> int:
        torch._dynamo.reset()
        counters.clear()
        model = random_model(replace(ALIKE, depth=depth, memory=MemoryConfig(source=1, projection="shared")))
        with torch.no_grad():
            refine(model, random_tokens(), schedules.plain(), execution=Execution("always"))
        return counters["stats"]["unique_graphs"]

    assert graphs(1) == graphs(3)


# Recomputed


RECOMPUTED = [schedules.interleaved(2), schedules.settled(1, 2, 1), schedules.chunked(5), schedules.sequential(3)]


@pytest.mark.parametrize("recompute", ["blocks", "passes"])
@pytest.mark.parametrize("schedule", RECOMPUTED, ids=repr)
def test_recomputing_changes_nothing(schedule: Any, recompute: Any):
    model = random_model(CONFIG)
    assert_same_gradients(step(model, schedule, Execution("never", recompute)), step(model, schedule, EAGER))


@pytest.mark.parametrize("recompute", ["blocks", "passes"])
@pytest.mark.parametrize("schedule", [schedules.settled(1, 1, 1), schedules.interleaved(2)], ids=repr)
def test_recomputing_only_the_blocks_that_are_needed_changes_nothing(schedule: Any, recompute: Any):
    model = random_model(LAYERED)
    assert_same_gradients(step(model, schedule, Execution("never", recompute)), step(model, schedule, WHOLE))


@pytest.mark.parametrize("recompute", ["blocks", "passes"])
def test_recomputing_under_bfloat16_computes_in_bfloat16(recompute: Any):
    """The weights that `Cast` puts into the model are gone when the backward comes; recomputed are the same bits."""
    model = random_model(CONFIG, torch.float32)
    schedule = schedules.interleaved(2)
    expected = step(model, schedule, EAGER, torch.bfloat16)
    for name, actual in step(model, schedule, Execution("never", recompute), torch.bfloat16).items():
        assert torch.equal(actual, expected[name]), name


MEMORY = ModelConfig(depth=3, width=32, heads=2, vocab_size=CONFIG.vocab_size, context=256)


def peak(schedule: Any, recompute: Any = "nothing") -> int:
    """Bytes alive at most in a step."""
    torch.manual_seed(0)
    model = LatentRecurrentTransformer(MEMORY)
    tokens, targets = batch(2, 256)
    loss = StepLoss.of(schedule, [targets], execution=Execution("never", recompute))
    with LiveBytes() as seen:
        loss(model, tokens, targets, None).backward()
    assert seen.live <= sum(p.numel() * 4 for p in model.parameters()) * 1.1  # gradients stay, activations do not
    return seen.peak


def test_peak_memory_is_what_the_passes_keep():
    plain, interleaved = peak(schedules.plain()), peak(schedules.interleaved(2))
    assert 1.7 < interleaved / plain <= 2.1
    assert peak(schedules.interleaved(2), "passes") / plain <= 1.3
    assert peak(schedules.interleaved(2), "blocks") < peak(schedules.interleaved(2)) / 1.5


def test_passes_without_gradients_keep_nothing():
    """Of a gradient-free pass stays what it leaves to the next pass, which replaces it: many cost what one does."""
    one, many = (peak(schedules.settled(free, 1, 1)) for free in (1, 6))
    assert many == one


def test_weights_of_the_model_are_leaves_again():
    model = random_model(CONFIG, torch.float32)
    step(model, schedules.plain(), Execution("never", "blocks"), torch.bfloat16)
    assert all(p.is_leaf for p in weights_of(model).values())
