"""A model that begins with another's weights computes what the other does, to the bit; and how that can be refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import LENGTH, configuration, gradients, random_model, random_tokens

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, refine, schedules
from lrt.model.upcycle import adopt, begin_with
from lrt.schedules.loss import StepLoss
from lrt.training.optim import Optimiser
from lrt.training.optim_config import OptimConfig

BASE = configuration({"depth": 3, "value_embeddings": "alternate"})
TWO = MemoryConfig(source=(0, 0), combine="channels", projection="layerwise")
STATE = MemoryConfig(source=(0, 0, 2), combine="channels", projection="layerwise", state_start="neutral")
LAYERED = replace(STATE, layers=((1, 2, 3), (1, 2, 3), (2, 3)))
CONVOLUTION = MemoryConfig(source=(0, 0, 0), combine="channels", delay=(1, 2, 3), projection="layerwise")
NONE = MemoryConfig(injection="none")
RESIDUAL = MemoryConfig(injection="residual")
PAIRS = {
    "Transformer to LRT": (NONE, MemoryConfig()),
    "Transformer to channels": (NONE, STATE),
    "Transformer to layers per source": (NONE, LAYERED),
    "Transformer to a sum": (NONE, MemoryConfig(source=(0, 3))),
    "Transformer to the residual stream": (NONE, RESIDUAL),
    "control to LRT": (TWO, STATE),
    "control to layers per source": (TWO, LAYERED),
    "one channel to three": (replace(TWO, source=0, combine="sum"), STATE),
    "shared projections": (replace(TWO, projection="shared"), replace(STATE, projection="shared")),
    "LRT to more of it": (replace(LAYERED, state_start="active"), replace(STATE, source=(0, 0, 2, 3))),
    "residual to both": (replace(TWO, injection="residual"), STATE),
    "convolution to LRT": (CONVOLUTION, replace(CONVOLUTION, source=(0, 0, 0, 2, 2), delay=(1, 2, 3, 1, 3))),
    "token shift to a convolution": (replace(TWO, source=0, combine="sum"), CONVOLUTION),
    "another order of delays": (CONVOLUTION, replace(CONVOLUTION, source=(0, 2, 0, 0), delay=(3, 1, 1, 2))),
    "one delay to the same for each": (replace(STATE, state_start="active"), replace(STATE, delay=(1, 1, 1))),
    "a sum at two delays": (
        MemoryConfig(source=(2, 0), delay=(2, 1)),
        MemoryConfig(source=(2, 0), delay=(2, 1), layers=(1, 2, 3)),
    ),
    "another order": (replace(STATE, state_start="active"), replace(STATE, source=(2, 3, 0, 0))),
}


def begun(theirs: MemoryConfig, ours: MemoryConfig) -> tuple[LatentRecurrentTransformer, LatentRecurrentTransformer]:
    """(the other model, all random, and one that began with it)."""
    other = random_model(replace(BASE, memory=theirs))
    model = LatentRecurrentTransformer(adopt(replace(BASE, memory=ours), other.config)).to(torch.float64)
    begin_with(model, other)
    return other, model


@pytest.mark.parametrize(("theirs", "ours"), PAIRS.values(), ids=PAIRS)
def test_the_new_model_computes_what_the_other_does(theirs: MemoryConfig, ours: MemoryConfig):
    other, model = begun(theirs, ours)
    for schedule in (schedules.plain(), schedules.settled(1, 1, 1), schedules.sequential()):
        both = [refine(m, random_tokens(), schedule).hidden for m in (other, model)]
        torch.testing.assert_close(both[1], both[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("theirs", "ours"), PAIRS.values(), ids=PAIRS)
def test_what_is_new_can_learn(theirs: MemoryConfig, ours: MemoryConfig):
    _, model = begun(theirs, ours)
    hidden = refine(model, random_tokens(), schedules.settled(1, 1, 1)).hidden
    for name, gradient in gradients(model, hidden).items():
        if name.endswith("gamma") or name == "projection.weight":
            assert bool((gradient != 0).all()), name


REFUSED = {
    "another depth": (replace(BASE, depth=2), BASE, ("depth 3", "this one 2", "--model.depth 3")),
    "another width": (replace(BASE, width=24), BASE, ("width 12", "and 24", "--model.width 12")),
    "a lost source": (replace(BASE, memory=MemoryConfig(source=0)), replace(BASE, memory=TWO), ("no place", "(0, 0)")),
    "a lost injection": (
        replace(BASE, memory=RESIDUAL),
        replace(BASE, memory=MemoryConfig()),
        ("residual", "no place"),
    ),
    "another delay": (replace(BASE, memory=replace(TWO, delay=2)), replace(BASE, memory=TWO), ("delay", "1", "2")),
    "other delays": (
        replace(BASE, memory=replace(CONVOLUTION, delay=(1, 2, 4))),
        replace(BASE, memory=CONVOLUTION),
        ("no place", "delay (1, 2, 3)", "delay (1, 2, 4)"),
    ),
    "a sum at other delays": (
        replace(BASE, memory=MemoryConfig(source=(2, 0), delay=(1, 2))),
        replace(BASE, memory=MemoryConfig(source=(2, 0), delay=(2, 1))),
        ("no place", "delay (2, 1)", "delay (1, 2)"),
    ),
    "another projection": (
        replace(BASE, memory=replace(TWO, projection="shared")),
        replace(BASE, memory=TWO),
        ("projection", "layerwise", "shared"),
    ),
    "fewer blocks": (
        replace(BASE, memory=LAYERED),
        replace(BASE, memory=STATE),
        ("memory.layers", "(1, 2, 3)", "(2, 3)"),
    ),
}


@pytest.mark.parametrize(("ours", "theirs", "words"), REFUSED.values(), ids=REFUSED)
def test_models_that_do_not_go_together_are_refused(ours: ModelConfig, theirs: ModelConfig, words: tuple[str, ...]):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        adopt(ours, theirs)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("memory", [STATE, LAYERED], ids=["all blocks", "from block 2"])
def test_an_lrt_with_a_neutral_state_is_its_control_until_recurrence_is_switched_on(memory: MemoryConfig):
    """From the same weights, steps under `plain()` give the same losses. Not to the last bit: Muon orthogonalises gates
    of one more channel, whose rows are zero."""
    losses: list[list[float]] = []
    torch.manual_seed(3)
    control, late = (LatentRecurrentTransformer(replace(BASE, memory=own)).double() for own in (TWO, memory))
    begin_with(late, control)
    for model in (control, late):
        optimiser = Optimiser(model, BASE.width, 1, 8, OptimConfig(reference_batch=1))
        tokens = random_tokens(length=LENGTH)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        losses.append([])
        for step in range(8):
            loss = StepLoss.of(schedules.late(1.0, schedules.settled(0, 1, 1)).at(step, 8, 0), [targets])
            value = loss(model, inputs, targets, None)
            value.backward()
            optimiser.step(step)
            losses[-1].append(float(value.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)
    assert losses[0][-1] < losses[0][0] - 0.1
