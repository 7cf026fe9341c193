"""Floating-point operations, counted from the configuration: a multiply-add is two, the backward twice the forward.

Counted are the matrix products of every pass (published counts leave the extra ones out: spec, section 5, trap 4),
attention over the keys that are visible on average, and the head where a pass has a loss. Lookups and elementwise work
are not.
"""

from __future__ import annotations

from lrt.model.config import ModelConfig
from lrt.model.execution import EAGER
from lrt.model.size import is_table, parameter_sizes
from lrt.schedules.base import Schedule
from lrt.schedules.work import common_stride, parts_of


def mean_visible_keys(length: int, window: int | None) -> float:
    """Keys a causal query sees on average over a sequence of `length` positions.

    The first `window` queries see 1, 2, … window keys, all later ones `window`.
    """
    if window is None or window >= length:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)


def forward_flops(
    config: ModelConfig, length: int, blocks: range | None = None, channels: int | None = None
) -> tuple[float, float]:
    """FLOPs per token of a call of the model over `length` tokens: (layer stack with memory, head).

    All loops and thoughts are in it; a first pass, which finds no thoughts before a token, is counted like the others.
    As decoding computes the same, it is also the cost of a generated token, on average over a text of `length`.
    `blocks`: of a call that runs these applications of blocks alone; `channels`: that reads the first so many alone.
    """
    # One multiply-add per weight and position: 2 FLOPs. Loops repeat the blocks, not the projections.
    blocks = range(config.kv_layers) if blocks is None else blocks
    dense = {name: n for name, n in parameter_sizes(config).items() if not is_table(name)}
    per_block = [sum(n for name, n in dense.items() if name.startswith(f"blocks.{i}.")) for i in range(config.depth)]
    # `Projection` is asked for these blocks' pairs alone.
    once = sum(dense.values()) - sum(per_block)
    once *= config.count_projections(blocks, channels) / max(1, config.count_projections())
    products = 2 * (sum((per_block * config.loops)[blocks.start : blocks.stop]) + once)
    positions = config.positions_per_token * length
    # Scores and weighted values: two products of K multiply-adds per head and visible key.
    windows = config.windows[blocks.start : blocks.stop]
    attention = sum(4 * config.heads * config.head_dim * mean_visible_keys(positions, w) for w in windows)
    return config.positions_per_token * (products + attention), 2 * config.width * config.vocab_size


def training_flops(config: ModelConfig, schedule: Schedule, length: int) -> float:
    """FLOPs per token of forward and backward under `schedule`, all passes counted; head only where there is a loss.

    Blocks that need not run are not counted (`schedules.work`). Of a mixture or of stages, the mean over training.
    """
    total, head = 0.0, 3 * forward_flops(config, length)[1]
    for weight, schedule_part in schedule.shares():
        passes = schedule_part.passes(length)
        strided = common_stride(passes, length) is not None
        written = not strided  # whether all channels of the memory are read
        for part in parts_of(config, passes, EAGER, strided):
            stack, _ = forward_flops(config, length, part.blocks, None if written else config.first_channels)
            scored = head if part.ends and part.p.loss_weight else 0
            total += weight * len(part.p.positions) / length * ((3 if part.grad else 1) * stack + scored)
            written |= part.ends
    return total
