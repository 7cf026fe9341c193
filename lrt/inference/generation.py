"""Generation with true recurrence: exact prefill, then one step per token with keys, values and memory in a State.

For prompts of one length; `lrt.inference.engine` serves many of any lengths.

Shapes: B batch, T prompt positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lrt.inference.decoders import decoder
from lrt.inference.sampling import Sampling
from lrt.model.transformer import LatentRecurrentTransformer


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
    wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if len(wrong):
        raise ValueError(f"token {int(wrong[0])} is not in the vocabulary of {config.vocab_size}; use its tokenizer")
    room = None if config.unlimited_context else config.context + 1 - length  # the last token drawn is never fed back
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
    if model.config.unlimited_context:  # an endless stream reuses its slots
        slots = min(slots, model.config.lookback + 1) if wanted is not None else model.config.lookback + 1
    generator = torch.Generator(tokens.device).manual_seed(seed)
    with torch.no_grad():
        way = decoder(model, model.empty_state(len(tokens), max(1, slots)))
    rows = len(tokens)
    hidden = way(tokens[:, 0], [0] * rows)
    for position in range(1, length):
        hidden = way(tokens[:, position], [position] * rows)
    position = length
    while True:
        with torch.inference_mode():
            following = sampling.draw(way.logits(hidden), generator)
        following = following.clone()  # outside inference mode: an ordinary tensor, which training may use
        yield following
        position += 1
        if wanted is not None and position >= length + wanted:
            return
        hidden = way(following, [position - 1] * rows)
