"""What each way of sharing a model among ranks holds and sends, per schedule: bytes of parameters and collectives.

    torchrun --nproc-per-node 2 benchmarks/sharding.py --depth 6

One optimiser step without the optimiser. Held are the parameters of one rank, its shards and what is gathered, at rest
and at most (looked at inside every block, forward and backward). Counted are FSDP2's and DDP's collectives.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lrt import MemoryConfig, ModelConfig, schedules
from lrt.distributed.parallelize import PARALLEL, join_ranks
from lrt.distributed.single_process import SingleProcess
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.loss import StepLoss

SCHEDULES = ("plain()", "interleaved(2)", "multi_refinement(3)")
CONTEXT = 64


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = str(func.overloadpacket).removeprefix("c10d.").strip("_")
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def held_bytes(model: nn.Module, shards: int) -> int:
    """Bytes of parameters that this rank holds now: its `shards`, and whatever is whole."""
    return shards + sum(p.nbytes for p in model.parameters() if not isinstance(p, DTensor))


def measure_step(ranks: SingleProcess, config: ModelConfig, text: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = LatentRecurrentTransformer(config).to(ranks.device)
    objective = ranks.parallelise(model)
    shards = sum(p.to_local().nbytes for p in model.parameters() if isinstance(p, DTensor))
    rest, peak = held_bytes(model, shards), 0

    def record_peak(*_: Any) -> None:
        nonlocal peak
        peak = max(peak, held_bytes(model, shards))

    for block in model.blocks:
        block.mlp.register_forward_pre_hook(record_peak)
        block.mlp.register_full_backward_pre_hook(record_peak)
    tokens = torch.randint(config.vocab_size, (1, CONTEXT), device=ranks.device)
    loss = StepLoss.of(schedules.parse(text), [tokens], ranks.sum)
    step(ranks, objective, loss, tokens)  # FSDP2 sets itself up in the first
    with Collectives() as counter:
        step(ranks, objective, loss, tokens)
    return {
        "parallel": type(ranks).__name__,
        "schedule": text,
        "rest": rest,
        "peak": peak,
        "collectives": counter.counts,
    }


def step(ranks: SingleProcess, objective: nn.Module, loss: Callable[..., Any], tokens: torch.Tensor) -> None:
    with ranks.gradient_sync(objective, last=True):
        objective(loss, tokens, tokens, None).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    config = ModelConfig.from_depth(
        arguments.depth, context=CONTEXT, vocab_size=32768, memory=MemoryConfig(projection="layerwise")
    )
    with join_ranks("fsdp", arguments.device) as group:
        for kind in PARALLEL.values():
            ranks = kind(group.device, group.rank, group.ranks)
            for text in SCHEDULES:
                row = measure_step(ranks, config, text)
                if ranks.first:
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
