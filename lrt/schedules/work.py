"""Which blocks the passes of a schedule have to run: the same numbers for less work, decided from the passes alone.

Two things need not be computed. A pass without loss whose keys and values are replaced before anyone sees them is
wanted for its memory only, and ends at the highest remembered layer. And blocks below the first that reads a remembered
layer compute the same in every pass: once is enough. `Execution.blocks` says whether this is done; the plain reference
runs every block of every pass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from lrt.model.config import ModelConfig
from lrt.model.execution import Execution
from lrt.schedules.base import Pass, Passes


@dataclass(frozen=True)
class Part:
    """One call of the model in a schedule."""

    p: Pass
    """Whose positions."""
    blocks: range
    """The applications of blocks that run, counted from 0, loop after loop; may be empty."""
    grad: bool
    ends: bool = True
    """Whether the pass is done with it. If not, the part computes what later ones start from."""


def parts_of(config: ModelConfig, passes: Passes, execution: Execution, strided: bool) -> tuple[Part, ...]:
    """What to call the model for, in order; `strided` says whether that is on a StridedState.

    On the general State a part that writes no memory would still mark its positions as written. With latent thoughts
    every pass runs whole: a later one reads the thoughts that an earlier one wrote.
    """
    every = range(config.kv_layers)
    if execution.blocks == "all" or config.positions_per_token > 1:
        return tuple(Part(p, every, p.grad) for p in passes)
    sharing, first = count_sharing(config, passes) if strided else 0, config.blocks_below_memory
    parts = []
    if sharing:
        parts.append(Part(passes[0], range(first), any(p.grad for p in passes[:sharing]), ends=False))
    for i, (p, free) in enumerate(zip(passes, free_passes(passes), strict=True)):
        last = config.memory_blocks if free else config.kv_layers
        parts.append(Part(p, range(first if i < sharing else 0, last), p.grad))
    return tuple(parts)


def count_sharing(config: ModelConfig, passes: Passes) -> int:
    """How many of the first passes share what blocks below the first that reads a remembered layer compute.

    The first pass has to be a full one, so that these blocks see every earlier position in each of them. All passes
    share where gradients are the same by it: no query with a gradient sees keys that a pass without one has left.
    Elsewhere those before the first with a gradient do. None where nothing would be saved.
    """
    if len(passes) < 2 or config.blocks_below_memory == 0:
        return 0
    if passes[0].positions != range(len(passes[0].positions)) or passes[0].stop < max(p.stop for p in passes):
        return 0
    sharing = len(passes)
    if not all(p.grad or is_replaced(p, passes[i + 1 :], only_grad=True) for i, p in enumerate(passes)):
        sharing = next(i for i, p in enumerate((*passes, Pass(0, 1))) if p.grad)
    return sharing if sharing > 1 else 0


@functools.lru_cache(maxsize=64)  # the same for every step of a schedule
def free_passes(passes: Passes) -> tuple[bool, ...]:
    """Of each pass, whether only its memory is ever read: it has no loss, and all of its positions are computed again
    before a query sees their keys and values.

    Windows and documents are not looked at: with them a pass could be free that is not called so here.
    """
    return tuple(not p.loss_weight and is_replaced(p, passes[i + 1 :]) for i, p in enumerate(passes))


def is_replaced(p: Pass, later: Passes, only_grad: bool = False) -> bool:
    """Whether `later` passes replace all that `p` writes before they see it, or those of them with a gradient do."""
    left = set(p.positions)
    for other in later:
        left.difference_update(other.positions)  # a pass writes its own keys and values before it reads
        if not left:
            return True
        if min(left) < other.positions[-1] and (other.grad or not only_grad):
            return False
    return False  # what is left is the final state


CLASSES = 32
"""Most classes: S passes of S pieces each are many small kernels, and a mask then costs less."""


def common_stride(passes: Sequence[Pass], length: int) -> int | None:
    """S, where each of `passes` over `length` positions is the full range or a class r::S of one S; None elsewhere."""
    strides: set[int] = set()
    for p in passes:
        if (p.start, p.stop) == (0, length) and p.stride == 1:
            continue
        if p.stop != length or p.start >= p.stride or p.stride > CLASSES:
            return None
        strides.add(p.stride)
    return None if len(strides) > 1 else strides.pop() if strides else 1
