"""Some positions of each of the first rows of a State, as a flat function: a decoded token, or a class of a sweep.

The same numbers as `model(tokens, positions, state)`, over `fused_weights.py`; the State's buffers are overwritten.
`occupy` says where tokens stand that are decoded in order, one for each row, and `locate_class` where the positions of
a strided class do.

It is the model written a second time: functions of tensors, which torch.compile takes as one graph, over few large
products. So tests hold every configuration of the exactness tests against the oracle in each mode of `decoders.MODES`,
at ragged positions.

Shapes: R rows of this step, q positions of each, n = R·q (q = 1 when decoding), B rows, S slots, D width, C channels,
P remembered sources, H query heads, G key/value heads, K head size, W slots in view.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lrt.inference.fused_weights import FusedLayer, FusedWeights
from lrt.model.config import ModelConfig
from lrt.model.layers import rms, rotary
from lrt.model.state import State
from lrt.model.state_protocol import Positions
from lrt.model.visibility import additive, visible_keys
from lrt.utils.torch_private import packed_linear

RUNS, SHORTEST = 4, 16
"""On a CPU a class's queries are taken in so many runs, none shorter than this. Up to stride 16 a sweep is 2 to 6 %
faster so than in one run; eight are no faster (docs/log.md)."""


class Buffers(NamedTuple):
    """A State's buffers with rows and slots in one dimension, so that one index names a slot of a row."""

    keys: tuple[Tensor, ...]
    """One (B·G·S, K) per layer."""
    values: tuple[Tensor, ...]
    """Likewise."""
    memory: Tensor
    """(B·S, P, D)."""
    tokens: Tensor
    """(B·S,) int, -1 where unknown."""
    slot_positions: Tensor
    """(B·S,) int, the position that each slot holds, -1 for none."""
    documents: Tensor | None
    """(B·S,) int, or None where a row is one document."""
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
        slot_positions=state.slot_positions.view(-1),
        documents=None if documents is None else documents.contiguous().view(-1),
        slots=state.slots,
    )


class Part(NamedTuple):
    """A run of each row's queries, which look at the same slots."""

    first: int
    last: int
    """One past the last of them."""
    width: int
    """W: the slots looked at, 0 … W-1."""
    mask: Tensor | None
    """(R, 1, last - first, W), bool or added to scores; None where they see everything in view."""


class SlotPlacement(NamedTuple):
    """Where the positions of a step stand."""

    rows: int
    """R."""
    here: Tensor
    """(n,): each position's slot, counted over all rows."""
    cache: Tensor
    """(n·G,): the same among the slots of keys and values."""
    angles: tuple[Tensor, Tensor]
    """As `rotations` gives them: (n, 1, K) each."""
    parts: tuple[tuple[Part, ...], ...]
    """What is visible in each layer, in runs of queries; one run when decoding."""


class MemoryPlace(NamedTuple):
    """Where the memory of decoded rows is read from, one delay back."""

    slots: Tensor
    """(n,): counted over all rows."""
    inside: Tensor
    """(n, 1): whether that is a position of the same document."""


def locate_memory(b: Buffers, positions: Tensor, delay: int) -> MemoryPlace:
    """Where rows decoded in order, at `positions` (n,), read what stands `delay` positions back."""
    rows = torch.arange(positions.shape[0], device=positions.device)
    earlier = positions - delay
    slots = rows * b.slots + earlier.clamp(min=0) % b.slots  # before the beginning: any slot, as it is not `inside`
    inside = earlier >= 0
    if b.documents is not None:
        inside = inside & (b.documents[rows * b.slots + positions % b.slots] == b.documents[slots])
    return MemoryPlace(slots, inside.unsqueeze(1))


