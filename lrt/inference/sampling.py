"""How the next token is drawn, row by row: what one row gets depends on its own logits, seed and position alone.

It is the inverse of the cumulated distribution at a number hashed from (seed, position). So neither the batch nor the
order of rows nor a rewind matters, and `generate`, sessions and the engine draw the same.

Shapes: n rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrt.utils.device import has_float64

COLDEST = 1e-30
"""A temperature below it would make logits infinite in float32, and their distribution no number."""
REPETITION = (0.01, 100.0)
"""The least and the greatest penalty of repetitions: within them logits stay finite in float32."""


@dataclass(frozen=True)
class Sampling:
    """The distribution that the next token is drawn from. ValueError on a number out of its range."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int | None = None
    """Draw among the k most likely tokens."""
    top_p: float | None = None
    """Draw among the fewest most likely tokens whose probability reaches p."""
    min_p: float | None = None
    """Draw among the tokens that are at least p times as likely as the most likely one."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # nan included
            raise ValueError(f"temperature is {self.temperature}; it must be at least 0 (0 takes the likeliest token)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.min_p is not None and not 0 < self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be above 0 and at most 1")

    def pick(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """The tokens (n,) at which the cumulated distributions of logits (n, V) pass `uniform` (n,) in [0, 1)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        passed = self.probabilities(logits).to(uniform.dtype).cumsum(-1)
        total = passed[:, -1]  # 1 but for rounding
        # Below the total whatever the rounding, so that a token of probability 0 is never taken.
        sought = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(passed, sought.unsqueeze(1), right=True).squeeze(1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution (n, V) that is drawn from, float32; temperature above 0.

        It is cut by min-p first, then by top-k, then by top-p, which counts what the others have left.
        """
        logits = logits.float() / max(self.temperature, COLDEST)
        if self.min_p is not None:
            least = logits.amax(-1, keepdim=True) + math.log(self.min_p)
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]  # as likely as the k-th: stays, so there may be more than k
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = probabilities.sort(descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered  # a token stays if those before it have not reached p yet
            dropped = torch.zeros_like(before, dtype=torch.bool).scatter(
                1,
                order,
                (before >= self.top_p) & (before > 0),  # the first stays, also where p is 0 in float32
            )
            probabilities = probabilities.masked_fill(dropped, 0)
        return probabilities / probabilities.sum(-1, keepdim=True)


class TokenCounts:
    """Which tokens a text has, for `Steering`: kept, so that the next token costs the same however long the text is."""

    def __init__(self, prompt: Sequence[int], vocabulary: int, device: torch.device | str = "cpu") -> None:
        self.length = len(prompt)
        """Tokens that are counted."""
        self.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        """(V,): what is in the prompt or was drawn."""
        self.drawn = torch.zeros(vocabulary, dtype=torch.long, device=device)
        """(V,): how often it was drawn."""
        self.seen[torch.tensor(prompt, dtype=torch.long, device=device)] = True

    def update(self, tokens: Sequence[int]) -> None:
        """Count what was drawn since. tokens: the prompt and all that was drawn."""
        new = torch.tensor(tokens[self.length :], dtype=torch.long, device=self.seen.device)
        self.seen[new] = True
        self.drawn.index_add_(0, new, torch.ones_like(new))
        self.length = len(tokens)


@dataclass(frozen=True)
class Steering:
    """What the logits are changed by before a token is drawn, in the terms of OpenAI's API and of vLLM's for
    `repetition`; log-probabilities ignore it.

    ValueError on a number that is not finite, or a `repetition` outside REPETITION.
    """

    frequency: float = 0.0
    """Taken from a token's logit for every time that it was drawn."""
    presence: float = 0.0
    """Taken from it once it was drawn."""
    bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    repetition: float = 1.0
    """What a token's logit is divided by, where it is positive, and multiplied by where it is not, once the token is in
    the prompt or was drawn (Keskar et al. 2019, arXiv 1909.05858, section 4.1, as transformers and vLLM do it)."""

    def __post_init__(self) -> None:
        for name, value in (("frequency", self.frequency), ("presence", self.presence), *self.bias):
            if not math.isfinite(value):
                raise ValueError(f"{name} is steered by {value}; give finite numbers")
        least, greatest = REPETITION
        if not least <= self.repetition <= greatest:
            raise ValueError(f"repetition is {self.repetition}; it must be {least} to {greatest:g} (1 changes nothing)")

    @property
    def neutral(self) -> bool:
        """Whether it changes nothing."""
        return self.frequency == 0 and self.presence == 0 and not self.bias and self.repetition == 1

    def apply(self, logits: Tensor, history: TokenCounts) -> Tensor:
        """Logits (V,) after the tokens so far; only `repetition`, which comes first, counts the prompt's too."""
        if self.repetition != 1:
            penalised = torch.where(logits > 0, logits / self.repetition, logits * self.repetition)
            logits = torch.where(history.seen, penalised, logits)
        counts = history.drawn.to(logits)
        logits = logits - self.frequency * counts - self.presence * (counts > 0).to(logits)
        if self.bias:
            tokens, values = zip(*self.bias, strict=True)
            logits.index_add_(0, torch.tensor(tokens, device=logits.device), logits.new_tensor(values))
        return logits


def draw_rows(logits: Tensor, samplings: Sequence[Sampling], seeds: Sequence[tuple[int, int]]) -> Tensor:
    """The next tokens (n,) from logits (n, V), each row by its own sampling and its own (seed, position).

    Rows of equal sampling are computed together, which changes none of them.
    """
    groups: dict[Sampling, list[int]] = {}
    for row, sampling in enumerate(samplings):
        groups.setdefault(sampling, []).append(row)
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for sampling, rows in groups.items():
        part = logits if len(rows) == len(logits) else logits[rows]
        numbers = torch.cat([uniform(*seeds[row]) for row in rows])
        tokens[rows] = sampling.pick(part, numbers.to(widest(logits.device)).to(logits.device))
    return tokens


def uniform(seed: int, position: int) -> Tensor:
    """(1,) float64 in [0, 1): what decides the token at a position, however it was reached.

    On the CPU, so that every device draws the same number.
    """
    return torch.rand(1, generator=generator_at(seed, position), dtype=torch.float64)


def generator_at(seed: int, position: int) -> torch.Generator:
    """What the token at a position is drawn with: a function of (seed, position), so that going back is exact.

    Hashed, so that neighbouring seeds and positions have nothing in common.
    """
    digest = hashlib.sha256(f"{seed} {position}".encode()).digest()
    # 63 bits, as torch takes a seed for a signed number of 64.
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def widest(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float64 if has_float64(device) else torch.float32
