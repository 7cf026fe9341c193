"""One promise: a run on several ranks is the run on one. Two gloo processes are started for real, once for most cases.

This file is also the program that they run: `main` writes what rank 0 found, and the tests compare it with one process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import CONTEXT, LAYERED, ROWS, STEPS, SUMMED, losses, prepare_squares, run_two, small_run
from torch import Tensor

from lrt.data.prepared import Prepared
from lrt.distributed.single_process import SINGLE_PROCESS, SingleProcess, clip_gradients
from lrt.model import checkpoint
from lrt.model.checkpoint import snapshots
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.training import matching
from lrt.training.config import RunConfig
from lrt.training.loop import train
from lrt.training.optim import Muon
from lrt.training.precision import resolve_precision
from lrt.training.trainer import Trainer

SCHEDULES = {
    "plain": "plain()",
    "interleaved": "interleaved(2)",
    "multi_refinement": "multi_refinement(2)",
    "mixture": "mixture([(0.5, interleaved(2)), (0.5, settled(0, 1, 1))])",
    "late": "late(0.5, settled(1, 1, 1))",
}
MEMORIES = {"late": LAYERED}
CASES = [(parallel, name) for parallel in ("ddp", "fsdp") for name in SCHEDULES] + [("fsdp-reshard", "mixture")]
HALF, LATER = 6, 9
"""Where the run on one rank is saved, and where two ranks that went on from there save again."""


def run_config(schedule: str, device_batch: int | None = 1) -> RunConfig:
    return small_run(SCHEDULES[schedule], device_batch, MEMORIES.get(schedule, SUMMED))


def moments(session: Trainer) -> dict[str, Tensor]:
    """All of the optimisers' state, whole, by parameter's name. All ranks call it."""
    found: dict[str, Tensor] = {}
    for name, parameter in session.model.named_parameters():
        for part in session.optimiser.parts:
            for key, value in part.state.get(parameter, {}).items():
                found[f"{name} {key}"] = session.ranks.full_tensor(value).clone()  # steps go on in place
    return found


# What the two processes run


def muon_and_clip(ranks: SingleProcess) -> dict[str, Any]:
    """Largest difference of three sharded updates to unsharded ones, in float64; and of norm and clipped gradients."""
    config = replace(run_config("plain").model, heads=2, mlp_width=37)  # rows that two ranks cannot share evenly
    models, parts, worst = [], [], 0.0
    for group in (SINGLE_PROCESS, ranks):
        torch.manual_seed(5)
        model = LatentRecurrentTransformer(config).double()
        group.parallelise(model)
        matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and "embedding" not in name]
        models.append(model)
        parts.append(Muon(matrices, lr=0.1, weight_decay=0.3, ranks=group))
    generator = torch.Generator().manual_seed(6)
    for _ in range(3):
        for mine, other in zip(*(model.parameters() for model in models), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator, dtype=torch.float64)
            other.grad = ranks.shard_like(mine.grad.clone(), other)
        gradients = torch.cat([p.grad.flatten() for p in models[0].parameters() if p.grad is not None])
        norms = [
            float(clip_gradients(model, 2.0, group))
            for model, group in zip(models, (SINGLE_PROCESS, ranks), strict=True)
        ]
        worst = max(worst, *(abs(norm - float(gradients.norm())) for norm in norms))
        for mine, other in zip(*(model.parameters() for model in models), strict=True):
            assert mine.grad is not None
            assert other.grad is not None
            worst = max(worst, float((mine.grad - ranks.full_tensor(other.grad)).abs().max()))
        for part in parts:
            part.step()
    weights = zip(models[0].parameters(), models[1].parameters(), strict=True)
    worst = max(worst, *(float((a - ranks.full_tensor(b)).abs().max()) for a, b in weights))
    return {"worst": worst, "norm": norms[0]}


def in_bfloat16(ranks: SingleProcess, data: Prepared) -> list[float]:
    """The losses of float32 weights that compute in bfloat16; equal micro-batches, so that equal sums are rounded."""
    run = replace(run_config("mixture", 2), precision="bfloat16")
    return losses(Trainer(run, data, "cpu", ranks), STEPS)


def resuming(ranks: SingleProcess, data: Prepared, folder: Path, kind: str) -> dict[str, Any]:
    """Two ranks go on from a snapshot of one rank, save, and go on from that."""
    run = run_config("mixture")
    session = Trainer(run, data, "cpu", ranks)
    session.restore(folder / "one")
    if ranks.first:
        torch.save(session.progress.step, folder / f"{kind}-step.pt")
    begun = moments(session)
    first = losses(session, LATER)
    session.save(folder / f"two-{kind}", {})
    state = moments(session)
    after = losses(session, 12)
    again = Trainer(run, data, "cpu", ranks)
    again.restore(folder / f"two-{kind}")
    identical = losses(again, 12) == after
    pairs = zip(session.model.parameters(), again.model.parameters(), strict=True)
    identical = identical and all(torch.equal(ranks.full_tensor(a), ranks.full_tensor(b)) for a, b in pairs)
    if ranks.first:
        torch.save((begun, state), folder / f"moments-{kind}.pt")
    return {"losses": first + after, "identical": identical}


def stopped(ranks: SingleProcess, data: Prepared, out: Path) -> dict[str, Any]:
    """SIGTERM, twice, to rank 1 alone before step 5; then the run goes on to its end."""
    step = Trainer.step

    def watched(self: Trainer) -> dict[str, Any]:
        if self.progress.step == 5 and ranks.rank == 1:
            for _ in range(2):  # a scheduler's, and torchrun's
                os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    Trainer.step = watched
    try:
        train(run_config("interleaved"), data, out, progress=False, ranks=ranks)
        raise AssertionError("nobody stopped")
    except KeyboardInterrupt:
        found = [path.name for path in snapshots(out)]
    finally:
        Trainer.step = step
    model, done = train(run_config("interleaved"), data, out, progress=False, ranks=ranks)
    whole = ranks.weights(model)
    saved, _ = checkpoint.load(out)
    same = not ranks.first or all(torch.equal(whole[name], p) for name, p in saved.state_dict().items())
    alone = ranks.gathered_model(model)
    if ranks.first:  # the others have no part in this
        tokens = torch.arange(8)[None]
        with torch.no_grad():
            hidden, expected = (m(tokens, range(8), m.empty_state(1, 8))[0] for m in (alone, saved.train()))
        same = same and torch.equal(hidden, expected)
    return {"snapshots": found, "same": same, "tokens": done.tokens, "lines": len(read_losses(out))}


def failing(ranks: SingleProcess) -> str:
    """What rank 0 is told of a failure of rank 1."""
    try:
        with ranks.collective():
            if ranks.rank == 1:
                raise OSError("the disk is full")
    except OSError as error:
        return str(error)
    return "nothing"


def refused(ranks: SingleProcess, data: Prepared) -> str:
    try:
        Trainer(replace(run_config("plain"), batch_size=6, device_batch=2), data, "cpu", ranks)
    except ValueError as error:
        return str(error)
    return "nothing"


def agreed(ranks: SingleProcess, data: Prepared, folder: Path) -> float:
    """How many ranks take bfloat16, where it is faster by the clock of the first and slower by the other's."""
    real = matching.seconds_per_token
    matching.seconds_per_token = lambda trainer: 1.0 + (trainer.run.precision == ("float32", "bfloat16")[ranks.rank])
    try:
        run, _ = resolve_precision(replace(run_config("plain"), precision="auto"), data, folder / "none", ranks)
    finally:
        matching.seconds_per_token = real
    return ranks.sum([run.precision == "bfloat16"])[0]


