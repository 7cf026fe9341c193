"""What bfloat16 costs and gives beside float32: steps of d6, compiled and not, and products and attention alone.

    OMP_NUM_THREADS=1 python benchmarks/precision.py

Steps are forward and backward (contract, section 6): depth 6, width 384, 4 rows of 512 tokens, vocabulary 4096, outputs
that are not zero. All candidates run in turn. Ratios are over float32 in the same mode, by the clock and by the CPU
time of this process, which other work on the machine disturbs less. *kernel in bfloat16* is attention as a CPU with
matrix units has it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lrt import MemoryConfig, ModelConfig, schedules
from lrt.distributed.objective import make_objective
from lrt.model.blockwise_attention import AttentionPiece, attend
from lrt.model.execution import Execution
from lrt.model.strided_state import TILE, triangles
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.loss import StepLoss
from lrt.utils import torch_private
from lrt.utils.timing import Timing, Work, alternate

WARM = 2
ROWS, CONTEXT, VOCABULARY = 4, 512, 4096
CONFIG = ModelConfig.from_depth(6, width=384, context=CONTEXT, vocab_size=VOCABULARY, memory=MemoryConfig())
HALF = torch.bfloat16


@contextmanager
def bfloat16_kernel() -> Iterator[None]:
    """Within the block attention computes in bfloat16, as on a CPU with matrix units."""
    real, torch_private.has_amx = torch_private.has_amx, lambda: True
    try:
        yield
    finally:
        torch_private.has_amx = real


def in_bfloat16_kernel(work: Work) -> Work:
    def run() -> None:
        with bfloat16_kernel():
            work()

    return run


def step(model: LatentRecurrentTransformer, schedule: str, dtype: torch.dtype, execution: Execution) -> Work:
    text = torch.randint(VOCABULARY, (ROWS, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    loss, objective = (
        StepLoss.of(schedules.parse(schedule), [targets], execution=execution),
        make_objective(model, dtype),
    )

    def work() -> None:
        model.zero_grad()
        objective(loss, tokens, targets, None).backward()

    return work


def steps(schedule: str) -> dict[str, Work]:
    torch.manual_seed(0)
    model = LatentRecurrentTransformer(CONFIG).train()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.02)
    work = {}
    for name, execution in (("compiled", Execution("always")), ("uncompiled", Execution("never"))):
        for dtype in (torch.float32, HALF):
            work[f"{name} {str(dtype)[6:]}"] = step(model, schedule, dtype, execution)
    return {**work, "compiled bfloat16, kernel in bfloat16": in_bfloat16_kernel(work["compiled bfloat16"])}


def product(dtype: torch.dtype) -> Work:
    """All of the MLP's products, forward and backward."""
    x, up, down = torch.randn(ROWS * CONTEXT, 384), torch.randn(1536, 384), torch.randn(384, 1536)
    x, up, down = (t.to(dtype).requires_grad_() for t in (x, up, down))

    def work() -> None:
        torch.autograd.grad(((x @ up.T) @ down.T).sum(), (x, up, down))

    return work


def attention(dtype: torch.dtype) -> Work:
    """One layer's, forward and backward."""
    q, k, v = (torch.randn(ROWS, CONTEXT, 3, 128).transpose(1, 2).to(dtype).requires_grad_() for _ in range(3))
    pieces = [AttentionPiece(rows, 0, keys, causal=rows == keys) for rows, keys in triangles(0, CONTEXT, TILE)]

    def work() -> None:
        torch.autograd.grad(attend(q, [k], [v], pieces).sum(), (q, k, v))

    return work


def measure(title: str, work: dict[str, Work], rounds: int) -> None:
    """Print each candidate's seconds and ratios over the float32 one of its mode."""
    spent: dict[str, list[float]] = {name: [] for name in work}

    def counted(name: str, candidate: Work) -> Work:
        def run() -> None:
            begin = time.process_time()
            candidate()
            spent[name].append(time.process_time() - begin)

        return run

    wall = alternate({name: counted(name, candidate) for name, candidate in work.items()}, rounds, WARM, progress=False)
    cpu = {name: Timing(tuple(seconds[WARM:])) for name, seconds in spent.items()}
    for name in work:
        base = name.split(",")[0].replace("bfloat16", "float32")
        ratios = [timings[name].ratio(timings[base]) for timings in (wall, cpu)]
        shown = ", ".join(f"{kind} {r:.3f} ± {s:.3f}" for kind, (r, s) in zip(("clock", "CPU"), ratios, strict=True))
        print(f"{title}, {name}: {wall[name].median:.3f} s, {cpu[name].median:.3f} s of CPU; {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="*", default=["plain()", "settled(1, 1, 1)", "interleaved(2)"])
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    measure("products", {"float32": product(torch.float32), "bfloat16": product(HALF)}, arguments.rounds)
    half = attention(HALF)
    alone = {
        "float32": attention(torch.float32),
        "bfloat16": half,
        "bfloat16, kernel in bfloat16": in_bfloat16_kernel(half),
    }
    measure("attention", alone, arguments.rounds)
    for schedule in arguments.schedules:
        measure(schedule, steps(schedule), arguments.rounds)


if __name__ == "__main__":
    main()
