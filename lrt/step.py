"""One decoded token for each of the first n rows of a State, each at a position of its own: a flat function.

The same numbers as `model(tokens, positions, state)`, with the products of `lrt.products`; the State's buffers are
overwritten. Every position below a row's own must have been written, as decoding in order does.

Shapes: n rows of this step, B rows, S slots, D width, C channels, P remembered sources, H query heads, G key/value
heads, K head size, W slots in view.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lrt.config import ModelConfig
from lrt.model.layers import rms, rotary
from lrt.model.state import State
from lrt.products import LayerProducts, Products


class Buffers(NamedTuple):
    """A State's buffers with rows and slots in one dimension, so that one index names a slot of a row."""

    keys: tuple[Tensor, ...]
    """One (B·G·S, K) per layer."""
    values: tuple[Tensor, ...]
    memory: Tensor
    """(B·S, P, D)."""
    tokens: Tensor
    """(B·S,)."""
    held: Tensor
    """(B·S,)."""
    documents: Tensor | None
    """(B·S,)."""
    slots: int
    """S."""


def buffers(state: State) -> Buffers:
    """Views of an `in_place` State's buffers, which must be contiguous."""
    documents = state.documents
    return Buffers(
        keys=tuple(k.view(-1, k.shape[-1]) for k in state.keys),
        values=tuple(v.view(-1, v.shape[-1]) for v in state.values),
        memory=state.memory.flatten(0, 1),
        tokens=state.tokens.view(-1),
        held=state.held.view(-1),
        documents=None if documents is None else documents.contiguous().view(-1),
        slots=state.slots,
    )


class Place(NamedTuple):
    """Where the rows of a step stand."""

    here: Tensor
    """(n,): each row's slot, counted over all rows."""
    cache: Tensor
    """(n·G,): the same among the slots of keys and values."""
    before: Tensor
    """(n,): the slot that the row's memory is read from."""
    inside: Tensor
    """(n, 1): whether that is a position of the same document."""
    angles: tuple[Tensor, Tensor]
    """Cosine, and sine with the first half's sign turned: (n, 1, K) each."""
    masks: tuple[Tensor | None, ...]
    """(n, 1, 1, W) bool for each layer; None where a row sees everything in view."""


def locate(p: Products, b: Buffers, positions: Tensor, view: Tensor, everything: bool) -> Place:
    """The place of rows at `positions` (n,); `view` (W,) are the slots looked at, 0 … W-1.

    everything: all of them are visible to every row, in every layer (one position for all, nothing slides).
    """
    config = p.config
    rows = torch.arange(positions.shape[0], device=positions.device) * b.slots
    earlier = positions - config.memory.delay
    here, before = rows + positions % b.slots, rows + earlier.clamp(min=0) % b.slots
    heads = torch.arange(config.groups, device=positions.device) * b.slots
    cache = (rows * config.groups + positions % b.slots).unsqueeze(1) + heads
    inside = earlier >= 0
    if b.documents is not None:
        inside = inside & (b.documents[here] == b.documents[before])
    cos, sin = rotary(positions, config.head_dim, config.rope_base, p.embedding)
    angles = torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)
    windows = config.windows()
    found = dict.fromkeys(windows)
    if not everything:
        found = {window: visible(b, here, positions, view, window) for window in set(windows)}
    masks = tuple(found[window] for window in windows)
    return Place(here, cache.flatten(), before, inside.unsqueeze(1), angles, masks)


def visible(b: Buffers, here: Tensor, positions: Tensor, view: Tensor, window: int | None) -> Tensor:
    """(n, 1, 1, W): position p sees held slots <= p of its own document, within the window. Itself included."""
    count, width = positions.shape[0], view.shape[0]
    held = b.held.view(-1, b.slots)[:count, :width]
    current = positions.unsqueeze(1)
    # The row's own slot is about to be written, whatever it holds now.
    own = view == current % b.slots
    mask = (held >= 0) & (held < current)
    if window is not None:
        mask = mask & (held > current - window)
    if b.documents is not None:
        mask = mask & (b.documents.view(-1, b.slots)[:count, :width] == b.documents[here].unsqueeze(1))
    return ((mask & ~own) | own).unsqueeze(1).unsqueeze(1)


