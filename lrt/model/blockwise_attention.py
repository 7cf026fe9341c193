"""Attention in pieces: flash kernels over rectangles and triangles, merged by log-sum-exp, with an exact backward.

Shapes: B batch, H query heads, G key/value heads, n queries, m keys of one source, K head size.

A pass's keys lie in several tensors (sources), none of which is copied. Each piece is a run of queries against a run of
one source's keys, for which a library's kernel gives output and log-sum-exp; outputs are merged with the weights that
the log-sum-exps imply. The backward calls the kernels' backward per piece with the *merged* output and log-sum-exp:
then exp(s - lse) is the softmax over all keys, and each piece's gradients are exact (as in ring attention, 2310.01889).

Which pieces there are is decided by `strided_state.py`. Kernels: the CPU's flash; on CUDA flash for half precision
without masks, the memory-efficient one for the rest; the plain form elsewhere, in float64 on CUDA, and where this torch
lacks one of these private operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lrt.model.attention_pieces import AttentionPiece, Merged, Total
from lrt.utils import torch_private


@dataclass(frozen=True)
class Kernel:
    """Attention of one piece, with its log-sum-exp. Scores are scaled by 1/√K; there is no dropout (the 0.0 below)."""

    forward: Callable[..., tuple[Any, ...]]
    """(q, k, v, causal, mask) -> output (B, H, n, K), log-sum-exp (B, H, n), and extras that its backward wants.

    A query that sees no key has output 0 and log-sum-exp -inf, so that it weighs nothing when pieces are merged."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(gradient, q, k, v, output, log-sum-exp, causal, mask, *extras) -> gradients of q, k, v.

    A query that sees no key comes with a log-sum-exp of +inf (`mask_empty`)."""
    operators: tuple[torch_private.Operator, ...] = ()
    """torch's private operators that it calls."""


# --- kernels ----------------------------------------------------------------------------------------------------------
def attention_scores(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """(B, H, n, m), at least float32."""
    s = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -math.inf)
    return s if mask is None else s + mask


# Each pair below is a Kernel's `forward` and `backward`, whose shapes are given there.
def plain_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    s = attention_scores(q, k, causal, mask)
    lse = s.logsumexp(-1)
    return (s - mask_empty(lse).unsqueeze(-1)).exp().to(v.dtype) @ v, lse


def plain_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    p = (attention_scores(q, k, causal, mask) - lse.unsqueeze(-1)).exp()
    # dS = P ∘ (dP - rowsum(dO ∘ O)), FlashAttention's backward (2205.14135). With the merged O and lse the row sum runs
    # over all pieces, so that a piece needs to know nothing of the others.
    dp = (g @ v.mT).to(p.dtype) - (g * out).to(p.dtype).sum(-1, keepdim=True)
    ds = (p * dp / math.sqrt(q.shape[-1])).to(q.dtype)
    return ds @ k, ds.mT @ q, p.to(g.dtype).mT @ g


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = torch_private.CPU_FLASH(q, k, v, 0.0, causal, attn_mask=mask)
    if mask is not None:  # where nothing is visible, the kernel says 0
        lse = lse.masked_fill((mask == -math.inf).all(-1), -math.inf)
    return out, lse


def cpu_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    backward = torch_private.CPU_FLASH_BACKWARD
    return backward(g, q, k, v, out, lse, 0.0, causal, attn_mask=mask)


def cuda_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Any, ...]:
    assert mask is None
    out, lse, *extras, _ = torch_private.CUDA_FLASH(q, k, v, 0.0, causal)  # the last is a debugging mask
    return out, lse, *extras


def cuda_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, mask: None, *extras: Any
) -> tuple[Tensor, Tensor, Tensor]:
    first_q, first_k, max_q, max_k, seed, offset = extras  # rows' lengths, and the state of dropout's generator
    backward = torch_private.CUDA_FLASH_BACKWARD
    lse = lse.contiguous()  # the kernel takes no strides for it
    return backward(g, q, k, v, out, lse, first_q, first_k, max_q, max_k, 0.0, causal, seed, offset)


def efficient_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Any, ...]:
    attention = torch_private.CUDA_EFFICIENT
    out, lse, *extras = attention(q, k, v, align_mask(mask, q), True, 0.0, causal)  # True: the log-sum-exp, too
    lse = lse[:, :, : q.shape[2]]  # it comes padded
    if mask is not None:  # whatever the kernel says of a query that sees nothing
        blind = (mask == -math.inf).all(-1)
        out, lse = out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -math.inf)
    return out, lse, *extras


