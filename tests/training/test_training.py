"""Training as people rely on it: horizons, precision, clipping, live scores on the way, divergence, the log."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, schedules
from lrt.data.prepared import Prepared
from lrt.data.windows import windows
from lrt.eval.scoring import evaluate
from lrt.model import checkpoint
from lrt.model.checkpoint import snapshot_path, snapshots
from lrt.model.size import count_parameters
from lrt.schedules.flops import forward_flops, training_flops
from lrt.schedules.loss import StepLoss
from lrt.training import loggers, recipes
from lrt.training.config import EvalConfig, Horizon, RunConfig, SnapshotConfig
from lrt.training.loop import throughput, train
from lrt.training.monitor import PATIENCE, gap_warning, has_exploded, memory_weight
from lrt.training.optim import Optimiser
from lrt.training.optim_config import OptimConfig
from lrt.training.resume import resume
from lrt.training.trainer import Diverged, Trainer
from lrt.utils import imports
from lrt.utils.device import known_peak

MEMORY = MemoryConfig(source=(0, 2), combine="channels", initial="embedding")


SETTLED = schedules.settled(0, 1, 1)


def run_config(**fields: Any) -> RunConfig:
    """64-token steps of a tiny LRT, 8 of them unless said."""
    model = ModelConfig(depth=2, width=32, heads=2, vocab_size=300, context=32, memory=MEMORY)
    optim = OptimConfig(reference_batch=64, scalar_lr=0.02)
    defaults = {"model": model, "optim": optim, "schedule": "settled(0, 1, 1)", "batch_size": 2, "horizon": "steps=8"}
    return RunConfig(**{**defaults, **fields})


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path)[0].state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# The horizon and the FLOPs


def test_a_horizon_in_every_unit():
    run = run_config(schedule="plain()", horizon="steps=7")
    total, dense = count_parameters(run.model)
    assert run.steps == 7
    assert run.tokens == 7 * 64
    assert replace(run, horizon="tokens=65").steps == 2  # whole steps
    assert run.weights == dense + 300 * 32 == total - 300 * 32  # all but the embedding
    assert replace(run, horizon="ratio=10").steps == math.ceil(10 * run.weights / 64)
    wanted = 1000 * 64 * run.flops_per_token
    planned = replace(run, horizon=f"flops={wanted}")
    assert planned.steps == 1000
    assert planned.flops == pytest.approx(wanted)


@pytest.mark.parametrize("text", ["", "10", "epochs=3", "tokens=", "tokens=-1", "ratio=0", "flops=inf", "steps=x"])
def test_a_bad_horizon_names_itself_and_the_units(text: str):
    with pytest.raises(ValueError, match="steps=…, tokens=…, ratio=…, flops=…") as caught:
        Horizon.parse(text)
    assert repr(text) in str(caught.value)


def test_training_flops_count_every_pass_and_no_idle_head():
    """Trap 4 of spec, section 5: published counts leave the extra passes out, which halves the LRT's apparent cost."""
    config = run_config().model
    stack, head = forward_flops(config, 32)
    cost = {text: training_flops(config, schedules.parse(text), 32) for text in SCHEDULE_COSTS}
    for text, (forwards, heads) in SCHEDULE_COSTS.items():
        assert cost[text] == pytest.approx(forwards * stack + heads * head), text
    plain, twice = (run_config(schedule=s, horizon="flops=1e11").steps for s in ("plain()", "interleaved(2)"))
    assert twice == pytest.approx(plain / 2, rel=0.01)  # the same compute buys half the steps


def test_training_flops_of_a_pass_that_ends_at_its_source():
    """With source 1 of 2 a free pass is half the blocks, and the projections of that half: counted by hand."""
    run = run_config()
    memory = MemoryConfig(source=(0, 1), combine="channels", projection="layerwise")
    config = replace(run.model, depth=2, memory=memory)
    sizes = {name: p.numel() for name, p in LatentRecurrentTransformer(config).named_parameters()}
    stack, head = forward_flops(config, 32)
    attention = 4 * config.width * 33 / 2
    half = 2 * (sum(n for name, n in sizes.items() if name.startswith("blocks.0.")) + sizes["projection.weight"] / 2)
    embeddings = 2 * sum(n for name, n in sizes.items() if "value_embedding.table" in name and "blocks.0." in name)
    unwritten = 2 * sizes["projection.weight"] / 4  # the first pass goes without layer 1's channel, which is zeros
    expected = 2 * (half - embeddings + attention) - unwritten + 3 * (stack + head)
    assert training_flops(config, schedules.settled(1, 1, 1), 32) == pytest.approx(expected, rel=1e-3)


