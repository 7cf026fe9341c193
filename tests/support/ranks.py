"""Two processes that train together, started for real, and the small run that they are given."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from lrt import MemoryConfig, ModelConfig
from lrt.data.prepare import prepare
from lrt.data.prepared import Prepared
from lrt.training.config import RunConfig
from lrt.training.optim_config import OptimConfig
from lrt.training.trainer import Trainer

STEPS, ROWS, CONTEXT = 20, 4, 32
TESTS = Path(__file__).resolve().parents[1]


SUMMED = MemoryConfig(source=(0, 2), projection="layerwise")
LAYERED = MemoryConfig(
    source=(0, 0, 2),
    combine="channels",
    projection="layerwise",
    layers=((1, 2), (1, 2), (2,)),
    state_start="neutral",
)
"""Layer 2 enters from block 2 on: passes share block 1, and a plain one goes without its channel."""


def small_run(schedule: str, device_batch: int | None = 1, memory: MemoryConfig = SUMMED) -> RunConfig:
    """20 steps of 4 rows of 32 tokens; a tiny LRT with every kind of parameter."""
    model = ModelConfig(
        depth=2, width=32, heads=2, vocab_size=300, context=CONTEXT, memory=memory, value_embeddings="all"
    )
    optim = OptimConfig(reference_batch=1024)  # rates at which 20 steps learn something
    return RunConfig(model, optim, schedule, ROWS, device_batch, f"steps={STEPS}")


def losses(session: Trainer, until: int) -> list[float]:
    return [session.step()["loss"] for _ in range(until - session.progress.step)]


def prepare_squares(folder: Path) -> Prepared:
    """Four hundred lines of squares, prepared in folder/prepared."""
    text = folder / "text.txt"
    text.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(400)))
    return prepare(folder / "prepared", [text], vocab_size=300, progress=False)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def run_two(program: str, *arguments: str) -> None:
    """Run a file as two ranks, to the end of both; what one says on standard error is what the test fails with."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    processes = [
        subprocess.Popen(
            [sys.executable, program, *arguments],
            env={**os.environ, **common, "PYTHONPATH": path, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            error = process.communicate(timeout=600)[1]
            assert process.returncode == 0, error
    finally:
        for process in processes:
            process.kill()