def recall(p: Products, b: Buffers, before: Tensor, inside: Tensor) -> Tensor:
    """The memory (C, n, D) that the rows read: of the slots `before` (n,), zeros where not `inside` (n, 1)."""
    memory = p.config.memory
    sources, stored = memory.sources(p.config.depth), memory.remembered(p.config.depth)
    if not sources:
        return p.embedding.new_zeros(0, before.shape[0], p.config.width)
    parts: list[Tensor] = []
    if stored:
        held = b.memory.index_select(0, before)
        parts = [held[:, stored.index(s)] for s in sources if s > 0]
    if 0 in sources:
        parts.insert(sources.index(0), p.embedding[b.tokens.index_select(0, before).clamp(min=0)])
    inside = inside.to(p.embedding)
    if p.recall is None:
        return torch.stack([part * inside for part in parts])
    return rms(sum(w * part for w, part in zip(p.recall, parts, strict=True)) * inside).unsqueeze(0)


def step(
    p: Products, b: Buffers, memory: Tensor, tokens: Tensor, positions: Tensor, place: Place, width: int
) -> Tensor:
    """The final hidden state (n, D) of tokens (n,) at `positions` (n,), whose memory is (C, n, D). Writes the State."""
    config = p.config
    b.tokens.index_copy_(0, place.here, tokens)
    b.held.index_copy_(0, place.here, positions)
    x = x0 = p.embedding[tokens]
    count = tokens.shape[0]
    added = p.mix @ torch.cat((x0.unsqueeze(0), memory)).flatten(1)  # (L, n·D)
    projected = None if p.projection is None else torch.matmul(memory, p.projection)  # (C, n, sets·2·G·K)
    remembered = config.memory.remembered(config.depth)
    outputs: dict[int, Tensor] = {}
    for i, layer in enumerate(p.layers):
        x = torch.addcmul(added[i].view(count, -1), x, layer.alpha)
        q = write(config, b, layer, i, rms(x), tokens, projected, place)
        keys, values = (seen(cache, count, config.groups, b.slots, width) for cache in (b.keys[i], b.values[i]))
        y = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=place.masks[i], enable_gqa=config.groups != config.heads
        )
        x = added_product(x, y.flatten(1), layer.out)
        x = added_product(x, F.relu(product(rms(x), layer.up)).square(), layer.down)
        if i + 1 in remembered or i + 1 == config.depth:
            outputs[i + 1] = rms(x)
    if remembered:
        b.memory.index_copy_(0, place.here, torch.stack([outputs[s] for s in remembered], 1))
    return outputs[config.depth]


def write(
    config: ModelConfig,
    b: Buffers,
    layer: LayerProducts,
    index: int,
    u: Tensor,
    tokens: Tensor,
    projected: Tensor | None,
    place: Place,
) -> Tensor:
    """Keys and values of one layer into its cache; the queries (n, H, 1, K). u (n, D) is the block's input."""
    heads, groups, size = config.heads, config.groups, config.head_dim
    out = product(u, layer.inputs)
    split = (heads + 2 * groups) * size
    gates = torch.sigmoid(out[:, split:]).unflatten(1, (-1, 1, groups, 1)) if out.shape[1] > split else None
    kv = out[:, heads * size : split].unflatten(1, (2, groups, size))
    if layer.projection is not None and projected is not None and gates is not None:
        kv = kv * gates[:, 0]
        sets = projected.view(len(projected), len(u), -1, 2, groups, size)[:, :, layer.projection]
        for channel, added in enumerate(sets):
            kv = torch.addcmul(kv, gates[:, 1 + channel], added)
    k, v = kv.unbind(1)
    if layer.table is not None and gates is not None:
        v = torch.addcmul(v, gates[:, -1, 0], F.embedding(tokens, layer.table).unflatten(1, (groups, size)), value=2)
    qk = torch.cat((out[:, : heads * size].unflatten(1, (heads, size)), k), 1)
    cos, sin = place.angles
    qk = rms(torch.addcmul(qk * cos, qk.roll(size // 2, -1), sin))
    b.keys[index].index_copy_(0, place.cache, qk[:, heads:].reshape(-1, size))
    b.values[index].index_copy_(0, place.cache, v.reshape(-1, size))
    return qk[:, :heads].unsqueeze(2)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (n, in) times a weight (in, out), or one packed for the CPU."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, None, "none", [], "")
    return x @ weight


def added_product(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """x + y · weight."""
    return x + product(y, weight) if weight.is_mkldnn else torch.addmm(x, y, weight)


def seen(cache: Tensor, count: int, groups: int, slots: int, width: int) -> Tensor:
    """(n, G, W, K): the first rows and slots of a layer's cache."""
    return cache.view(-1, groups, slots, cache.shape[-1])[:count, :, :width]


def logits(p: Products, hidden: Tensor) -> Tensor:
    """Next-token logits (n, V) of hidden states (n, D), soft-capped."""
    cap = p.config.softcap
    return cap * torch.tanh(product(hidden, p.head) / cap)
