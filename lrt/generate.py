"""Generation with true recurrence: exact prefill, then one forward per token with keys, values and memory in a State.

Shapes: B batch, T prompt positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lrt.model.transformer import LatentRecurrentTransformer
from lrt.refine import refine
from lrt.schedules import sequential


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int | None = None
    """Draw among the k most likely tokens."""
    top_p: float | None = None
    """Draw among the fewest most likely tokens whose probability reaches p."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be at least 0 (0 takes the likeliest token)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """The next tokens (B,) from logits (B, V)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator).squeeze(1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution (B, V) that `draw` draws from; temperature above 0."""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = probabilities.sort(descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered  # a token stays if those before it have not reached p yet
            dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= self.top_p)
            probabilities = probabilities.masked_fill(dropped, 0)
        return probabilities / probabilities.sum(-1, keepdim=True)


def generate(
    model: LatentRecurrentTransformer,
    tokens: Tensor,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Continue tokens (B, T) int, T >= 1; yields each next token (B,) as soon as it is drawn.

    `max_new_tokens` None goes on to the end of the context, or for ever where every layer slides. Equal seeds give
    equal tokens. Raises ValueError, before any work, on an empty prompt or one that the context cannot hold.
    """
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"the prompt has shape {tuple(tokens.shape)}; give (batch, at least one token): BOS will do")
    if max_new_tokens is not None and max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
    config, length = model.config, tokens.shape[1]
    room = None if config.unbounded else config.context + 1 - length  # the last token drawn is never fed back
    if room is not None and room < max(1, max_new_tokens or 1):
        raise ValueError(
            f"a prompt of {length} tokens and {max_new_tokens or 1} new ones exceed the context of {config.context}; "
            "shorten one of them, or use a model in which every layer has a sliding window"
        )
    wanted = room if max_new_tokens is None else max_new_tokens
    return iter(()) if wanted == 0 else _generate(model, tokens, wanted, sampling or Sampling(), seed)


def _generate(
    model: LatentRecurrentTransformer, tokens: Tensor, wanted: int | None, sampling: Sampling, seed: int
) -> Iterator[Tensor]:
    length = tokens.shape[1]
    slots = model.config.context if wanted is None else length + wanted - 1
    if model.config.unbounded:  # an endless stream reuses its slots
        slots = min(slots, model.config.reach + 1) if wanted is not None else model.config.reach + 1
    generator = torch.Generator(tokens.device).manual_seed(seed)
    with torch.no_grad():
        state = model.empty_state(len(tokens), max(1, slots)).in_place()
        out = refine(model, tokens, sequential(), state=state)
        hidden, state = out.hidden[:, -1:], out.state
        position = length
        while wanted is None or position < length + wanted:
            following = sampling.draw(model.logits(hidden[:, -1]), generator)
            yield following
            position += 1
            if wanted is not None and position >= length + wanted:
                return
            hidden, state = model(following.unsqueeze(1), range(position - 1, position), state)