def main(folder: Path) -> None:
    from lrt.distributed.parallelize import PARALLEL, join_ranks

    torch.set_num_threads(1)
    data = Prepared.open(folder / "prepared")
    with join_ranks("fsdp") as fsdp:
        kinds = {name: kind("cpu", fsdp.rank, fsdp.ranks) for name, kind in PARALLEL.items()}
        results: dict[str, Any] = {"failing": failing(fsdp), "refused": refused(fsdp, data)}
        results |= {f"muon-{name}": muon_and_clip(ranks) for name, ranks in kinds.items() if name != "fsdp-reshard"}
        results["losses"] = {
            f"{parallel} {name}": losses(Trainer(run_config(name), data, "cpu", kinds[parallel]), STEPS)
            for parallel, name in CASES
        }
        results["bfloat16"] = {name: in_bfloat16(kinds[name], data) for name in ("ddp", "fsdp")}
        results |= {name: resuming(kinds[name], data, folder, name) for name in ("fsdp", "ddp")}
        results["agreed"] = agreed(fsdp, data, folder)
        results["stopped"] = stopped(fsdp, data, folder / "stopped")
        if fsdp.first:
            (folder / "results.json").write_text(json.dumps(results))


# One process, and the comparison


def read_losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data, a snapshot of one rank in one/, and what two ranks made of it."""
    folder = tmp_path_factory.mktemp("ranks")
    data = prepare_squares(folder)
    session = Trainer(run_config("mixture"), data, "cpu")
    losses(session, HALF)
    session.save(folder / "one", {})
    run_two(__file__, str(folder))
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> Prepared:
    return Prepared.open(folder / "prepared")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def alone(data: Prepared) -> dict[str, list[float]]:
    """The losses of one process, which has each rank's rows as micro-batches or at once."""
    return {name: losses(Trainer(run_config(name, None), data, "cpu"), STEPS) for name in SCHEDULES}


@pytest.mark.parametrize(("parallel", "name"), CASES)
def test_two_ranks_have_the_losses_of_one(
    results: dict[str, Any], alone: dict[str, list[float]], parallel: str, name: str
) -> None:
    two = results["losses"][f"{parallel} {name}"]
    assert len(two) == STEPS
    assert two == pytest.approx(alone[name], abs=1e-5, rel=0)


