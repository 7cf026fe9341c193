"""One optimiser step, looked at closely: which schedule it takes, how far AdamW moves, what counts as equal."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, schedules
from lrt.data.prepared import Prepared
from lrt.distributed.objective import make_objective
from lrt.model.size import count_parameters
from lrt.schedules.flops import training_flops
from lrt.schedules.loss import StepLoss
from lrt.training.config import RunConfig
from lrt.training.matching import Comparison, Launch, ReferenceRun, match
from lrt.training.optim import Optimiser
from lrt.training.optim_config import OptimConfig
from lrt.training.recipes import match_parameters
from lrt.training.trainer import Trainer

MODEL = ModelConfig(depth=2, width=32, heads=2, vocab_size=300, context=32, memory=MemoryConfig(source=(0, 2)))
OPTIM = OptimConfig(reference_batch=64, scalar_lr=0.02)


def run_config(schedule: str, steps: int) -> RunConfig:
    return RunConfig(model=MODEL, optim=OPTIM, schedule=schedule, batch_size=2, horizon=f"steps={steps}", seed=3)


@pytest.mark.parametrize(
    "text",
    [
        "stages([(0.5, plain()), (0.25, settled(0, 1, 1)), (0.25, interleaved(2))])",
        "mixture([(0.4, plain()), (0.6, settled(0, 1, 1))])",
    ],
)
def test_step_n_runs_and_counts_the_schedule_of_step_n(data: Prepared, text: str):
    steps = 8
    trainer = Trainer(run_config(text, steps), data, "cpu")
    lines = [trainer.step() for _ in range(steps)]
    trainer.close()
    drawn = [schedules.parse(text).at(step, steps, 3) for step in range(steps)]
    assert len(set(drawn)) > 1
    assert [line["schedule"] for line in lines] == [repr(schedule) for schedule in drawn]
    assert [line["step"] for line in lines] == list(range(steps))
    assert [line["tokens"] for line in lines] == [64 * (step + 1) for step in range(steps)]
    flops = torch.tensor([64 * training_flops(MODEL, schedule, 32) for schedule in drawn], dtype=torch.float64)
    assert [line["flops"] for line in lines] == pytest.approx(flops.cumsum(0).tolist())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_is_the_same_within_somebodys_autocast(data: Prepared, precision: str):
    """autocast would round what is float32, by 2^-9: the products of passes, of the loss, and of Newton-Schulz."""
    run = dataclasses.replace(run_config("settled(1, 1, 1)", 9), precision=precision)
    trainers = [Trainer(run, data, "cpu") for _ in range(2)]
    for _ in range(2):
        line = trainers[0].step()
        with torch.autocast("cpu", torch.bfloat16):
            assert trainers[1].step()["loss"] == line["loss"]
    for trainer in trainers:
        trainer.close()
    for a, b in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_objective_is_the_same_within_somebodys_autocast(dtype: torch.dtype):
    torch.manual_seed(0)
    model = LatentRecurrentTransformer(MODEL)
    tokens = torch.randint(300, (2, 32))
    loss, objective = StepLoss.of(schedules.settled(1, 1, 1), [tokens]), make_objective(model, dtype)
    losses = [objective(loss, tokens, tokens, None)]
    with torch.autocast("cpu", torch.bfloat16):
        losses.append(objective(loss, tokens, tokens, None))
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    assert losses[0].dtype == torch.float32
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_adamw_moves_by_its_rate_however_small_the_gradient():
    """The first step of Adam is the sign of the gradient, down to gradients near ε = 1e-10."""
    torch.manual_seed(0)
    model = LatentRecurrentTransformer(MODEL).double()
    optimiser = Optimiser(model, 768, OPTIM.reference_batch, 10, OPTIM)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {"embedding.weight": 1e-8, "head.weight": -1e-7, "blocks.1.alpha": 1e-6, "blocks.0.beta": 1e-9}
    for name, p in model.named_parameters():
        p.grad = torch.full_like(p, gradients.get(name, 0.0))
    optimiser.step(0)
    rates = {"embedding.weight": 0.3, "head.weight": 0.004, "blocks.1.alpha": 0.01 * 0.02, "blocks.0.beta": 0.02}
    for name, p in model.named_parameters():
        if name in gradients:
            gradient = gradients[name]
            expected = torch.full_like(p, -rates[name] * gradient / (abs(gradient) + 1e-10))
            torch.testing.assert_close(p - before[name], expected, rtol=1e-6, atol=0)


def test_a_run_of_one_step_takes_it_at_the_full_rate():
    optimiser = Optimiser(LatentRecurrentTransformer(MODEL), 32, 64, 1, dataclasses.replace(OPTIM, warmdown=1.0))
    assert [optimiser.fraction(step) for step in (0, 1)] == [1.0, 0.0]


def test_two_quantities_are_equal_within_half_a_percent():
    for there in (1000.0, -1000.0, 3e18):
        assert Comparison("n", 1.0049 * there, there).equal
        assert Comparison("n", 0.9951 * there, there).equal
        assert not Comparison("n", 1.0051 * there, there).equal
        assert not Comparison("n", 0.9949 * there, there).equal
    assert Comparison("n", "a", "a").equal
    assert not Comparison("n", "a", "b").equal
    assert not Comparison("n", 1.0, "1.0").equal


def test_parameters_are_matched_within_half_a_percent_or_not_at_all():
    coarse = dataclasses.replace(MODEL, mlp_width=8)  # 128 parameters per unit of width, 0.5 % of 25,600
    size = count_parameters(coarse)[0]
    for wanted in range(size, size + 2000, 37):
        matched = match_parameters(coarse, wanted)
        assert abs(count_parameters(matched)[0] - wanted) <= 0.005 * wanted
        assert dataclasses.replace(matched, mlp_width=8) == coarse
    with pytest.raises(ValueError, match=r"no MLP width .* within 0\.5 %"):
        match_parameters(coarse, int(size / 1.04))  # narrower than no MLP at all


@pytest.mark.parametrize(("share", "refused"), [(1.004, False), (1.01, True)])
def test_a_model_is_larger_than_its_reference_from_half_a_percent_on(
    data: Prepared, tmp_path: Path, share: float, refused: bool
):
    reference = RunConfig(model=dataclasses.replace(MODEL, mlp_width=1000))
    size, per_unit = count_parameters(reference.model)[0], 2 * MODEL.depth * MODEL.width
    wider = dataclasses.replace(reference.model, mlp_width=1000 + round((share - 1) * size / per_unit))
    arguments = (RunConfig(model=wider), "parameters", ReferenceRun(tmp_path, reference, ""), data, Launch(tmp_path))
    if refused:
        with pytest.raises(ValueError, match="the smaller one is widened"):
            match(*arguments)
    else:
        assert match(*arguments).model.mlp_width == 1000
