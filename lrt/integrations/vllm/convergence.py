"""How far the chunks of a step have converged: the measures of lrt's own prefill, over tokens that lie side by side.

Chunks of about one length share the tensors of a `Moves`, in which rows are padded to the longest: at most to twice
their own length.

Shapes: N tokens of the step, B chunks of a bucket, T tokens of its longest, Q compared states, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrt.inference.certificate import Certificate
from lrt.inference.moves import Moves
from lrt.integrations.vllm.spans import Chunk

STRIKES = 2
"""A chunk is computed token by token after so many sweeps in a row that say that this takes fewer runs."""


@dataclass
class Bucket:
    """Chunks of about one length."""

    chunks: list[Chunk]
    index: Tensor
    """(B, T) int: where in the step each token stands; any in padding."""
    moves: Moves
    """Of what every sweep computes."""
    ends: Moves
    """Of the final hidden state where sweeps end below it, else of no columns."""
    strikes: list[int] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return [chunk.tokens for chunk in self.chunks]

    def record(self, values: Tensor) -> None:
        """What a sweep has computed: (N, Q, D) of the step."""
        self.moves.record(slice(0, self.index.shape[1]), values[self.index])
        self.moves.compare(0, self.lengths)

    def record_ends(self, hidden: Tensor, places: Sequence[int]) -> None:
        """The final hidden states (N, D) of the step, which are new for these chunks."""
        for place in set(range(len(self.chunks))) - set(places):
            self.ends.pause(place)
        if places:
            part = self.ends.select(list(places), self.index.shape[1])
            part.record(slice(0, self.index.shape[1]), hidden[self.index[list(places)]].unsqueeze(2))
            part.compare(0, [self.lengths[place] for place in places])
            self.ends.put(list(places), part)

    def settled(self, tolerance: float) -> list[int]:
        """Places of the chunks whose sweeps are within the tolerance."""
        worst = self.moves.worst(self.lengths)
        return [place for place, (move, _) in enumerate(worst) if self.moves.bound(place, move) <= tolerance]

    def certificate(self, place: int, groups: int, sweeps: int, tolerance: float) -> Certificate:
        """What can be said of a chunk after so many sweeps."""
        compared = [self.moves] + ([self.ends] if self.ends.values.shape[1] else [])
        worst = max(moves.worst(self.lengths)[place] for moves in compared)
        residuals = [moves.residual(place) for moves in compared]
        measured = [residual for residual in residuals if residual is not None]
        known = len(measured) == len(compared)
        rates = [rate for moves in compared if (rate := moves.contraction(place)) is not None]
        return Certificate(
            "sweeps",
            f"within {tolerance:g}",
            tokens=self.chunks[place].tokens,
            groups=groups,
            sweeps=sweeps,
            residual=max(measured) if known else None,
            worst=worst[0] if known else None,
            worst_position=self.chunks[place].position + worst[1] if known else None,
            contraction=max(rates) if self.moves.contraction(place) is not None else None,
            forwards=float(sweeps),
        )

    def too_slow(self, place: int, groups: int, done: int, tolerance: float) -> bool:
        """Whether STRIKES sweeps in a row have said that a run per token is fewer than the runs to go."""
        to_go = self.moves.sweeps_to_go(place, self.moves.worst(self.lengths)[place][0], tolerance)
        dear = to_go * groups > self.chunks[place].tokens
        self.strikes[place] = self.strikes[place] + 1 if dear and done > 1 else 0
        return self.strikes[place] >= STRIKES

    def select(self, places: list[int]) -> Bucket:
        """Some of the chunks."""
        length = max(self.chunks[place].tokens for place in places)
        return Bucket(
            [self.chunks[place] for place in places],
            self.index[places, :length],
            self.moves.select(places, length),
            self.ends.select(places, min(length, self.ends.values.shape[1])),
            [self.strikes[place] for place in places],
        )


def buckets(chunks: Sequence[Chunk], compared: int, ends: bool, like: Tensor) -> list[Bucket]:
    """Chunks by length, none more than twice as long as another of its bucket; `like` (…, D) gives width and type.

    compared: Q, the states that every sweep computes. ends: whether the final hidden state is measured apart.
    """

    def size(chunk: Chunk) -> int:
        return (chunk.tokens - 1).bit_length()

    groups = []
    for _, group in itertools.groupby(sorted(chunks, key=size), key=size):
        rows = list(group)
        longest = max(chunk.tokens for chunk in rows)
        columns = torch.arange(longest)
        index = torch.stack([chunk.start + columns.clamp(max=chunk.tokens - 1) for chunk in rows]).to(like.device)
        groups.append(
            Bucket(
                rows,
                index,
                Moves.of(len(rows), longest, compared, like),
                Moves.of(len(rows), longest if ends else 0, 1, like),
                [0] * len(rows),
            )
        )
    return groups