SCHEDULE_COSTS = {
    "plain()": (3, 3),
    "interleaved(2)": (6, 6),
    "multi_refinement(3)": (12, 12),
    "settled(0, 1, 1)": (4, 3),
    "settled(1, 8, 2)": (1 + 1 + 6, 6),
    "chunked(8)": (3, 3),
    "mixture([(0.25, plain()), (0.75, interleaved(2))])": (0.25 * 3 + 0.75 * 6, 0.25 * 3 + 0.75 * 6),
    "stages([(0.5, plain()), (0.5, settled(0, 1, 1))])": (3.5, 3),
}


# The ladder


def test_the_ladder_has_the_published_rates():
    run = recipes.RECIPES["d12"]()
    assert (run.model.depth, run.model.width, run.model.heads, run.model.context) == (12, 768, 6, 2048)
    assert run.batch_tokens == 524288
    model = LatentRecurrentTransformer(replace(run.model, vocab_size=64, width=64, heads=2, depth=1, memory=MEMORY_1))
    optimiser = Optimiser(model, run.model.width, run.batch_tokens, run.steps, run.optim)
    assert rates(optimiser) == {0.02, 0.3, 0.004, 0.5, 0.005}
    wide = Optimiser(model, 1280, 524288 // 4, 100, run.optim)  # the width's and the batch's factor
    breadth = (1280 / 768) ** -0.5
    expected = {0.02 / 2, 0.3 * breadth / 2, 0.004 * breadth / 2, 0.5 / 2, 0.005 / 2}
    assert {round(r, 12) for r in rates(wide)} == {round(r, 12) for r in expected}
    assert run.optim.weight_decay == pytest.approx(0.2)
    assert recipes.RECIPES["d24"]().optim.weight_decay == pytest.approx(0.05)


MEMORY_1 = MemoryConfig(source=(0, 1), combine="channels")


def rates(optimiser: Optimiser) -> set[float]:
    return {rate for part in optimiser.rates for rate in part}


def test_rates_fall_over_the_last_half_and_decay_to_zero():
    model = LatentRecurrentTransformer(run_config().model)
    optimiser = Optimiser(model, 768, 524288, 1000, OptimConfig(weight_decay=0.2))
    assert [optimiser.fraction(step) for step in (0, 500, 750, 1000)] == [1.0, 1.0, 0.5, 0.0]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step(500)
    assert {g["weight_decay"] for g in optimiser.muon.param_groups} == {0.1}
    assert {g["momentum"] for g in optimiser.muon.param_groups} == {0.95}


def test_one_dial_sets_every_rung():
    for layers in recipes.LADDER:
        run = recipes.RECIPES[f"d{layers}"]()
        assert run.model.width == 64 * layers
        assert run.micro_batches(1) * min(run.device_batch or 0, run.batch_size) == run.batch_size
        for ranks in (1, 2, 4, 8):
            if run.batch_size % ranks == 0:
                assert run.micro_batches(ranks) >= 1
        families = [recipes.RECIPES[f"d{layers}{family}"]() for family in ("", "-transformer", "-token-shift")]
        for other in families:  # spec, section 5, trap 5: a baseline has the same value embeddings
            assert other.model.value_embeddings == "all"
            assert replace(other.model, memory=run.model.memory) == run.model
            assert (other.optim, other.batch_size, other.seed) == (run.optim, run.batch_size, run.seed)
    sizes = {
        layers: count_parameters(replace(recipes.depth_recipe(layers, "transformer").model, vocab_size=32768))[0]
        for layers in (20, 24)
    }
    assert sizes[20] == pytest.approx(1.3e9, rel=0.03)  # the paper's two
    assert sizes[24] == pytest.approx(2.1e9, rel=0.06)


# Precision, clipping


@pytest.mark.parametrize("schedule", ["plain()", "interleaved(2)", "settled(1, 4, 1)", "strided(4, 2)", "chunked(8)"])
def test_bfloat16_passes_train_float32_weights(data: Prepared, schedule: str):
    losses = {}
    for precision in ("float32", "bfloat16"):
        trainer = Trainer(run_config(precision=precision, schedule=schedule), data, "cpu")
        losses[precision] = [trainer.step()["loss"] for _ in range(4)]
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        states = [v for part in trainer.optimiser.parts for s in part.state.values() for v in s.values()]
        assert all(v.dtype == torch.float32 for v in states if isinstance(v, torch.Tensor))
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"][-1] < losses["bfloat16"][0]


@pytest.mark.parametrize("schedule", ["interleaved(2)", "settled(0, 1, 1)"])
def test_gradients_of_bfloat16_passes_are_float32s_within_its_rounding(data: Prepared, schedule: str):
    start: dict[str, torch.Tensor] = {}
    gradients = {}
    for precision in ("float32", "bfloat16"):
        trainer = Trainer(run_config(precision=precision, schedule=schedule), data, "cpu")
        for _ in range(3):  # zero-initialised outputs hide most gradients at first
            trainer.step()
        trainer.optimiser.step = lambda step: 1.0  # type: ignore[method-assign]  # keeps the gradients
        start = start or trainer.model.state_dict()
        trainer.model.load_state_dict(start)
        trainer.step()
        gradients[precision] = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert gradients["bfloat16"].dtype == torch.float32
    error = (gradients["bfloat16"] - gradients["float32"]).norm() / gradients["float32"].norm()
    assert 1e-4 < error < 0.05


def test_clipping_scales_the_whole_gradient_down(data: Prepared):
    free, held = (
        Trainer(run_config(optim=replace(run_config().optim, clip=clip)), data, "cpu") for clip in (None, 1e-3)
    )
    norms = []
    for trainer in (free, held):
        trainer.optimiser.step = lambda step: 1.0  # type: ignore[method-assign]
        norms.append(trainer.step()["gradient_norm"])
    assert norms[0] == norms[1] > 1e-3  # reported as it was
    left = [
        math.sqrt(sum(float(p.grad.square().sum()) for p in s.model.parameters() if p.grad is not None))
        for s in (free, held)
    ]
    assert left[0] == pytest.approx(norms[0], rel=1e-5)
    assert left[1] == pytest.approx(1e-3, rel=1e-3)
    with pytest.raises(ValueError, match="clip is 0"):
        OptimConfig(clip=0)


# Evaluation


def test_live_scores_on_the_way_change_nothing_that_is_trained(data: Prepared, tmp_path: Path):
    train(run_config(), data, tmp_path / "plain", progress=False)
    train(run_config(), data, tmp_path / "evaluated", progress=False, evaluation=EvalConfig(every=3, targets=500))
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "evaluated"))
    lines = read_log(tmp_path / "evaluated")
    scored = [line["step"] for line in lines if "live_bpb" in line]
    assert scored == [2, 5, 7]  # after every third step, and at the end
    last = lines[-1]
    assert last["gap"] == last["live_bpb"] - last["parallel_bpb"]
    assert last["memory_gamma"] > 0
    assert last["memory_projection"] > 0
    scores = checkpoint.about(tmp_path / "evaluated")["scores"]  # of the whole split: it has fewer than 50,000 tokens
    model, tokenizer = checkpoint.load(tmp_path / "evaluated")
    whole = windows(data.split("val"), 32, None)
    assert scores["live_bpb"] == pytest.approx(evaluate(model, whole, tokenizer.token_bytes(), SETTLED).live_bpb)
    best = min(line["live_bpb"] for line in lines if "live_bpb" in line)
    assert checkpoint.about(tmp_path / "evaluated" / "best")["scores"]["live_bpb"] == best
    assert not (tmp_path / "plain" / "best").exists()


