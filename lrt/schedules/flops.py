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
from lrt.schedules.refinement import blocks_of_passes


def mean_visible_keys(length: int, window: int | None) -> float:
    """Keys a causal query sees on average over a sequence of `length` positions.

    The first `window` queries see 1, 2, … window keys, all later ones `window`.
    """
    if window is None or window >= length:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)


def forward_flops(config: ModelConfig, length: int, blocks: int | None = None) -> tuple[float, float]:
    """FLOPs per token of a call of the model over `length` tokens: (layer stack with memory, head).

    All loops and thoughts are in it; a first pass, which finds no thoughts before a token, is counted like the others.
    As decoding computes the same, it is also the cost of a generated token, on average over a text of `length`.
    `blocks`: of a pass that ends behind so many, loop after loop.
    """
    # One multiply-add per weight and position: 2 FLOPs. Loops repeat the blocks, not the projections.
    dense = {name: n for name, n in parameter_sizes(config).items() if not is_table(name)}
    per_block = [sum(n for name, n in dense.items() if name.startswith(f"blocks.{i}.")) for i in range(config.depth)]
    once = sum(dense.values()) - sum(per_block)
    if blocks is not None:  # `Projection` is asked for these blocks' sets alone
        once *= config.projections_of(blocks) / max(1, config.projections_of(None))
    products = 2 * (sum((per_block * config.loops)[:blocks]) + once)
    positions = config.positions_per_token * length
    # Scores and weighted values: two products of K multiply-adds per head and visible key.
    windows = config.windows[:blocks]
    attention = sum(4 * config.heads * config.head_dim * mean_visible_keys(positions, w) for w in windows)
    return config.positions_per_token * (products + attention), 2 * config.width * config.vocab_size


def training_flops(config: ModelConfig, schedule: Schedule, length: int) -> float:
    """FLOPs per token of forward and backward under `schedule`, all passes counted; head only where there is a loss.

    Passes that end early count as far as they run. Of a mixture or of stages, the mean over training.
    """
    total = 0.0
    for weight, part in schedule.shares():
        passes = part.passes(length)
        for p, blocks in zip(passes, blocks_of_passes(config, passes, EAGER), strict=True):
            stack, head = forward_flops(config, length, blocks)
            share = weight * len(p.positions) / length
            total += share * ((3 if p.grad else 1) * stack + (3 * head if p.loss_weight else 0))
    return total
