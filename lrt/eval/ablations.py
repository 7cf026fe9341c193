"""The memory replaced at test time: each ablation reads it in its own way, all parameters are shared.

What a model loses when its memory is tampered with says what the memory carries. An ablation takes the place of the
model's `MemoryReader` (`with_memory_reader`); the model's forward does not know of it. To add one, write a module that
takes that reader, and register it (`register_ablation`); the tests run over the table.

Shapes: B batch, T positions of this call, C memory channels, D width. Memory is (C, B, T, D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from lrt.model.memory import MemoryReader
from lrt.model.state import State
from lrt.model.state_protocol import Positions
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.utils.registry import Registry


class Ablation(nn.Module):
    """Reads the memory in place of `recall`, whose parameters it keeps."""

    def __init__(self, recall: MemoryReader) -> None:
        super().__init__()
        self.recall = recall


class ZeroMemory(Ablation):
    """Every position reads zeros."""

    def forward(self, state: State, positions: Positions, embedding: nn.Embedding) -> Tensor:
        return torch.zeros_like(self.recall(state, positions, embedding))


class EmbeddingMemory(Ablation):
    """Every position reads the embedding of the token `delay` back, whatever the source."""

    def forward(self, state: State, positions: Positions, embedding: nn.Embedding) -> Tensor:
        past = {delay: state.read_memory(positions, delay) for delay in self.recall.delays}
        embedded = {delay: self.recall.embed(read, embedding) for delay, read in past.items()}
        like = past[self.recall.delays[0]].memory
        return self.recall.combine([embedded[delay] for _, delay in self.recall.reads], like)


class ShuffledMemory(Ablation):
    """Every row reads the memory of the row before it, at the same position: a real memory, of another text.

    The score depends on which rows are scored together. ValueError for a single row, which has no other to read.
    """

    def forward(self, state: State, positions: Positions, embedding: nn.Embedding) -> Tensor:
        if state.batch < 2:
            raise ValueError("one row has no other row's memory to read; score at least 2 windows at once (batch_size)")
        return self.recall(state, positions, embedding).roll(1, dims=1)


class DelayedMemory(Ablation):
    """Every position reads the memory `more` positions further back; the first of a document read zeros."""

    def __init__(self, recall: MemoryReader, more: int) -> None:
        super().__init__(recall)
        self.more = more

    def forward(self, state: State, positions: Positions, embedding: nn.Embedding) -> Tensor:
        past = {delay: state.read_memory(positions, delay + self.more) for delay in self.recall.delays}
        return self.recall.read(past, embedding)


class FrozenMemory(Ablation):
    """The memory is written once: every position reads that of its document's first position.

    The first `delay` positions read zeros, as always.
    """

    def forward(self, state: State, positions: Positions, embedding: nn.Embedding) -> Tensor:
        index = state.index(positions)
        first = torch.zeros_like(index)  # where the document of a position begins
        if state.documents is not None:
            own = state.documents[:, state.where(index)] if index.dim() == 1 else state.documents.gather(1, index)
            # (B, T, slots) -> (B, T): argmax gives the first slot of the same document.
            first = (state.documents.unsqueeze(1) == own.unsqueeze(2)).int().argmax(2)
        # Reading `index - first` positions back reaches the first one; nobody reads nearer than `delay`.
        back = {delay: (index - first).clamp(min=delay) for delay in self.recall.delays}
        return self.recall.read({delay: state.read_memory(positions, back[delay]) for delay in back}, embedding)


class UnwrittenMemory(Ablation):
    """Every position reads what it would if no pass had written anything: what a first pass reads, also further on."""

    def forward(self, state: State, positions: Positions, embedding: nn.Embedding) -> Tensor:
        past = {delay: state.read_memory(positions, delay) for delay in self.recall.delays}
        unwritten = {delay: replace(read, written=torch.zeros_like(read.written)) for delay, read in past.items()}
        return self.recall.read(unwritten, embedding)


class OwnMemory(Ablation):
    """A position reads what it wrote itself: for the second of two forwards (`scoring.two_forwards`)."""

    def forward(self, state: State, positions: Positions, embedding: nn.Embedding) -> Tensor:
        return self.recall.read(dict.fromkeys(self.recall.delays, state.read_memory(positions, 0)), embedding)


ABLATIONS: Registry[Callable[[MemoryReader], nn.Module]] = Registry(
    "ablation",
    {
        "zero": ZeroMemory,
        "embedding": EmbeddingMemory,
        "shuffled": ShuffledMemory,
        "delayed_1": partial(DelayedMemory, more=1),
        "delayed_8": partial(DelayedMemory, more=8),
        "frozen": FrozenMemory,
    },
)
"""Name -> the module that takes the place of a model's memory reader."""


def register_ablation(name: str, ablation: Callable[[MemoryReader], nn.Module]) -> None:
    """Let `evaluate` and `lrt diagnose` replace the memory in a way of one's own: `ablation(the model's reader)`.

    The module takes (state, positions, embedding) and returns the memory (C, B, T, D) that is read instead; `Ablation`
    is its base class. ValueError where the name is taken.

    >>> import lrt
    >>> from lrt.eval.ablations import Ablation
    >>> class Halved(Ablation):
    ...     def forward(self, state, positions, embedding):
    ...         return self.recall(state, positions, embedding) / 2
    >>> lrt.register_ablation("halved", Halved)
    """
    ABLATIONS.register(name, ablation, stacklevel=2)


def ablate(model: LatentRecurrentTransformer, name: str) -> LatentRecurrentTransformer:
    """A copy of the model, parameters shared, with its memory replaced as an entry of `ABLATIONS` says."""
    return with_ablation(model, ABLATIONS.find(name))


def with_ablation(
    model: LatentRecurrentTransformer, ablation: Callable[[MemoryReader], nn.Module]
) -> LatentRecurrentTransformer:
    """A copy of the model, parameters shared, whose memory `ablation` reads."""
    assert isinstance(model.recall, MemoryReader), "an ablation of an ablation"
    return model.with_memory_reader(ablation(model.recall))
