"""Tokens as digits beside a memory: caches of other engines hold floating-point numbers alone.

Four digits of base 256, which bfloat16 too represents exactly. A token is stored plus one, so that zeros are none.
"""

from __future__ import annotations

import torch
from torch import Tensor

DIGITS, BASE = 4, 256


def encode_digits(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens (…), -1 for none, as digits (…, DIGITS)."""
    places = BASE ** torch.arange(DIGITS, device=tokens.device)
    return ((tokens.unsqueeze(-1) + 1) // places % BASE).to(dtype)


def decode_digits(digits: Tensor) -> Tensor:
    """The inverse of `encode_digits`: (…, DIGITS) to (…) int."""
    return (digits.long() * BASE ** torch.arange(DIGITS, device=digits.device)).sum(-1) - 1
