"""Attention of one layer over `plain()` and over the classes of `interleaved(2)`, forward and backward, on one thread.

Processor time, so that a busy machine counts less; minima and medians of alternated rounds, in milliseconds. `--tile`
compares sizes of the smallest triangle; run it on another commit to compare forms of pieces.

    OMP_NUM_THREADS=1 python benchmarks/attention_pieces.py --context 512 --tile 128 64
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lrt.model import strided_state
from lrt.model.state import empty_state
from lrt.model.strided_state import StridedState
from lrt.schedules.base import Pass
from lrt.schedules.library import interleaved, plain

HEADS, SIZE, TOKENS = 3, 128, 2048


def random_heads(rows: int, n: int) -> Tensor:
    """(B, H, n, K), laid out as the model does."""
    return torch.randn(rows, n, HEADS, SIZE).transpose(1, 2).requires_grad_()


def attention(passes: list[Pass], before: list[Pass], context: int) -> Callable[[], None]:
    """Forward and backward of `passes` behind the keys that the passes `before` have left."""
    rows = TOKENS // context
    shape = (1, (HEADS, SIZE), (1, 8), rows, context, None, None, False)
    empty = empty_state(*shape, device="cpu", dtype=torch.float32)
    state = StridedState.of(empty, 2)
    steps = []
    for p in (*before, *passes):
        q, k, v = (random_heads(rows, len(p.positions)) for _ in range(3))
        keys, values = (state.write(x[0], p.positions, new, 2) for x, new in ((state.keys, k), (state.values, v)))
        state = state.write_cache((keys,), (values,))
        leaves = {id(h.tensor): h.tensor for h in (*keys, *values) if h is not None}
        steps.append((state.visible(p.positions, None), q, keys, values, list(leaves.values()), torch.randn_like(q)))

    def work() -> None:
        for visible, q, keys, values, leaves, g in steps[len(before) :]:
            torch.autograd.grad(visible.attend(q, keys, values), [q, *leaves], g, allow_unused=True)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tile", type=int, nargs="+", default=[strided_state.TILE])
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    full, *classes = interleaved(2).passes(options.context)
    work: dict[str, Callable[[], None]] = {}
    for tile in options.tile:
        strided_state.TILE = tile  # pieces are made at the first call
        work[f"{tile}: plain"] = attention(list(plain().passes(options.context)), [], options.context)
        work[f"{tile}: classes"] = attention(classes, [full], options.context)
        work[f"{tile}: plain"]()
        work[f"{tile}: classes"]()
    spent: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(options.rounds):
        for name in work if turn % 2 else reversed(list(work)):
            begin = time.thread_time()
            work[name]()
            spent[name].append(1000 * (time.thread_time() - begin))
    for name, ms in spent.items():
        print(f"{name:20} minimum {min(ms):7.2f}  median {statistics.median(ms):7.2f}")


if __name__ == "__main__":
    main()
