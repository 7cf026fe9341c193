"""Has a model learned to copy from its context? Rows of tokens in random order, and then the same again, scored live.

A row is BOS and `length` tokens of held-out text, drawn one by one, then the same tokens in the same order: nothing but
copying makes the second time cheaper than the first (as rows of random tokens do for induction heads: Olsson et al.
2022, arXiv 2209.11895).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lrt.data.prepared import Documents
from lrt.data.windows import windows
from lrt.eval.scoring import score
from lrt.model.transformer import LatentRecurrentTransformer

ROWS, LENGTH = 64, 100
TEXT = 20_000
"""Tokens of the text that rows are drawn from."""


@dataclass(frozen=True)
class Copying:
    """Nats per token, live, of both times; without each one's first token, which has nothing to go by."""

    first: float
    again: float


def copying(
    model: LatentRecurrentTransformer, text: Documents, rows: int = ROWS, length: int = LENGTH, seed: int = 0
) -> Copying:
    """Score `rows` rows of 1 + 2 `length` tokens of a split; of a model with a shorter context, as many as it holds.

    ValueError for fewer than 2 tokens.
    """
    if not model.config.unlimited_context:
        length = min(length, (model.config.context - 1) // 2)
    if length < 2:
        raise ValueError(
            f"rows of twice {length} tokens have nothing to copy; give at least 2, and the context to hold them"
        )
    pieces = [batch.tokens.flatten() for batch in windows(text, model.config.context, TEXT).batches(ROWS)]
    tokens = torch.cat(pieces)
    places = torch.randint(len(tokens), (rows, length), generator=torch.Generator().manual_seed(seed))
    nats = score(model, torch.cat([torch.full((rows, 1), text.bos), tokens[places], tokens[places]], dim=1))
    return Copying(float(nats[:, 1:length].mean()), float(nats[:, length + 1 :].mean()))
