"""Training on a machine whose cores others use too: tokens per second by how OpenMP's threads wait.

    python benchmarks/busy.py --busy 0 2 4

Each way to wait has a process, which trains the demo's LRT (4 layers of 128, interleaved(2), 8 rows of 256 tokens) for
some seconds when its turn comes; the others sleep meanwhile. All run in turn, round after round, beside --busy loops in
Python. The best and the median round are printed. `aim` is a fifth of the idle speed by the library's own waiting, over
the loops per core (at least one). Where others share the machine, run it in a session of its own with a higher priority
(`echo -20 > /proc/self/autogroup`), else no row is idle.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import tyro

from lrt.utils.openmp import SPINS, WAITING

WAYS: dict[str, dict[str, str]] = {
    "the library's own": {},
    "the command line's": {"GOMP_SPINCOUNT": SPINS},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
LOOP = "while True: pass"


@dataclass(frozen=True)
class Arguments:
    busy: tuple[int, ...] = (0, 2, 4)
    """Processes that compete, one setting after another."""
    seconds: float = 2.0
    """Of training, per way and round."""
    rounds: int = 3
    spins: tuple[int, ...] = ()
    """Further ways to wait: turns of the waiting loop."""
    worker: bool = False
    """Train when a line with a number of seconds comes; for the processes that this starts."""


def train_on_request() -> None:
    """Print tokens per second for each line of standard input, a number of seconds to train."""
    import torch

    from lrt.model.config import ModelConfig
    from lrt.model.transformer import LatentRecurrentTransformer
    from lrt.schedules.loss import StepLoss
    from lrt.schedules.parse import parse
    from lrt.training.optim import Optimiser
    from lrt.training.optim_config import OptimConfig
    from lrt.training.recipes import recommended_memory

    torch.manual_seed(0)
    config = ModelConfig(context=256, memory=recommended_memory(4))
    model = LatentRecurrentTransformer(config)
    optimiser = Optimiser(model, config.width, 2048, 10**6, OptimConfig())
    text = torch.randint(config.vocab_size, (8, 257))
    tokens, targets = text[:, :-1], text[:, 1:]

    def step() -> None:
        StepLoss.of(parse("interleaved(2)"), [targets])(model, tokens, targets, None).backward()
        optimiser.step(0)
        optimiser.zero_grad()

    step()
    print("ready", flush=True)
    for line in sys.stdin:
        step()  # awake, and warm
        steps, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < float(line):
            step()
            steps += 1
        print(steps * tokens.numel() / (time.perf_counter() - begun), flush=True)


def start_worker(way: dict[str, str]) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in (*WAITING, "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, __file__, "--worker"]
    worker = subprocess.Popen(
        command, env={**environment, **way}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert ask(worker, "") == "ready"
    return worker


def ask(worker: subprocess.Popen[str], line: str) -> str:
    """A worker's next line, after it was sent one, if any."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    if line:
        print(line, file=worker.stdin, flush=True)
    return worker.stdout.readline().strip()


@contextlib.contextmanager
def competing(count: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main(arguments: Arguments) -> None:
    if arguments.worker:
        return train_on_request()
    ways = WAYS | {f"{turns:,} turns": {"GOMP_SPINCOUNT": str(turns)} for turns in arguments.spins}
    workers = {name: start_worker(way) for name, way in ways.items()}
    cores, idle = len(os.sched_getaffinity(0)), 0.0
    print("| loops | aim |", " | ".join(ways), "|", flush=True)
    for busy in arguments.busy:
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        with competing(busy):
            for turn in range(arguments.rounds):
                for name, worker in workers.items() if turn % 2 == 0 else reversed(workers.items()):
                    speeds[name].append(float(ask(worker, str(arguments.seconds))))
        idle = idle or max(speeds["the library's own"])
        aim = idle / 5 / max(1.0, busy / cores)
        cells = [f"{max(each):,.0f} ({statistics.median(each):,.0f})" for each in speeds.values()]
        print(f"| {busy} | {aim:,.0f} |", " | ".join(cells), f"| load {os.getloadavg()[0]:.1f}", flush=True)
    for worker in workers.values():
        worker.kill()


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
