"""A batch of rows: what the loaders give, and what the model and the loss take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORED = -1
"""The target that counts nowhere: padding, and what has no successor."""


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens, and what follows each of them."""

    tokens: torch.Tensor
    """(B, T) int64; padded with BOS."""
    targets: torch.Tensor
    """(B, T) int64: the token after each of `tokens`, or -1 where nothing is to be predicted."""
    documents: torch.Tensor | None = None
    """(B, T) int64: which document of its row a position belongs to, counted from 0, padding being one of its own.
    None where no row holds more than one document; padding, at the end, is then invisible to a causal model."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        documents = None if self.documents is None else self.documents.to(device)
        return Batch(self.tokens.to(device), self.targets.to(device), documents)
