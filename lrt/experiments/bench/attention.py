"""`lrt bench attention`: one layer's attention over a schedule's passes, by copied buffers and by pieces.

Shapes: B batch, T positions, n of them in a pass, H query heads, G key/value heads, K head size.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from lrt.experiments.bench.options import AttentionOptions
from lrt.experiments.bench.rows import Row, hardware_title, print_json, print_table
from lrt.model.recompute import VARIANTS
from lrt.model.state import State, empty_state
from lrt.model.strided_state import StridedState
from lrt.schedules import library as schedules
from lrt.schedules.base import Pass, Schedule
from lrt.schedules.parse import parse
from lrt.schedules.refinement import common_stride
from lrt.utils.provenance import hardware
from lrt.utils.timing import Work, alternate
from lrt.utils.torch_private import raise_recompile_limit

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class AttentionBench(AttentionOptions):
    """What `AttentionOptions` ask for, measured."""

    def run(self) -> None:
        rows, about = self.rows(), {"hardware": hardware(self.device)}
        print_table(rows, hardware_title(about))
        if self.json:
            print_json(rows, about)

    def rows(self, limit: float = math.inf, progress: bool = True) -> list[Row]:
        """All ways, timed in turn, over one causal kernel for all positions: `plain()` at its best."""
        plain = schedules.plain()
        work = {"plain() by one kernel": self.work(plain, by_pieces=False)}
        for text in ("plain()", *self.schedules):
            schedule = parse(text)
            work[f"{schedule!r} by pieces"] = self.work(schedule, by_pieces=True)
            if schedule != plain:
                work[f"{schedule!r} by masks"] = self.work(schedule, by_pieces=False)
                if torch.device(self.device).type == "cuda":
                    work[f"{schedule!r} by FlexAttention"] = self.flex_work(schedule)
        timings = alternate(
            work, self.rounds, device=self.device, title="lrt bench attention", progress=progress, limit=limit
        )
        base, rows = timings["plain() by one kernel"], []
        for name, timing in timings.items():
            rows.append(Row(name, *timing.ratio(base), measure="ratio", figures={"seconds": timing.median}))
        return rows

    @property
    def groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    def random_heads(self, heads: int, n: int) -> Tensor:
        """(B, heads, n, K), laid out as the model does."""
        shape = (self.batch, n, heads, self.head_size)
        return torch.randn(shape, device=self.device, dtype=DTYPES[self.precision]).transpose(1, 2).requires_grad_()

    def work(self, schedule: Schedule, by_pieces: bool) -> Work:
        """All passes with a StridedState (`by_pieces`), or with a State, which masks and copies."""
        passes = schedule.passes(self.context)
        sizes = [len(p.positions) for p in passes]
        inputs = [
            (self.random_heads(self.heads, n), *(self.random_heads(self.groups, n) for _ in range(2))) for n in sizes
        ]
        empty = empty_state(
            1, (self.groups, self.head_size), (0, 1), self.batch, self.context, None, None, False,
            device=self.device, dtype=DTYPES[self.precision],
        )  # fmt: skip
        stride = common_stride(passes, self.context)
        if stride is None:
            raise ValueError(f"{schedule!r} has passes that are neither full nor classes r::S; choose another")

        def work() -> None:
            state: State | StridedState = StridedState.of(empty, stride) if by_pieces else dataclasses.replace(empty)
            total = torch.zeros((), device=self.device)
            for p, (q, k, v) in zip(passes, inputs, strict=True):
                with torch.set_grad_enabled(p.grad):
                    state = state.mark_written(p.positions)
                    slots: object = state.where(p.positions)
                    keys, values = state.write(state.keys[0], slots, k, 2), state.write(state.values[0], slots, v, 2)  # type: ignore[arg-type]
                    visible = state.visible(p.positions, self.window)
                    total = total + visible.attend(q, keys, values).float().sum()  # type: ignore[arg-type]
                    state = state.write_cache((keys,), (values,))  # type: ignore[arg-type]
            total.backward()

        return work

    def flex_work(self, schedule: Schedule) -> Work:
        """All passes by FlexAttention, which knows the mask as a function of positions. CUDA: no backward on CPUs."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        raise_recompile_limit(VARIANTS)  # each pass is a mask of its own; beyond torch's limit it would not be compiled
        attention = torch.compile(flex_attention, dynamic=False)  # uncompiled it holds all scores at once
        passes, window = schedule.passes(self.context), self.window
        inputs = []
        for p in passes:

            def is_visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor, p: Pass = p) -> Tensor:
                here = p.start + p.stride * i  # the position of the pass's i-th query; slot j holds position j
                return (j <= here) if window is None else (j <= here) & (j > here - window)

            n = len(p.positions)
            mask = create_block_mask(is_visible, None, None, n, self.context, device=self.device)
            keys_values = (self.random_heads(self.groups, n) for _ in range(2))
            inputs.append((p, mask, self.random_heads(self.heads, n), *keys_values))

        def work() -> None:
            total = torch.zeros((), device=self.device)
            keys = values = self.random_heads(self.groups, self.context).detach()
            for p, mask, q, k, v in inputs:
                with torch.set_grad_enabled(p.grad):
                    keys, values = (
                        x.slice_scatter(new, 2, p.start, p.stop, p.stride) for x, new in ((keys, k), (values, v))
                    )
                    total = total + attention(q, keys, values, block_mask=mask, enable_gqa=True).float().sum()  # type: ignore[union-attr]
            total.backward()

        return work
