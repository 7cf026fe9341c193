"""Which queries meet which keys in one call of a kernel, and how the calls' outputs and gradients are put together.

Shapes: B batch, H query heads, G key/value heads, n queries, m keys of one source, K head size.

What attends over them is `blockwise_attention.py`; which pieces there are is decided by `strided_state.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Mask = Callable[[Tensor], Tensor]
"""Makes a mask (1 or B, 1, n, m) to add to the scores, 0 or -inf, of the type and on the device of what it is given:
when it is needed, so that few exist at a time."""


@dataclass(frozen=True)
class Repeat:
    """How often a run of entries is taken again, each time `pitch` entries further."""

    blocks: int = 1
    pitch: int = 0

    def of(self, x: Tensor, where: slice) -> Tensor:
        """(B, blocks, heads, size, …): a view of x (B, heads, n, …) at the run `where` and at its repetitions.

        `where` may have a step; `pitch` then counts in such steps.
        """
        batch, heads, _, *rest = x.shape
        between, outer, inner, *within = x.stride()  # of rows of the batch, of heads, of entries
        start, stop, step = where.start, where.stop, where.step or 1
        size = len(range(start, stop, step))
        # One operation: slices, and windows of them, are four to the same view.
        shape = (batch, self.blocks, heads, size, *rest)
        strides = (between, self.pitch * step * inner, outer, step * inner, *within)
        return x.as_strided(shape, strides, x.storage_offset() + start * inner)

    def is_run(self, where: slice) -> bool:
        """Whether all of it together is one run without gaps or steps."""
        return where.step is None and (self.blocks == 1 or where.stop - where.start == self.pitch)

    def stop(self, where: slice) -> int:
        """The end of the last repetition."""
        return where.stop + (self.blocks - 1) * self.pitch * (where.step or 1)


ONCE = Repeat()


@dataclass(frozen=True)
class AttentionPiece:
    """Queries `rows` against `keys` of source number `source`. `keys` may have a step: one class in a tensor of all."""

    rows: slice
    source: int
    keys: slice
    causal: bool = False
    """Query i of the piece sees its keys 0 … i, counted within the piece. It is square unless repeated, so that kernels
    which align the triangle at the first query (CPU) and those which align it at the last one (CUDA) agree."""
    mask: Mask | None = None
    repeat: Repeat = ONCE
    """Pieces of one form, further down the rows and the keys alike, are one call of a kernel: more rows of a batch."""

    def of_rows(self, x: Tensor) -> Tensor:
        """The piece's queries of x (B, heads, n, …), (B·blocks, heads, size, …): a view where memory allows it."""
        return self.repeat.of(x, self.rows).flatten(0, 1)

    def of_keys(self, x: Tensor) -> Tensor:
        """Likewise its keys of x (B, heads, m, …)."""
        return self.repeat.of(x, self.keys).flatten(0, 1)


def join_blocks(x: Tensor, batch: int) -> Tensor:
    """(B, heads, blocks·size, …) of x (B·blocks, heads, size, …): a view where positions are laid out outside heads."""
    return x if len(x) == batch else x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


class Merged:
    """Outputs and log-sum-exps of pieces, merged as they come, in float32 at least.

    Two outputs over disjoint keys have the common softmax Σ_i out_i · exp(lse_i) / Σ_i exp(lse_i).
    """

    def __init__(self, q: Tensor) -> None:
        self.q, self.covered = q, 0  # queries 0 … covered - 1 have an output; memory behind them is not filled yet

    def add(self, rows: slice, out: Tensor, lse: Tensor, repeat: Repeat = ONCE) -> None:
        """Merge a piece's output (B·blocks, H, size, K) and log-sum-exp (B·blocks, H, size) into its queries'."""
        batch, heads, n, size = self.q.shape
        in_order = rows.start == self.covered and repeat.is_run(rows)
        wide = torch.promote_types(out.dtype, torch.float32)
        if self.covered == 0:
            if in_order and repeat.stop(rows) == n:
                self.out, self.lse, self.covered = join_blocks(out, batch), join_blocks(lse, batch), n
                return
            # Laid out as (B, n, H, K), so that what follows joins the heads without a copy.
            self.out = out.new_empty(batch, n, heads, size, dtype=wide).transpose(1, 2)
            self.lse = lse.new_empty(batch, n, heads).transpose(1, 2)
        out, lse = (x.unflatten(0, (batch, repeat.blocks)) for x in (out, lse))
        self.out = self.out.to(wide)  # a first piece of all queries was taken as it is
        own_out, before = repeat.of(self.out, rows), repeat.of(self.lse, rows)
        if in_order:
            own_out.copy_(out)
            before.copy_(lse)
            self.covered = repeat.stop(rows)
            return
        assert repeat.stop(rows) <= self.covered, "the first pieces must reach every query, in order"
        # exp(lse) / (exp(before) + exp(lse)), the new piece's weight; nan (inf - inf) where neither has a key.
        share = (lse - before).sigmoid().nan_to_num(0.0)
        own_out.lerp_(out.to(self.out.dtype), share.unsqueeze(-1).to(self.out.dtype))
        torch.logaddexp(before, lse, out=before)

    def result(self) -> tuple[Tensor, Tensor]:
        assert self.covered == self.q.shape[2], "no piece reaches the last queries"
        return self.out.to(self.q.dtype), self.lse


class Total:
    """A gradient (B, heads, n, K), added up from pieces in float32 at least.

    What comes in order is written, not added to zeros: most of a gradient is then touched once.
    """

    def __init__(self, like: Tensor) -> None:
        self.like, self.sum, self.covered = like, None, 0  # as in Merged: memory behind `covered` is not filled yet

    def add(self, where: slice, part: Tensor, repeat: Repeat = ONCE) -> None:
        """Add a piece's part (B·blocks, heads, size, K), of the run `where` and its repetitions.

        `where` has a step where a class lies in a tensor of all positions.
        """
        batch, _, n, _ = self.like.shape
        in_order = where.start == self.covered and repeat.is_run(where)
        wide = torch.promote_types(part.dtype, torch.float32)
        if self.sum is None:
            if in_order and repeat.stop(where) == n:
                self.sum, self.covered = join_blocks(part, batch), n
                return
            self.sum = torch.empty_like(self.like, dtype=wide)
        self.sum = self.sum.to(wide)  # a first part of everything was taken as it is
        part = part.unflatten(0, (batch, repeat.blocks))
        if in_order:
            repeat.of(self.sum, where).copy_(part)
            self.covered = repeat.stop(where)
            return
        if repeat.stop(where) > self.covered:
            self._clear()
        repeat.of(self.sum, where).add_(part)

    def _clear(self) -> None:
        """Zeros in what no piece has written."""
        assert self.sum is not None
        self.sum[:, :, self.covered :] = 0
        self.covered = self.like.shape[2]

    def result(self) -> Tensor:
        if self.sum is None:
            return torch.zeros_like(self.like)
        self._clear()
        return self.sum.to(self.like.dtype)
