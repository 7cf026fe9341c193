"""Pages of keys, values and memory as an engine keeps them, with the plainest attention: any head size, any type.

Pages lie in no order, and hold NaN until they are written. A request's pages are named by its row of the block table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrt.integrations.vllm.paged_state import PagedState, Placement, memory_width
from lrt.integrations.vllm.spans import Chunk, Spans
from lrt.model.visibility import visible_keys

PAGE = 4


class PagedLayer:
    """One layer's keys and values, and who may see what."""

    def __init__(self, engine: PagedEngine, window: int | None) -> None:
        config = engine.model.config
        self.engine, self.window, self.groups = engine, window, config.num_kv_heads
        shape = (engine.count, PAGE, config.num_kv_heads, config.head_dim)
        self.keys, self.values = (torch.full(shape, torch.nan, dtype=engine.dtype) for _ in range(2))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place, positions = self.engine.place, self.engine.positions
        size = self.keys.shape[-1]
        here = place.slots // PAGE, place.slots % PAGE
        self.keys[here] = k.unflatten(1, (self.groups, size))
        self.values[here] = v.unflatten(1, (self.groups, size))
        keys, values = (x[place.blocks[place.rows]].flatten(1, 2) for x in (self.keys, self.values))  # (N, S, G, K)
        seen = visible_keys(positions[:, None], torch.arange(keys.shape[1]), self.window)[:, None, None]
        scores = torch.einsum("nghk,nsgk->nghs", q.unflatten(1, (self.groups, -1, size)), keys) / size**0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        # A page that nobody has written holds NaN, which times a weight of 0 would be seen.
        values = values.where(seen[:, 0, 0, :, None, None], 0)
        return torch.einsum("nghs,nsgk->nghk", weights, values).flatten(1)


class PagedEngine:
    """Requests of a model in pages. `step` places the tokens of a step; the engine is then a `Run`."""

    def __init__(self, model: Any, requests: int, length: int) -> None:
        self.model, self.dtype = model, model.embedding.weight.dtype
        each = -(-length // PAGE)
        self.count = requests * each + 1  # page 0 is nobody's
        order = torch.randperm(self.count - 1, generator=torch.Generator().manual_seed(0)) + 1
        self.blocks = order.view(requests, each)
        self.pages = torch.full((self.count, PAGE, memory_width(model.config)), torch.nan, dtype=self.dtype)
        self.layers = tuple(PagedLayer(self, window) for window in model.config.windows)
        self.runs = 0

    def step(self, tokens: Sequence[Tensor], starts: Sequence[int]) -> list[Chunk]:
        """Schedule these tokens (n,) of each request, from these positions on."""
        lengths = [len(row) for row in tokens]
        bounds = [sum(lengths[:i]) for i in range(len(lengths))]
        self.tokens = torch.cat(list(tokens))
        self.begins = torch.tensor(starts).repeat_interleave(torch.tensor(lengths))
        self.requests = torch.arange(len(starts)).repeat_interleave(torch.tensor(lengths))
        within = torch.arange(len(self.tokens)) - torch.tensor(bounds)[self.requests]
        self.everywhere = self.begins + within
        return [Chunk(i, bounds[i], n, starts[i]) for i, n in enumerate(lengths) if n]

    def __call__(
        self, spans: Spans, swept: bool, blocks: range | None = None, stream: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        self.runs += 1
        index = spans.index
        self.positions = self.everywhere[index]
        table = self.blocks[spans.requests]
        pages = table[spans.rows, self.positions // PAGE]
        self.place = Placement(table, spans.rows, pages * PAGE + self.positions % PAGE, self.begins[index])
        state = PagedState.of(self.model.config, self.layers, self.pages, self.place, swept)
        below = None if stream is None else stream.unsqueeze(0)
        with torch.no_grad():
            output, state = self.model(self.tokens[index][None], self.positions[None], state, blocks, below)
        return output[0], None if state.memory is None else state.memory[0]
