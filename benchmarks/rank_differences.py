"""How far two ranks are from one process, in either precision, compiled or not: losses of 20 steps, and a gradient.

    torchrun --nproc-per-node 2 benchmarks/rank_differences.py

A tiny LRT on a text made here. Every rank also trains alone, on the same rows in as many micro-batches as there are
ranks, so that equal sums are rounded. Printed are the largest difference of a loss, and of the third step's gradient
the difference over its norm and the parameter that is furthest off, of gradients above a thousandth of the largest.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lrt import MemoryConfig, ModelConfig
from lrt.data.prepare import prepare
from lrt.data.prepared import Prepared
from lrt.distributed.parallelize import PARALLEL, join_ranks
from lrt.distributed.single_process import SINGLE_PROCESS, SingleProcess
from lrt.model.execution import Execution
from lrt.training.config import RunConfig
from lrt.training.optim_config import OptimConfig
from lrt.training.trainer import Trainer

STEPS, ROWS, CONTEXT = 20, 4, 32
BEFORE = 2
"""Steps before the gradient that is compared: outputs start at zero, and hide most of it."""


@dataclass(frozen=True)
class Ran:
    """What a run came to."""

    losses: list[float]
    gradients: dict[str, Tensor]
    """Of the third step, whole, by parameter."""


def run_config(schedule: str, precision: str, ranks: int) -> RunConfig:
    memory = MemoryConfig(source=(0, 2), projection="layerwise")
    model = ModelConfig(
        depth=2, width=32, heads=2, vocab_size=300, context=CONTEXT, memory=memory, value_embeddings="all"
    )
    optim = OptimConfig(reference_batch=1024)
    run = RunConfig(model, optim, schedule, ROWS, ROWS // ranks, f"steps={STEPS}")
    return RunConfig(**{**vars(run), "precision": precision})


def run_steps(run: RunConfig, data: Prepared, ranks: SingleProcess, execution: Execution) -> Ran:
    trainer = Trainer(run, data, ranks.device, ranks, execution)
    gradients: dict[str, Tensor] = {}
    update = trainer.optimiser.step

    def record(step: int) -> float:
        if step == BEFORE:
            for name, p in trainer.model.named_parameters():
                assert p.grad is not None
                gradients[name] = ranks.full_tensor(p.grad).clone()
        return update(step)

    trainer.optimiser.step = record
    losses = [trainer.step()["loss"] for _ in range(STEPS)]
    trainer.close()
    return Ran(losses, gradients)


def compare(one: Ran, two: Ran) -> str:
    loss = max(abs(a - b) for a, b in zip(one.losses, two.losses, strict=True))
    flat = [torch.cat([g.flatten() for g in ran.gradients.values()]) for ran in (one, two)]
    least = 1e-3 * max(float(g.norm()) for g in one.gradients.values())
    by_name = {
        name: float((g - two.gradients[name]).norm() / g.norm())
        for name, g in one.gradients.items()
        if float(g.norm()) >= least
    }
    worst = max(by_name, key=lambda name: by_name[name])
    whole = float((flat[0] - flat[1]).norm() / flat[0].norm())
    return f"loss {loss:.1e}, gradient {whole:.1e}, most {by_name[worst]:.1e} in {worst}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", default=["plain()", "settled(1, 1, 1)", "interleaved(2)"])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--compile", nargs="+", default=["never", "always"])
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder, join_ranks("fsdp") as group:
        text = Path(folder) / "text.txt"  # each rank its own: the same bytes
        text.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(400)))
        data = prepare(Path(folder) / "prepared", [text], vocab_size=300, progress=False)
        for schedule, precision, mode in itertools.product(
            arguments.schedules, arguments.precisions, arguments.compile
        ):
            run, execution = run_config(schedule, precision, group.ranks), Execution(mode)
            alone = run_steps(run, data, SINGLE_PROCESS, execution)
            for name, kind in PARALLEL.items():
                shared = run_steps(run, data, kind(group.device, group.rank, group.ranks), execution)
                if group.first:
                    print(f"{schedule}, {precision}, compile {mode}, {name}: {compare(alone, shared)}", flush=True)


if __name__ == "__main__":
    main()
