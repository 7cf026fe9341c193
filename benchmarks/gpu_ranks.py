"""The ranks of benchmarks/gpu.py: the same training steps on one process and on two, with DDP and FSDP2.

    torchrun --standalone --nproc-per-node 2 benchmarks/gpu_ranks.py --device cuda --out FILE.jsonl

Every way of sharing a model trains the same few steps from the same weights; rank 0 first trains them alone. A line of
the file for each way: its losses, seconds per step, and peak bytes on CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lrt import ModelConfig
from lrt.distributed.parallelize import PARALLEL, join_ranks
from lrt.distributed.single_process import SingleProcess
from lrt.experiments.bench.rows import Row
from lrt.experiments.bench.steps import random_data
from lrt.training.config import RunConfig
from lrt.training.optim_config import OptimConfig
from lrt.training.recipes import recommended_memory
from lrt.training.trainer import Trainer
from lrt.utils.files import append_durably
from lrt.utils.json_lines import read_json_lines

Part = tuple[str, Callable[[float], Iterable[Row]]]
STEPS = 6
WARM = 2
"""Steps that are not timed: FSDP2 sets itself up in the first."""
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.02}
"""Of losses, relative: sums over ranks have another order, and on CUDA Muon, in bfloat16, magnifies what differs."""
LEAST_SECONDS = 120.0
"""What two ranks get to start and end, however little time is left."""
TAIL = 2000
"""Characters of what failed ranks printed."""
WAYS = ("one process", "ddp", "fsdp", "fsdp-reshard")
ALONE = WAYS[0]


def run_config(depth: int, width: int, context: int, precision: Any) -> RunConfig:
    """Few rows of a whole LRT, at rates at which some steps change the loss."""
    model = ModelConfig.from_depth(
        depth, width=width, context=context, vocab_size=4096, memory=recommended_memory(depth)
    )
    optim = OptimConfig(reference_batch=4 * context)
    return RunConfig(model, optim, "settled(0, 1, 1)", 4, None, "steps=1000", precision)


def train(run: RunConfig, ranks: SingleProcess) -> dict[str, Any]:
    """Losses and median seconds of some steps. All ranks call it."""
    data = random_data(run.model.vocab_size, 64 * run.batch_tokens)
    trainer = Trainer(run, data, ranks.device, ranks)
    if torch.device(ranks.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)
    before, seconds, losses = 0.0, [], []
    for _ in range(STEPS):
        losses.append(trainer.step()["loss"])
        seconds.append(trainer.progress.seconds - before)
        before = trainer.progress.seconds
    trainer.close()
    peak = torch.cuda.max_memory_allocated(ranks.device) if torch.device(ranks.device).type == "cuda" else None
    return {"losses": losses, "seconds": statistics.median(seconds[WARM:]), "peak_bytes": peak}


class NotHere(Exception):
    """What cannot be measured on this machine, in words: no failure."""


def rank_parts(device: str, size: tuple[int, int, int], precisions: Sequence[str]) -> list[Part]:
    """Two ranks beside one, by precision: NCCL on two cards, gloo on a CPU."""
    return [(f"two ranks, {p}", partial(rank_rows, device, size, p)) for p in precisions]


def rank_rows(device: str, size: tuple[int, int, int], precision: str, limit: float) -> Iterator[Row]:
    """For each way of sharing the model: how far its losses are from one process's, and its step over that one's."""
    if torch.device(device).type == "cuda" and torch.cuda.device_count() < 2:
        raise NotHere("one card: FSDP2 with NCCL takes two")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ways.jsonl"
        run_ranks(["--device", device, "--out", str(file), "--precision", precision, "--size", *map(str, size)], limit)
        lines = {line["way"]: line for line in read_json_lines(file)}
    alone = lines[ALONE]
    for way in WAYS[1:]:
        line = lines[way]
        worst = max(abs(a - b) / abs(b) for a, b in zip(line["losses"], alone["losses"], strict=True))
        name = f"{way} on {line['ranks']} ranks, {precision}"
        yield Row(f"{name}: losses", worst, at_most=TOLERANCES[precision], measure="difference", about=line)
        figures = {"seconds": line["seconds"], "peak_bytes": line["peak_bytes"]}
        ratio = line["seconds"] / alone["seconds"]
        yield Row(f"{name}: step over one process's", ratio, measure="ratio", figures=figures)


def run_ranks(arguments: list[str], limit: float) -> None:
    """This file under torchrun. RuntimeError with the end of what it printed where it fails, or hangs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [*command, *arguments], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=max(LEAST_SECONDS, limit))
    except BaseException as error:  # a hang, or Ctrl-C: no rank is left behind
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise RuntimeError(f"two ranks had not ended after {error.timeout:.0f} s: {printed[-TAIL:]}") from error
    if process.returncode != 0:
        raise RuntimeError(f"two ranks ended with status {process.returncode}: {printed[-TAIL:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, nargs=3, default=(6, 384, 512), metavar=("DEPTH", "WIDTH", "CONTEXT"))
    parser.add_argument("--precision", choices=tuple(TOLERANCES), default="float32")
    arguments = parser.parse_args()
    run = run_config(*arguments.size, arguments.precision)
    with join_ranks("fsdp", arguments.device) as group:
        for way in WAYS:
            ranks = (
                SingleProcess(group.device) if way == ALONE else PARALLEL[way](group.device, group.rank, group.ranks)
            )
            if way != ALONE or group.first:
                line = {"way": way, "ranks": ranks.ranks, **train(run, ranks)}
                if group.first:
                    append_durably(arguments.out, json.dumps(line) + "\n")
            group.sum([0.0])  # the others wait for rank 0


if __name__ == "__main__":
    main()