def test_the_losses_tell_runs_apart(alone: dict[str, list[float]]) -> None:
    """The guard of the test above: another schedule is further away than its tolerance."""
    for name in ("plain", "multi_refinement", "mixture"):
        assert alone[name] != pytest.approx(alone["interleaved"], abs=1e-3, rel=0), name
    assert alone["plain"][-1] < alone["plain"][0] - 1


def test_bfloat16_on_two_ranks(results: dict[str, Any], data: Prepared, alone: dict[str, list[float]]) -> None:
    one, found = in_bfloat16(SINGLE_PROCESS, data), results["bfloat16"]
    assert found["ddp"] == pytest.approx(one, abs=1e-5, rel=0)
    assert found["fsdp"] == pytest.approx(one, abs=1e-5, rel=0)  # sums in the same order: `run_blocks`'s first stream
    assert one != pytest.approx(alone["mixture"], abs=1e-4, rel=0)  # it was bfloat16


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_muon_and_clipping_are_exact_under_sharding(results: dict[str, Any], parallel: str) -> None:
    found = results[f"muon-{parallel}"]
    assert found["worst"] < 1e-10
    assert found["norm"] > 2.0  # there was something to clip


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_snapshot_goes_from_one_rank_to_two_and_back(
    folder: Path, data: Prepared, results: dict[str, Any], alone: dict[str, list[float]], parallel: str
) -> None:
    one = Trainer(run_config("mixture"), data, "cpu")
    one.restore(folder / "one")
    begun, later = torch.load(folder / f"moments-{parallel}.pt")
    assert_equal(moments(one), begun)
    assert results[parallel]["identical"]  # on as many ranks, to the bit
    assert results[parallel]["losses"] == pytest.approx(alone["mixture"][HALF:12], abs=1e-5, rel=0)
    two = folder / f"two-{parallel}"
    assert (two / "optimisers").is_dir() == (parallel == "fsdp")
    back = Trainer(run_config("mixture"), data, "cpu")
    back.restore(two)
    assert back.progress.step == LATER
    assert_equal(moments(back), later)
    assert_equal(back.model.state_dict(), checkpoint.load(two)[0].state_dict())
    assert losses(back, 12) == pytest.approx(alone["mixture"][LATER:12], abs=1e-5, rel=0)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert len(one) > 20
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_a_damaged_shard_is_named(folder: Path, tmp_path: Path) -> None:
    shard = folder / "two-fsdp" / "optimisers" / "__1_0.distcp"
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[:-5])
        with pytest.raises(ValueError, match=r"__1_0\.distcp has .* truncated"):
            checkpoint.verify(folder / "two-fsdp")
    finally:
        shard.write_bytes(whole)


def test_one_ranks_stop_request_stops_all(results: dict[str, Any], folder: Path, alone: dict[str, list[float]]) -> None:
    found = results["stopped"]
    assert found["snapshots"] == ["step-00000006"]
    assert found["same"]
    assert found["lines"] == STEPS
    assert found["tokens"] == STEPS * ROWS * CONTEXT
    assert read_losses(folder / "stopped") == pytest.approx(alone["interleaved"], abs=1e-5, rel=0)


def test_one_ranks_failure_is_everybodys(results: dict[str, Any]) -> None:
    assert results["failing"] == "rank 1: the disk is full"


def test_the_ranks_agree_on_a_precision_that_is_measured(results: dict[str, Any]) -> None:
    assert results["agreed"] == 2


def test_a_batch_that_ranks_cannot_share_is_refused(results: dict[str, Any]) -> None:
    assert "device_batch is 2" in results["refused"]
    assert "divide the 3 rows of a device (batch_size 6, 2 devices)" in results["refused"]


def test_more_ranks_than_rows_are_refused(data: Prepared) -> None:
    run = replace(run_config("plain"), batch_size=5000, device_batch=1)
    with pytest.raises(ValueError, match=r"ranks is 5000, but .* rows .*at most as many ranks as rows"):
        Trainer(run, data, "cpu", SingleProcess(rank=0, ranks=5000))


def test_torchrun_trains_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    shape = ["--model.depth", "1", "--model.width", "32", "--model.heads", "1", "--model.context", "32"]
    size = [
        "--batch-size",
        "4",
        "--horizon",
        "tokens=512",
        "--schedule",
        "interleaved(2)",
        "--model.memory.source",
        "1",
    ]
    where = ["--data", str(folder / "prepared"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lrt"]
    done = subprocess.run(
        [*torchrun, "train", *where, "d2", *shape, *size],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("512 tokens in") == 1  # the first rank speaks for all
    assert len(read_losses(tmp_path / "run")) == 4
    assert checkpoint.load(tmp_path / "run")[0].config.depth == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
