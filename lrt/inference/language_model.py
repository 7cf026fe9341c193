"""A model with its tokenizer: text in, text out.

The tokenizer is no part of the model, which knows tokens only; here the two go together.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from lrt.data.tokenizer import Tokenizer
from lrt.inference.generation import generate
from lrt.inference.sampling import Sampling
from lrt.model import checkpoint
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.utils.validation import shorten

NEW_TOKENS = 100
"""Tokens that a text goes on for, where no number is given."""
USUAL = Sampling(temperature=0.8, top_p=0.95)
"""How text is drawn where nothing is said: as `lrt sample` draws it."""


class LanguageModel(NamedTuple):
    """A model and its tokenizer. It unpacks: `model, tokenizer = lrt.load("runs/d2")`."""

    network: LatentRecurrentTransformer
    """What computes: tokens in, hidden states out."""
    tokenizer: Tokenizer

    def __repr__(self) -> str:
        return f"LanguageModel({self.network!r}, {self.tokenizer!r})"

    def complete(
        self, prompt: str, max_new_tokens: int | None = NEW_TOKENS, sampling: Sampling | None = None, seed: int = 0
    ) -> str:
        """The text that follows `prompt`, without it; empty prompts begin a document. Arguments as for `stream`."""
        return "".join(self.stream(prompt, max_new_tokens, sampling, seed))

    def stream(
        self, prompt: str, max_new_tokens: int | None = NEW_TOKENS, sampling: Sampling | None = None, seed: int = 0
    ) -> Iterator[str]:
        """The same in pieces, each as soon as it is certain. It ends where the model ends the document.

        `max_new_tokens` None goes on to the end of the context. `sampling` None: temperature 0.8 and top-p 0.95, as
        `lrt sample` draws. Equal seeds give equal text. ValueError where prompt and new tokens exceed the context.
        """
        ids = self._encode(prompt)
        row = torch.tensor([ids], device=self.network.embedding.weight.device)
        # Called here, so that mistakes raise now and not at the first piece.
        return self._decode(ids, generate(self.network, row, max_new_tokens, sampling or USUAL, seed))

    def _decode(self, prompt: list[int], tokens: Iterator[torch.Tensor]) -> Iterator[str]:
        """Pieces of text of the tokens that continue `prompt`, up to the end of the document."""
        decoder = self.tokenizer.decoder(prompt)
        for token in map(int, tokens):
            if token == self.tokenizer.bos:
                break
            yield decoder.push(token)
        yield decoder.finish()

    def _encode(self, prompt: str) -> list[int]:
        if not isinstance(prompt, str):
            raise ValueError(f"the prompt is {shorten(prompt)}; give text, or tokens to the network of this model")
        return [self.tokenizer.bos, *self.tokenizer.encode(prompt)]


def load(path: str | Path, device: str | torch.device = "cpu") -> LanguageModel:
    """The model, in evaluation mode, and the tokenizer of a checkpoint's folder, or of a run's: `checkpoint.load`."""
    return LanguageModel(*checkpoint.load(path, device))
