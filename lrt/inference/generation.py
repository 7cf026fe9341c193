"""Generation with true recurrence: exact prefill, then one step per token with keys, values and memory in a State.

For prompts of one length; `engine.py` serves many of any lengths, and draws the same tokens for the same seeds. Text is
`language_model.py`'s, which has the tokenizer.

Shapes: B batch, T prompt positions, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from lrt.inference.decoders import EagerDecoder, decoder
from lrt.inference.sampling import Sampling, draw_rows
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.utils.validation import shorten


class TextModel(Protocol):
    """A model that knows its tokenizer, such as `LanguageModel`."""

    def stream(self, prompt: str, max_new_tokens: int | None, sampling: Sampling | None, seed: int) -> Iterator[str]:
        """Pieces of the text that continues `prompt`, as they come."""
        ...


@overload
def generate(
    model: LatentRecurrentTransformer,
    tokens: Tensor,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Iterator[Tensor]: ...
@overload
def generate(
    model: TextModel,
    tokens: str,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Iterator[str]: ...
def generate(
    model: LatentRecurrentTransformer | TextModel,
    tokens: Any,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Iterator[Any]:
    """Continue tokens (B, T) int, T >= 1; yields each next token (B,) as soon as it is drawn.

    A model that knows its tokenizer, what `lrt.load` and `Run.model` give, continues text in place of tokens, and
    yields pieces of text; it stops where the document ends.

    `max_new_tokens` None goes on to the end of the context, or for ever where every layer slides. Row i is drawn with
    seed + i, and gets what `Session` and `Engine` draw with that seed. Raises ValueError, before any work, on an empty
    prompt or one that the context cannot hold.
    """
    if isinstance(model, LatentRecurrentTransformer):
        return generate_tokens(model, tokens, max_new_tokens, sampling, seed)
    return model.stream(tokens, max_new_tokens, sampling, seed)


def generate_tokens(
    model: LatentRecurrentTransformer, tokens: Tensor, max_new_tokens: int | None, sampling: Sampling | None, seed: int
) -> Iterator[Tensor]:
    """`generate` of tokens."""
    if isinstance(tokens, str):
        raise ValueError(
            f"the prompt is the text {shorten(tokens)}, and this model has no tokenizer; give tokens (B, T), or the "
            "model that lrt.load(FOLDER) gives"
        )
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"the prompt has shape {tuple(tokens.shape)}; give (batch, at least one token): BOS will do")
    if max_new_tokens is not None and max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
    config, length = model.config, tokens.shape[1]
    wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if len(wrong):
        raise ValueError(f"token {int(wrong[0])} is not in the vocabulary of {config.vocab_size}; use its tokenizer")
    room = None if config.unlimited_context else config.context + 1 - length  # the last token drawn is never fed back
    # One token fits at least, also where none is asked for: the prompt itself has to.
    if room is not None and room < max(1, max_new_tokens or 1):
        raise ValueError(
            f"a prompt of {length} tokens and {max_new_tokens or 1} new ones exceed the context of {config.context}; "
            "shorten one of them, or use a model in which every layer has a sliding window"
        )
    wanted = room if max_new_tokens is None else max_new_tokens
    # A generator of its own does the work, so that mistakes raise here and not at the first token.
    return iter(()) if wanted == 0 else _generate(model, tokens, wanted, sampling or Sampling(), seed)


def _generate(
    model: LatentRecurrentTransformer, tokens: Tensor, wanted: int | None, sampling: Sampling, seed: int
) -> Iterator[Tensor]:
    """The tokens of `generate_tokens`, whose arguments are checked; `wanted` None goes on for ever."""
    rows, length = tokens.shape
    slots = model.config.context if wanted is None else length + wanted - 1
    if model.config.unlimited_context:  # an endless stream reuses its slots
        slots = min(slots, model.config.lookback + 1) if wanted is not None else model.config.lookback + 1
    with torch.no_grad():  # not inference mode: buffers are ordinary tensors, whoever reads them later
        step = decoder(model, model.empty_state(rows, max(1, slots)))
    hidden = step(tokens[:, 0], [0] * rows)
    for position in range(1, length):
        hidden = step(tokens[:, position], [position] * rows)
    yield from continuation(step, hidden, length, sampling, range(seed, seed + rows), wanted)


def continuation(
    step: EagerDecoder, hidden: Tensor, position: int, sampling: Sampling, seeds: Sequence[int], count: int | None
) -> Iterator[Tensor]:
    """Draw `count` tokens for each row, from `position` on; None goes on for ever. Yields each (B,) as it is drawn.

    hidden (B, D): the final hidden states of the position before. What row i gets at a position is a function of its
    logits, seeds[i] and that position alone (`draw_rows`). The last token is not fed to `step`: nobody reads what it
    leaves.
    """
    for here in itertools.count(position) if count is None else range(position, position + count):
        with torch.inference_mode():
            tokens = draw_rows(step.logits(hidden), [sampling] * len(seeds), [(seed, here) for seed in seeds])
        tokens = tokens.clone()  # outside inference mode: an ordinary tensor, which training may use
        yield tokens
        if count is None or here + 1 < position + count:
            hidden = step(tokens, [here] * len(seeds))
