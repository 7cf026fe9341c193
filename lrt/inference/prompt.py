"""The rows of a prompt that are computed together: tokens, where each row stands, and which columns it has.

Shapes: B rows, T prompt positions (rows right-padded to the longest), D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrt.model.state_protocol import Positions


@dataclass(frozen=True)
class Prompt:
    """Rows that are computed together."""

    tokens: Tensor
    """(B, T) int, padded on the right; T is the longest row's length."""
    lengths: list[int]
    """Tokens of each row, at least one."""
    starts: list[int]
    """Position of each row's first token."""

    @property
    def length(self) -> int:
        return max(self.lengths)

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def ends(self) -> Tensor:
        """(B,) int: one past each row's last position."""
        return torch.tensor([s + n for s, n in zip(self.starts, self.lengths, strict=True)], device=self.tokens.device)

    def positions(self, columns: range) -> Positions:
        """The positions of these columns: a range where the rows start alike, else (B, n)."""
        first = self.starts[0]
        # Python knows which slots a range sees; ints need masks made of tensors.
        if all(s == first for s in self.starts):
            return range(first + columns.start, first + columns.stop, columns.step)
        index = torch.arange(columns.start, columns.stop, columns.step, device=self.tokens.device)
        return torch.tensor(self.starts, device=index.device).unsqueeze(1) + index

    def select(self, rows: list[int]) -> Prompt:
        """Some of the rows, without the padding that none of them needs."""
        lengths = [self.lengths[i] for i in rows]
        tokens = self.tokens[torch.tensor(rows, device=self.tokens.device), : max(lengths)]
        return Prompt(tokens, lengths, [self.starts[i] for i in rows])

    def columns(self, begin: int, end: int) -> Prompt:
        """Columns begin … end-1 of rows that all have some of them."""
        lengths = [min(n, end) - begin for n in self.lengths]
        return Prompt(self.tokens[:, begin:end], lengths, [s + begin for s in self.starts])

    def zero_padding(self, hidden: Tensor) -> Tensor:
        """Hidden (B, T, D) with zeros in the padding."""
        lengths = torch.tensor(self.lengths, device=hidden.device).unsqueeze(1)
        padding = torch.arange(self.length, device=hidden.device) >= lengths
        return hidden.masked_fill(padding.unsqueeze(2), 0)

    def last_position(self, hidden: Tensor) -> Tensor:
        """Of hidden (B, T, D) each row's last position, (B, 1, D)."""
        rows = torch.arange(self.rows, device=hidden.device)
        return hidden[rows, torch.tensor(self.lengths, device=hidden.device) - 1].unsqueeze(1)
