"""What is saved by running only the blocks that are needed: steps beside `plain()`, in alternated rounds.

    python benchmarks/free_passes.py --source 3 --first 3 --rounds 10

A free pass ends at its source, and blocks below the first that reads the source's channel run once for all passes. A
step is forward and backward of one batch, uncompiled, without optimiser (contract, section 6): 4 rows of 512 tokens,
vocabulary 4096, channels (0, source), layerwise projections; the source's enters from block `first` on. Prints the
median seconds and the median of the ratios.
"""

from __future__ import annotations

import statistics
import time

import torch
import tyro
from torch import Tensor

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, schedules
from lrt.model.execution import EAGER, WHOLE, Execution
from lrt.schedules.base import Schedule
from lrt.schedules.loss import StepLoss

KINDS: dict[str, tuple[Schedule, Execution]] = {
    "plain()": (schedules.plain(), EAGER),
    "interleaved(2), needed": (schedules.interleaved(2), EAGER),
    "interleaved(2), all": (schedules.interleaved(2), WHOLE),
    "settled(0, 1, 1), needed": (schedules.settled(0, 1, 1), EAGER),
    "settled(0, 1, 1), all": (schedules.settled(0, 1, 1), WHOLE),
    "settled(1, 1, 1), needed": (schedules.settled(1, 1, 1), EAGER),
    "settled(1, 1, 1), all": (schedules.settled(1, 1, 1), WHOLE),
}


def time_step(model: LatentRecurrentTransformer, text: Tensor, schedule: Schedule, execution: Execution) -> float:
    """Seconds of forward and backward over text (B, T + 1)."""
    tokens, targets = text[:, :-1], text[:, 1:]
    model.zero_grad()
    begun = time.perf_counter()
    StepLoss.of(schedule, [targets], execution=execution)(model, tokens, targets, None).backward()
    return time.perf_counter() - begun


def main(depth: int = 6, width: int = 384, source: int = 3, first: int = 1, rounds: int = 10) -> None:
    """Time every kind once per round."""
    torch.manual_seed(0)
    layers = tuple(range(1, depth + 1)), tuple(range(first, depth + 1))
    memory = MemoryConfig(source=(0, source), combine="channels", projection="layerwise", layers=layers)
    config = ModelConfig(depth=depth, width=width, heads=width // 64, vocab_size=4096, context=512, memory=memory)
    model, text = LatentRecurrentTransformer(config), torch.randint(4096, (4, 513))
    seconds: dict[str, list[float]] = {name: [] for name in KINDS}
    for turn in range(rounds + 1):
        for name, (schedule, execution) in KINDS.items():
            taken = time_step(model, text, schedule, execution)
            if turn > 0:  # the first warms up
                seconds[name].append(taken)
    for name, each in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(each, seconds["plain()"], strict=True))
        print(f"{name:34} {statistics.median(each):7.3f} s  {ratio:.3f}")


if __name__ == "__main__":
    tyro.cli(main)
