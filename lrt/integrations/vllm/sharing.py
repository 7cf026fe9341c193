"""Which requests of a step read pages that others write in the same step.

vLLM counts a page as cached when it schedules the tokens that fill it. A request that begins alike may so be scheduled
beside the one that computes its beginning. Keys and values are then there in time, as each layer writes before it
attends; the memory is not: it is known at the end of a run. So the one waits for the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lrt.integrations.vllm.spans import Chunk


def readers(chunks: Sequence[Chunk], blocks: Tensor, slots: Tensor, size: int) -> dict[int, set[int]]:
    """By request, the others of the step that write pages of its past; only those that have any.

    blocks (R, n) int: the pages of each request. slots (N,) int: where the step writes. size: positions of a page.
    All on the CPU.
    """
    owner = torch.full((int(blocks.max()) + 1,), -1)
    for chunk in chunks:
        pages = slots[chunk.start : chunk.start + chunk.tokens] // size
        owner[pages[pages < len(owner)]] = chunk.request
    waiting = {}
    for chunk in chunks:
        past = owner[blocks[chunk.request, : -(-chunk.position // size)]]
        others = set(past[past >= 0].tolist()) - {chunk.request}
        if others:
            waiting[chunk.request] = others
    return waiting


def waves(chunks: Sequence[Chunk], waiting: Mapping[int, set[int]]) -> Iterator[list[Chunk]]:
    """The chunks, those first that wait for nobody, each wave after what it waits for.

    There is no circle: what a request writes comes after its past.
    """
    rest = list(chunks)
    while rest:
        open_ = {chunk.request for chunk in rest}
        ready = [chunk for chunk in rest if not waiting.get(chunk.request, set()) & open_]
        assert ready
        yield ready
        rest = [chunk for chunk in rest if chunk not in ready]