def efficient_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    mask: Tensor | None,
    *extras: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    backward = torch_private.CUDA_EFFICIENT_BACKWARD
    lse = F.pad(lse, (0, -lse.shape[-1] % 32)).contiguous()  # as the forward gave it: multiples of 32
    wanted = [True, True, True, False]  # gradients of q, k, v; the mask has none
    return backward(g, q, k, v, align_mask(mask, q), out, lse, *extras, 0.0, wanted, causal)[:3]


def align_mask(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask for every head, its rows starting at multiples of 16 elements: the kernel loads them in vectors."""
    if mask is None:
        return None
    padded = F.pad(mask, (0, -mask.shape[-1] % 16))[..., : mask.shape[-1]]
    return padded.expand(*q.shape[:2], -1, -1)


PLAIN = Kernel(plain_forward, plain_backward)
"""Written out: the reference of the others, and what serves where there is no kernel."""
CPU = Kernel(cpu_forward, cpu_backward, (torch_private.CPU_FLASH, torch_private.CPU_FLASH_BACKWARD))
CUDA = Kernel(cuda_forward, cuda_backward, (torch_private.CUDA_FLASH, torch_private.CUDA_FLASH_BACKWARD))
EFFICIENT = Kernel(
    efficient_forward, efficient_backward, (torch_private.CUDA_EFFICIENT, torch_private.CUDA_EFFICIENT_BACKWARD)
)


def choose_kernel(q: Tensor, masked: bool) -> Kernel:
    """The fastest kernel for these queries. Warns, once, where this torch lacks it, and takes the plain form.

    CUDA's flash takes half precision and no mask, the other one no float64; both want head sizes in multiples of 8.
    """
    if q.device.type == "cpu":
        kernel = CPU
    elif q.device.type != "cuda" or q.dtype == torch.float64 or q.shape[-1] % 8:
        kernel = PLAIN
    else:
        kernel = EFFICIENT if masked or q.dtype == torch.float32 else CUDA
    if not torch_private.available(*kernel.operators):
        torch_private.warn_missing(
            f"its attention kernel for {q.device.type}", "plain attention is used, which is slower"
        )
        return PLAIN
    return kernel


def kernel_type(x: Tensor) -> torch.dtype:
    """The type in which kernels get x: its own, but float32 for bfloat16 on a CPU without matrix units (AMX).

    In bfloat16 the CPU's kernel takes 1.3 of float32's time there, in float32 with the casts 1.1 (docs/log.md,
    2026-11-30). With AMX nothing was measured, and it gets what there is.
    """
    slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch_private.has_amx()
    return torch.float32 if slow else x.dtype


def mask_empty(lse: Tensor) -> Tensor:
    """A query without a key has log-sum-exp -inf, and scores of -inf; with +inf, exp(s - lse) is 0 and not nan."""
    return lse.masked_fill(lse == -math.inf, math.inf)


# --- pieces -----------------------------------------------------------------------------------------------------------
def attend(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], pieces: Sequence[AttentionPiece]) -> Tensor:
    """Softmax attention (B, H, n, K) of q (B, H, n, K) over all pieces' keys; sources (B, G, m, K).

    The first pieces must reach every query, in order: what comes later is merged into what is there. So no buffer is
    filled with zeros first, and a single piece is not copied at all.
    """
    out: Tensor = Attend.apply(q, pieces, *keys, *values)  # type: ignore[assignment]
    return out


def attend_reference(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], pieces: Sequence[AttentionPiece]
) -> Tensor:
    """The plain form of `attend`: one softmax over the scores of all pieces."""
    n, parts = q.shape[2], []
    repeat = q.shape[1] // keys[0].shape[1]
    columns = [torch.arange(k.shape[2], device=q.device) for k in keys]
    for i, k in enumerate(keys):
        s = (q @ k.repeat_interleave(repeat, 1).mT) / math.sqrt(q.shape[-1])
        seen = torch.full(s.shape, -math.inf, dtype=s.dtype, device=s.device)  # no piece: not visible
        for piece in pieces:
            if piece.source != i:
                continue
            for block in range(piece.repeat.blocks):
                further, step = block * piece.repeat.pitch, piece.keys.step or 1
                rows = torch.arange(n, device=q.device)[piece.rows] + further
                at = columns[i][piece.keys] + further * step
                add = torch.zeros(len(rows), len(at), dtype=s.dtype, device=s.device)
                if piece.causal:
                    add = add.masked_fill(torch.ones_like(add, dtype=torch.bool).triu(1), -math.inf)
                if piece.mask is not None:
                    add = add + piece.mask(s)
                seen[:, :, rows.unsqueeze(1), at] = add.expand(*s.shape[:2], -1, -1)
        parts.append(s + seen)
    whole = torch.cat(parts, -1)
    blind = (whole == -math.inf).all(-1, keepdim=True)  # queries without a key give 0, where softmax gives nan
    p = whole.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return p @ torch.cat([v.repeat_interleave(repeat, 1) for v in values], 2)


class Attend(torch.autograd.Function):
    """`attend`, with its exact backward.

    Keys and values are given one by one, all keys and then all values: autograd sees only tensors that are arguments
    themselves, not those within a list.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, pieces: Sequence[AttentionPiece], *sources: Tensor) -> Tensor:
        """q (B, H, n, K), sources (B, G, m, K), m each its own -> (B, H, n, K)."""
        query, *wide = (x.to(kernel_type(q)) for x in (q, *sources))  # what is kept stays in its own type
        keys, values = wide[: len(wide) // 2], wide[len(wide) // 2 :]
        repeat = q.shape[1] // keys[0].shape[1]
        merged, kernel_calls = Merged(query), []
        for piece in pieces:
            mask = None if piece.mask is None else piece.mask(query)
            k, v = (repeat_groups(piece.of_keys(x[piece.source]), repeat) for x in (keys, values))
            kernel = choose_kernel(query, mask is not None)
            part, lse, *extras = kernel.forward(piece.of_rows(query), k, v, piece.causal, mask)
            merged.add(piece.rows, part, lse, piece.repeat)
            kernel_calls.append((kernel, extras))
        out, lse = merged.result()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, out, lse, *sources)
        # Inputs and outputs have to go through save_for_backward (else a reference cycle keeps them). What a kernel
        # made besides, a few numbers and the generator's state, is neither. Masks are made again, not kept.
        ctx.pieces, ctx.kernel_calls = pieces, kernel_calls
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """From the gradient (B, H, n, K): those of q, of `pieces` (None), and of each of `sources`."""
        kept_q, kept_out, lse, *sources = ctx.saved_tensors
        g, q, out, *wide = (x.to(kernel_type(kept_q)) for x in (*grads, kept_q, kept_out, *sources))
        keys, values = wide[: len(wide) // 2], wide[len(wide) // 2 :]
        repeat = q.shape[1] // keys[0].shape[1]
        lse = mask_empty(lse) if any(piece.mask for piece in ctx.pieces) else lse
        d_q, d_keys, d_values = Total(q), [Total(k) for k in keys], [Total(v) for v in values]
        for piece, (kernel, extras) in zip(ctx.pieces, ctx.kernel_calls, strict=True):
            i, mask = piece.source, None if piece.mask is None else piece.mask(q)
            k, v = (repeat_groups(piece.of_keys(x[i]), repeat) for x in (keys, values))
            g_rows, q_rows, out_rows, lse_rows = (piece.of_rows(x) for x in (g, q, out, lse))
            dq, dk, dv = kernel.backward(g_rows, q_rows, k, v, out_rows, lse_rows, piece.causal, mask, *extras)
            d_q.add(piece.rows, dq, piece.repeat)
            d_keys[i].add(piece.keys, sum_groups(dk, repeat), piece.repeat)
            d_values[i].add(piece.keys, sum_groups(dv, repeat), piece.repeat)
        dq, *others = (total.result().to(kept_q.dtype) for total in (d_q, *d_keys, *d_values))
        return dq, None, *others


def repeat_groups(x: Tensor, repeat: int) -> Tensor:
    """Keys or values (B, G, m, K) for every query head, (B, H, m, K): the kernels here get as many heads as queries."""
    return x if repeat == 1 else x.repeat_interleave(repeat, 1)


def sum_groups(x: Tensor, repeat: int) -> Tensor:
    """The inverse for gradients: (B, H, m, K) summed over the query heads that share a key head, (B, G, m, K)."""
    return x if repeat == 1 else x.unflatten(1, (-1, repeat)).sum(2)