def occupy(p: FusedWeights, b: Buffers, positions: Tensor, view: Tensor, everything: bool) -> SlotPlacement:
    """Mark `positions` (n,) of rows decoded in order as written; where they stand, and what of `view` (W,) they see.

    The slots in view are 0 … W-1. everything: all of them are visible to every row, in every layer (one position for
    all, nothing slides).
    """
    rows = torch.arange(positions.shape[0], device=positions.device)
    here = rows * b.slots + positions % b.slots
    # Marked before the masks are made: a position sees itself.
    b.slot_positions.index_copy_(0, here, positions)
    windows = p.config.windows
    masks: dict[int | None, Tensor | None] = dict.fromkeys(windows)
    if not everything:
        masks = {window: rows_in_view(b, here, positions, view, window) for window in set(windows)}
    parts = tuple((Part(0, 1, view.shape[0], masks[window]),) for window in windows)
    return SlotPlacement(positions.shape[0], here, cache_slots(p, b, rows, positions), rotations(p, positions), parts)


def locate_class(p: FusedWeights, state: State, positions: Positions) -> SlotPlacement:
    """The place of `positions`, a range or (R, q) int, which an `in_place` State of R rows has just marked as written.

    On a CPU the queries are taken in runs, each of which looks at no slot behind its own last one: with a mask, its
    attention kernel computes what is masked as well.
    """
    config, b = p.config, buffers(state)
    index = state.index(positions).expand(state.batch, -1)
    rows = torch.arange(state.batch, device=index.device).unsqueeze(1)
    windows, runs = config.windows, [(0, index.shape[1], state.slots)]  # a run: first query, one past its last, width
    if index.device.type == "cpu":
        count = index.shape[1]
        cuts = range(0, count, max(SHORTEST, -(-count // RUNS)))
        ends = [min(cut + cuts.step, count) for cut in cuts]
        wide = [int(index[:, first:last].max()) + 1 for first, last in zip(cuts, ends, strict=True)]
        # A position beyond the slots stands anywhere among them.
        runs = [(first, last, w if w <= b.slots else b.slots) for first, last, w in zip(cuts, ends, wide, strict=True)]
    parts = {
        window: tuple(
            Part(first, last, width, class_mask(state, index[:, first:last], width, window, p.embedding))
            for first, last, width in runs
        )
        for window in set(windows)
    }
    return SlotPlacement(
        state.batch,
        (rows * b.slots + index % b.slots).flatten(),
        cache_slots(p, b, rows, index),
        rotations(p, index.flatten()),
        tuple(parts[window] for window in windows),
    )


def class_mask(state: State, positions: Tensor, width: int, window: int | None, like: Tensor) -> Tensor:
    """(R, 1, q, W), 0 or -inf: what positions (R, q) see of the first W slots."""
    keys = state.slot_positions[:, None, :width]
    return additive(visible_keys(positions.unsqueeze(2), keys, window), like).unsqueeze(1)


def cache_slots(p: FusedWeights, b: Buffers, rows: Tensor, positions: Tensor) -> Tensor:
    """(n·G,): the slots of `positions` in a layer's keys and values; rows and positions (n,), or (R, 1) and (R, q)."""
    heads = torch.arange(p.config.num_kv_heads, device=positions.device)
    return (
        (rows.unsqueeze(-1) * p.config.num_kv_heads + heads) * b.slots + (positions % b.slots).unsqueeze(-1)
    ).flatten()


def rotations(p: FusedWeights, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine, and sine with the second half's sign turned, of positions (n,): (n, 1, K) each.

    `layers.rotate` is then x · cos + (x with its halves exchanged) · sin.
    """
    cos, sin = rotary(positions, p.config.head_dim, p.config.rope_base, p.embedding)
    return torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)


def rows_in_view(b: Buffers, here: Tensor, positions: Tensor, view: Tensor, window: int | None) -> Tensor:
    """(n, 1, 1, W) bool: what each row's position (n,), already marked as written, sees of the slots in view."""
    count, width = positions.shape[0], view.shape[0]
    keys = b.slot_positions.view(-1, b.slots)[:count, :width]
    own = documents = None
    if b.documents is not None:
        own, documents = b.documents[here].unsqueeze(1), b.documents.view(-1, b.slots)[:count, :width]
    return visible_keys(positions.unsqueeze(1), keys, window, own, documents).unsqueeze(1).unsqueeze(1)


def read_memory(p: FusedWeights, b: Buffers, positions: Tensor) -> Tensor:
    """The memory (C, n, D) that rows decoded in order, at `positions` (n,), read.

    All that lies before them is written, so that there is no stand-in (`MemoryConfig.initial`) to put in.
    """
    config = p.config
    if not config.sources:
        return p.embedding.new_zeros(0, positions.shape[0], config.width)
    reads = tuple(zip(config.sources, config.delays, strict=True))
    places = {delay: locate_memory(b, positions, delay) for delay in dict.fromkeys(config.delays)}
    inside = {delay: place.inside.to(p.embedding) for delay, place in places.items()}
    # What two sources share, of one delay, is read once.
    remembered = {d: b.memory.index_select(0, places[d].slots) for d in dict.fromkeys(d for s, d in reads if s > 0)}
    tokens = {d: b.tokens.index_select(0, places[d].slots) for d in dict.fromkeys(d for s, d in reads if s == 0)}
    embedded = {d: p.embedding[known.clamp(min=0)] for d, known in tokens.items()}
    parts = [
        embedded[delay] if source == 0 else remembered[delay][:, config.stored_sources.index(source)]
        for source, delay in reads
    ]
    if p.recall is None:
        return torch.stack([part * inside[delay] for part, (_, delay) in zip(parts, reads, strict=True)])
    weighted = [w * part for w, part in zip(p.recall, parts, strict=True)]
    sums = [
        sum(part for part, (_, own) in zip(weighted, reads, strict=True) if own == delay) * inside[delay]
        for delay in places
    ]
    return rms(reduce(torch.add, sums)).unsqueeze(0)


def step(
    p: FusedWeights,
    b: Buffers,
    memory: Tensor,
    tokens: Tensor,
    place: SlotPlacement,
    thought: Tensor | None = None,
    stream: Tensor | None = None,
) -> Tensor:
    """The final hidden state (n, D) of tokens (n,), whose memory is (C, n, D), at a place. Writes the State's buffers.

    thought (n, D) stands in the place of the tokens' embeddings where they are latent thoughts. Weights of some blocks
    start from the stream (n, D) behind those before them, and give the stream behind their own where others follow.
    """
    config = p.config
    b.tokens.index_copy_(0, place.here, tokens)
    x0 = p.embedding[tokens] if thought is None else thought
    x = x0 if stream is None else stream
    count = tokens.shape[0]
    # β x_0 + Σ γ m of all these blocks: they need no layer to be computed first. (blocks, n·D)
    added = p.mix @ torch.cat((x0.unsqueeze(0), memory)).flatten(1)
    # Per channel and set (n, 2, G, K): U_k m and U_v m; no channel's where memory enters the residual stream alone.
    projected = [
        ()
        if weight is None
        else product(channel, weight).view(count, -1, 2, config.num_kv_heads, config.head_dim).unbind(1)
        for channel, weight in zip(memory, p.projection, strict=False)
    ]
    remembered = config.stored_sources
    outputs: dict[int, Tensor] = {}
    for i, layer in enumerate(p.layers, start=p.first):
        x = torch.addcmul(added[i - p.first].view(count, -1), x, layer.alpha)  # α x + β x_0 + Σ γ m
        own = [projected[channel][pair] for channel, pair in layer.projection or ()]
        q = write_layer(config, b, layer, i, rms(x), tokens, own, place)
        y = attend(config, b, i, q.unflatten(0, (place.rows, -1)).transpose(1, 2), place)
        x = added_product(x, y.transpose(1, 2).reshape(count, -1), layer.out)
        x = added_product(x, F.relu(product(rms(x), layer.up)).square(), layer.down)
        number = i % config.depth + 1
        if number in remembered or number == config.depth:
            outputs[number] = rms(x)  # the last loop's stays
    if remembered and outputs.keys() >= set(remembered):  # else these blocks lie above all of them
        b.memory.index_copy_(0, place.here, torch.stack([outputs[s] for s in remembered], 1))
    return outputs[config.depth] if p.first + len(p.layers) == config.kv_layers else x


def write_layer(
    config: ModelConfig,
    b: Buffers,
    layer: FusedLayer,
    index: int,
    u: Tensor,
    tokens: Tensor,
    projected: Sequence[Tensor],
    place: SlotPlacement,
) -> Tensor:
    """Keys and values of one layer into its cache; the queries (n, H, K).

    u (n, D) is the block's normalised input, projected what U gives, (n, 2, G, K) per channel that the block adds.
    """
    heads, groups, size = config.heads, config.num_kv_heads, config.head_dim
    out = product(u, layer.inputs)
    split = (heads + 2 * groups) * size  # columns: queries, keys, values | gates
    gates = torch.sigmoid(out[:, split:]).unflatten(1, (-1, 1, groups, 1)) if out.shape[1] > split else None
    kv = out[:, heads * size : split].unflatten(1, (2, groups, size))
    if layer.projection is not None and gates is not None:  # σ alone: the gates' 2 is in the weights of k, v and U
        kv = kv * gates[:, 0]
        for channel, added in enumerate(projected, start=1):
            kv = torch.addcmul(kv, gates[:, channel], added)
    k, v = kv.unbind(1)
    if layer.table is not None and gates is not None:  # its gate is the last one; its 2 is here
        v = torch.addcmul(v, gates[:, -1, 0], F.embedding(tokens, layer.table).unflatten(1, (groups, size)), value=2)
    qk = torch.cat((out[:, : heads * size].unflatten(1, (heads, size)), k), 1)
    cos, sin = place.angles
    qk = rms(torch.addcmul(qk * cos, qk.roll(size // 2, -1), sin))
    b.keys[index].index_copy_(0, place.cache, qk[:, heads:].reshape(-1, size))
    b.values[index].index_copy_(0, place.cache, v.reshape(-1, size))
    return qk[:, :heads]


def attend(config: ModelConfig, b: Buffers, index: int, q: Tensor, place: SlotPlacement) -> Tensor:
    """Softmax attention (R, H, q, K) of one layer's queries (R, H, q, K), run by run."""
    outputs = []
    for part in place.parts[index]:
        keys, values = (
            slots_in_view(c, place.rows, config.num_kv_heads, b.slots, part.width)
            for c in (b.keys[index], b.values[index])
        )
        own = q if len(place.parts[index]) == 1 else q[:, :, part.first : part.last]
        outputs.append(
            F.scaled_dot_product_attention(
                own, keys, values, attn_mask=part.mask, enable_gqa=config.num_kv_heads != config.heads
            )
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (n, in) times a weight (in, out), or one in oneDNN's layout (`packed_layout`)."""
    if weight.is_mkldnn:
        return packed_linear(x, weight)
    return x @ weight


def added_product(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """x + y · weight, with the sum in the product where the weight's layout allows it."""
    return x + product(y, weight) if weight.is_mkldnn else torch.addmm(x, y, weight)


def slots_in_view(cache: Tensor, count: int, groups: int, slots: int, width: int) -> Tensor:
    """(n, G, W, K): the first rows and slots of a layer's cache."""
    return cache.view(-1, groups, slots, cache.shape[-1])[:count, :, :width]


def logits(p: FusedWeights, hidden: Tensor) -> Tensor:
    """Next-token logits (n, V) of hidden states (n, D), soft-capped."""
    cap = p.config.softcap
    return cap * torch.tanh(product(hidden, p.head) / cap)