def test_best_is_the_best_not_the_last(data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scripted = iter([3.0, 2.0, 2.5, 2.6, 2.7])  # the last for the result

    def scores(*_: Any) -> dict[str, float]:
        value = next(scripted)
        return {"live_bpb": value, "parallel_bpb": value, "gap": 0.0}

    monkeypatch.setattr("lrt.training.loop.live_scores", scores)
    train(run_config(), data, tmp_path, progress=False, evaluation=EvalConfig(every=2))
    about = checkpoint.about(tmp_path / "best")
    assert about["scores"]["live_bpb"] == 2.0
    assert about["trained"]["tokens"] == 4 * 64


def test_a_growing_gap_is_warned_of():
    lines = [{"gap": 0.002}, {}, {"gap": 0.001}]
    assert gap_warning(lines) is None
    warning = gap_warning([*lines, {"gap": 0.0115}])
    assert warning is not None
    assert "+0.0115" in warning
    assert "settled(1, 1, 1)" in warning
    assert (
        gap_warning([{"gap": -0.05}, {"gap": 0.004}]) is None
    )  # live better than parallel is no reason to worry later
    assert gap_warning([]) is None


def test_what_the_memory_weighs():
    model = LatentRecurrentTransformer(run_config().model)
    assert memory_weight(model)["memory_gamma"] == pytest.approx(0.1)
    assert memory_weight(model)["memory_projection"] == pytest.approx(1 / math.sqrt(32), rel=0.1)
    assert memory_weight(LatentRecurrentTransformer(ModelConfig(memory=MemoryConfig(injection="none")))) == {}


@pytest.mark.parametrize(("field", "value"), [("every", -1), ("targets", 0)])
def test_the_eval_config_is_checked(field: str, value: int):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        EvalConfig(**{field: value})


# Divergence


@pytest.mark.parametrize("last", [1, 2])
def test_spoilt_weights_stop_the_run_with_a_snapshot_from_before(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
):
    """The update of step 5 spoils the weights, the snapshot after it keeps them, and step 6 finds out."""
    update = Optimiser.step

    def spoilt(self: Optimiser, step: int) -> float:
        fraction = update(self, step)
        if step == 5:
            self.muon.param_groups[0]["params"][0].data.fill_(math.inf)
        return fraction

    with monkeypatch.context() as patch:
        patch.setattr(Optimiser, "step", spoilt)
        with pytest.raises(Diverged, match=r"loss at step 6 is nan.*optim\.clip.*--resume .*step-00000005"):
            train(run_config(), data, tmp_path, progress=False, snapshots=SnapshotConfig(every=1, last=last))
    report = json.loads((tmp_path / "diverged.json").read_text())
    assert report["snapshot"] == str(snapshot_path(tmp_path, 5))
    assert [line["step"] for line in report["last"]] == [0, 1, 2, 3, 4, 5]
    again = Trainer(run_config(), data, "cpu")
    resume(again, tmp_path, report["snapshot"])
    assert math.isfinite(again.step()["loss"])


def test_without_a_snapshot_from_before_the_report_says_so(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    poisoned(monkeypatch, at=5)
    with pytest.raises(Diverged, match="there is no snapshot from before"):
        train(run_config(), data, tmp_path, progress=False)
    assert json.loads((tmp_path / "diverged.json").read_text())["snapshot"] is None
    assert snapshots(tmp_path) == []  # the weights gave a loss that is none


def test_a_gradient_that_is_not_finite_leaves_a_snapshot(data: Prepared, tmp_path: Path, monkeypatch):
    reference = Trainer(run_config(), data, "cpu")
    for _ in range(5):
        reference.step()
    calls = iter(range(10**6))
    monkeypatch.setattr("lrt.training.trainer.clip_gradients", lambda *_: math.inf if next(calls) == 5 else 1.0)
    with pytest.raises(Diverged, match=r"gradient at step 5 is inf.*step-00000005"):
        train(run_config(), data, tmp_path, progress=False)
    assert same(weights(snapshots(tmp_path)[-1]), reference.model.state_dict())


def poisoned(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The loss of step `at` is NaN, as an overflow would make it."""
    call, calls = StepLoss.__call__, iter(range(10**6))

    def share(self: StepLoss, *arguments: Any) -> torch.Tensor:
        loss = call(self, *arguments)
        return loss * math.nan if next(calls) == at else loss

    monkeypatch.setattr(StepLoss, "__call__", share)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(data: Prepared, monkeypatch: pytest.MonkeyPatch):
    trainer = Trainer(run_config(), data, "cpu")
    trainer.step()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    next(trainer.model.parameters()).register_hook(lambda grad: grad * math.inf)
    with pytest.raises(Diverged, match="gradient at step 1"):
        trainer.step()
    assert same(before, trainer.model.state_dict())
    assert trainer.progress.step == 1


def test_an_exploding_loss_stops_the_run(data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = [{"loss": 5.0}] * 3
    assert not has_exploded([*lines, *[{"loss": 6.5}] * PATIENCE], vocab_size=300)  # ln 300 = 5.70
    assert has_exploded([*lines, *[{"loss": 6.8}] * PATIENCE], vocab_size=300)
    assert not has_exploded([*lines, *[{"loss": 6.8}] * (PATIENCE - 1)], vocab_size=300)
    assert not has_exploded([], vocab_size=300)
    step = Trainer.step

    def worse(self: Trainer) -> dict[str, Any]:
        line = step(self)
        return {**line, "loss": line["loss"] + 9.0 * (line["step"] >= 8)}

    run = run_config(horizon="steps=30")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", worse)
        with pytest.raises(Diverged, match=r"loss at step 12 is .*worse than knowing nothing"):
            train(run, data, tmp_path, progress=False, snapshots=SnapshotConfig(every=1, last=50))
    good = json.loads((tmp_path / "diverged.json").read_text())["snapshot"]
    assert good == str(snapshot_path(tmp_path, 7))  # what step 8 computed with was spoilt: the weights after 8 updates
    assert snapshots(tmp_path)[-1] == snapshot_path(tmp_path, 7)
    again = Trainer(run, data, "cpu")
    resume(again, tmp_path, good)
    assert again.step()["loss"] < math.log(300)


# Going on


def test_a_finished_run_is_not_trained_again(data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, first = train(run_config(), data, tmp_path, progress=False)
    before, lines = weights(tmp_path), read_log(tmp_path)
    monkeypatch.setattr(Trainer, "step", None)
    model, again = train(run_config(), data, tmp_path, progress=False)
    assert again == first
    assert same(before, model.state_dict())
    assert read_log(tmp_path) == lines
    with pytest.raises(ValueError, match=r"is of another run .*seed: 0 there, 1 here.*--resume never"):
        train(run_config(seed=1), data, tmp_path, progress=False)


def test_going_on_from_a_snapshot_with_other_rates(data: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trainer = Trainer(run_config(), data, "cpu")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(trainer.step()) + "\n" for _ in range(4)))
    trainer.save(snapshot_path(tmp_path, 4), {})
    trainer.step()
    trainer.save(snapshot_path(tmp_path, 5), {})
    gentle = run_config(optim=replace(run_config().optim, matrix_lr=0.001), horizon="steps=12")
    other = Trainer(gentle, data, "cpu")
    lines = resume(other, tmp_path, str(snapshot_path(tmp_path, 4)))
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert other.progress.step == 4
    assert "matrix_lr" in capsys.readouterr().err
    assert snapshots(tmp_path) == [snapshot_path(tmp_path, 4)]  # the later one is of a path not taken
    other.step()
    assert other.optimiser.muon.param_groups[0]["lr"] == pytest.approx(0.001)
    with pytest.raises(ValueError, match="another run"):
        resume(Trainer(replace(gentle, seed=5), data, "cpu"), tmp_path, str(snapshot_path(tmp_path, 4)))
    narrow = replace(gentle, model=replace(gentle.model, width=16))
    with pytest.raises(ValueError, match="another architecture"):
        resume(Trainer(narrow, data, "cpu"), tmp_path, str(snapshot_path(tmp_path, 4)))


def stopped(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """A SIGTERM during step `at`."""
    step = Trainer.step

    def stopping(self: Trainer) -> dict[str, Any]:
        if self.progress.step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(Trainer, "step", stopping)


def test_a_fresh_start_that_is_interrupted_goes_on_itself(data: Prepared, tmp_path: Path, monkeypatch):
    """Not with the old run's result, although that has the same settings."""
    train(run_config(), data, tmp_path, progress=False)
    old = weights(tmp_path)
    (tmp_path / "diverged.json").write_text("{}")
    with monkeypatch.context() as patch:
        stopped(patch, at=3)
        with pytest.raises(KeyboardInterrupt):
            train(run_config(), data, tmp_path, progress=False, resume_from="never")
    assert [p.name for p in snapshots(tmp_path)] == ["step-00000004"]
    assert not (tmp_path / "checkpoint").exists()
    assert not (tmp_path / "diverged.json").exists()
    assert same(weights(tmp_path / "checkpoint.old"), old)
    _, trained = train(run_config(), data, tmp_path, progress=False)
    assert same(weights(tmp_path), old)
    assert trained.tokens == 8 * 64


def test_a_longer_horizon_from_a_finished_run_goes_on_after_an_interruption(
    data: Prepared, tmp_path: Path, monkeypatch
):
    train(run_config(), data, tmp_path, progress=False)
    longer = run_config(horizon="steps=14")
    with monkeypatch.context() as patch:
        stopped(patch, at=10)
        with pytest.raises(KeyboardInterrupt):
            train(longer, data, tmp_path, progress=False, resume_from=str(tmp_path / "checkpoint"))
    for source in ("auto", str(tmp_path / "checkpoint")):
        trainer = Trainer(longer, data, "cpu")
        resume(trainer, tmp_path, source)
        assert trainer.progress.step == 11
    train(longer, data, tmp_path, progress=False)
    assert checkpoint.about(tmp_path)["trained"]["tokens"] == 14 * 64
    monkeypatch.setattr(Trainer, "step", None)
    train(longer, data, tmp_path, progress=False)  # finished: nothing is done again


def test_a_request_to_stop_during_the_last_save_loses_nothing(data: Prepared, tmp_path: Path, monkeypatch):
    save = Trainer.save

    def interrupted(self: Trainer, path: Path, about: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(self, path, about)

    monkeypatch.setattr(Trainer, "save", interrupted)
    train(run_config(), data, tmp_path, progress=False)
    assert checkpoint.about(tmp_path)["trained"]["tokens"] == 8 * 64


def test_a_snapshot_that_cannot_be_saved_is_warned_of_and_tried_again(
    data: Prepared, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    save, calls = checkpoint.save, iter(range(100))

    def full(*arguments: Any) -> None:
        if next(calls) == 1:
            raise OSError("cannot save: no space left")
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save", full)
    train(run_config(), data, tmp_path, progress=False, snapshots=SnapshotConfig(every=2))
    assert "no space left. Going on; the next try is 2 steps from here" in capsys.readouterr().err
    assert len(read_log(tmp_path)) == 8


def test_what_killed_saves_left_is_cleared_and_a_damaged_line_is_left_out(
    data: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    trainer = Trainer(run_config(), data, "cpu")
    lines = [json.dumps(trainer.step()) for _ in range(3)]
    trainer.save(snapshot_path(tmp_path, 3), trainer.about(1.0))
    lines[1] = lines[1][:20]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "snapshots" / ".step-00000002.saving-99").mkdir()
    (tmp_path / ".metrics.jsonl.saving-99").write_text("{}")
    train(run_config(), data, tmp_path, progress=False)
    assert not list(tmp_path.rglob("*.saving-*"))
    assert "line 2 is damaged" in capsys.readouterr().err
    assert [line["step"] for line in read_log(tmp_path)] == [0, 2, 3, 4, 5, 6, 7]


def test_another_architecture_is_said_field_by_field(data: Prepared, tmp_path: Path):
    train(run_config(), data, tmp_path, progress=False)
    other = run_config(model=replace(run_config().model, mlp_ratio=3.0))
    with pytest.raises(ValueError, match=r"another architecture \(model\.mlp_ratio: 4\.0 there, 3\.0 here\); choose"):
        train(other, data, tmp_path, progress=False)
    with pytest.raises(ValueError, match="holds prepared data, not a checkpoint"):
        checkpoint.verify(data.path)


@pytest.mark.parametrize(
    "field",
    [{"reference_batch": 0}, {"matrix_lr": -1.0}, {"head_lr": math.nan}, {"weight_decay": -1.0}, {"momentum": (0.9,)},
     {"momentum": (0.5, 3.0)}, {"momentum_steps": -5}],
)  # fmt: skip
def test_rates_are_checked(field: dict[str, Any]):
    (name,) = field
    with pytest.raises(ValueError, match=f"{name} is"):
        OptimConfig(**field)


def test_peaks_are_of_whole_names():
    assert known_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert known_peak("NVIDIA H100 NVL") == 835e12
    assert known_peak("NVIDIA L40") == 181e12
    assert known_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert known_peak("NVIDIA RTX A1000") is None


def test_mfu_is_of_the_steps_own_passes_over_all_ranks(data: Prepared, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("lrt.training.loop.peak_flops", lambda _: 1e12)
    trainer = Trainer(run_config(), data, "cpu")
    trainer.ranks = replace(trainer.ranks, ranks=4)
    speed = throughput(trainer, [{"seconds": 3.0, "flops": 1e12}], {"seconds": 5.0, "flops": 9e12})
    assert speed == {"mfu": pytest.approx(8e12 / 2.0 / 4e12), "tokens_per_second": 32}


def test_a_damaged_validation_split_is_found_before_the_first_step(data: Prepared, tmp_path: Path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(data.path, copy)
    shard = copy / "val.00000.tokens.npy"
    shard.write_bytes(shard.read_bytes()[:-2])
    monkeypatch.setattr(Trainer, "step", None)
    with pytest.raises(ValueError, match=shard.name):
        train(run_config(), Prepared.open(copy), tmp_path / "out", progress=False, evaluation=EvalConfig())


# Loggers


def test_tensorboard_gets_every_number(data: Prepared, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    evaluation = EvalConfig(every=4, targets=300)
    train(run_config(), data, tmp_path, progress=False, evaluation=evaluation, log_to=("tensorboard",))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = read_log(tmp_path)
    for name in ("loss", "gradient_norm", "live_bpb", "gap", "memory_gamma"):
        expected = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines if name in line]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected
    assert "schedule" not in events.Tags()["scalars"]


def test_an_unknown_logger_or_a_missing_package_is_named(data: Prepared, tmp_path: Path):
    with pytest.raises(ValueError, match="cannot log to mlflow"):
        train(run_config(), data, tmp_path / "run", log_to=("mlflow",))
    assert not (tmp_path / "run").exists()  # before any work
    with (
        pytest.raises(ValueError, match="cannot log to mlflow; choose among tensorboard, wandb, trackio"),
        loggers.open_loggers(["mlflow"], tmp_path, {}, 0),
    ):
        pass
    with pytest.raises(
        ValueError, match=r"logging to it needs the package nothing_of_that_name.*latent-recurrent-transformer\[wandb\]"
    ):
        imports.optional_module("nothing_of_that_name", "wandb", "logging to it")


def test_every_logger_is_closed_when_a_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []

    class Notebook:
        def __init__(self, out: Path, settings: dict[str, Any], step: int) -> None:
            calls.append(("opened", settings, step))

        def log(self, step: int, numbers: Any) -> None:
            calls.append((step, dict(numbers)))

        def close(self) -> None:
            calls.append("closed")

    monkeypatch.setitem(loggers.LOGGERS, "notebook", Notebook)

    def interrupted() -> None:
        with loggers.open_loggers(["notebook"], tmp_path, {"a": 1}, 3) as log:
            log(3, {"loss": 1.5, "schedule": "plain()"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert calls == [("opened", {"a": 1}, 3), (3, {"loss": 1.5}), "closed"]
