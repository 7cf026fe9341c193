"""How well a model tracks, live: token by token with true recurrence.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrt.data.batch import IGNORED
from lrt.experiments.state_tracking.tasks import Pair, Task
from lrt.model.execution import EAGER, Execution
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules import library as schedules
from lrt.schedules import unrolled
from lrt.schedules.refinement import refine

SEQUENCES = 1000
"""Fresh rows per length."""
HELD_OUT = 2**31
"""Seeds of tests begin here, and those of training end: a generator on the CPU knows 32 bits of a seed."""
BLOCK = 4096
"""Positions of a stream whose hidden states exist at one time."""


@dataclass(frozen=True)
class Answers:
    """How many answers were asked for, and how many were right."""

    asked: int
    right: int

    @property
    def accuracy(self) -> float:
        return self.right / self.asked

    @property
    def errors(self) -> int:
        return self.asked - self.right


@torch.no_grad()
def live_hidden(model: LatentRecurrentTransformer, tokens: Tensor) -> Tensor:
    """Hidden states (B, T, D) of tokens (B, T), decoded token by token.

    A model without a stored memory needs no recurrence: one plain pass gives the same.
    """
    if unrolled.reason_uncovered(model) is None:  # the same numbers as `sequential`, faster
        return unrolled.over(model, tokens)
    remembered = model.config.stored_sources
    schedule = schedules.sequential() if remembered else schedules.plain()
    return refine(model, tokens, schedule).hidden


@torch.no_grad()
def live_answers(model: LatentRecurrentTransformer, tokens: Tensor) -> Tensor:
    """Answers (B, T): the likeliest class at each position, decoded token by token."""
    return model.logits(live_hidden(model, tokens)).argmax(-1)


def held_out_generator(purpose: str, task: str, length: int, seed: int) -> torch.Generator:
    """The generator of a test's rows: another one for each test, and none that training draws from."""
    name = f"{purpose}/{task}/{length}/{seed}"
    # A large constant added to a training seed would be none: the generator drops what is above 32 bits.
    return torch.Generator().manual_seed(HELD_OUT + int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT)


def sample_rows(
    model: LatentRecurrentTransformer, task: Task, rows: int, length: int, generator: torch.Generator
) -> Pair:
    """Fresh tokens and classes (B, T), on the model's device."""
    tokens, classes, _ = task.sample(rows, length, generator)
    return tokens.to(model.embedding.weight.device), classes.to(model.embedding.weight.device)


def count_last(answers: Tensor, classes: Tensor) -> Answers:
    """The last answer that each row asks for; answers, classes (B, T)."""
    positions = torch.arange(classes.shape[1], device=classes.device)
    # Not always the row's last position: a flip-flop row ends in the bit that was asked for.
    where = torch.where(classes != IGNORED, positions, -1).amax(1, keepdim=True)
    right = answers.gather(1, where) == classes.gather(1, where)
    return Answers(len(classes), int(right.sum()))


def count_all(answers: Tensor, classes: Tensor) -> Answers:
    """All answers that are asked for; answers, classes (B, T)."""
    asked = classes != IGNORED
    return Answers(int(asked.sum()), int((answers[asked] == classes[asked]).sum()))


def score_last_state(
    model: LatentRecurrentTransformer, task: Task, length: int, rows: int = SEQUENCES, seed: int = 0, batch: int = 1000
) -> Answers:
    """The last position's state over `rows` fresh sequences."""
    generator = held_out_generator("last state", task.name, length, seed)
    right = 0
    for start in range(0, rows, batch):
        tokens, classes = sample_rows(model, task, min(batch, rows - start), length, generator)
        right += count_last(live_answers(model, tokens), classes).right
    return Answers(rows, right)


def score_reads(
    model: LatentRecurrentTransformer, task: Task, length: int, wanted: int, seed: int = 0, batch: int = 1000
) -> Answers:
    """All answers in fresh sequences, until at least `wanted` were asked for: errors are what counts."""
    generator = held_out_generator("reads", task.name, length, seed)
    asked = right = 0
    while asked < wanted:
        tokens, classes = sample_rows(model, task, batch, length, generator)
        answers = count_all(live_answers(model, tokens), classes)
        asked, right = asked + answers.asked, right + answers.right
    return Answers(asked, right)


@dataclass(frozen=True)
class StreamAnswers:
    """What a model answered along a stream."""

    parts: tuple[Answers, ...]
    """Its parts in order, of equal length: drift would show as a fall."""
    carried: int
    """Numbers that were carried from one position to the next, per row, when the stream ended."""

    @property
    def accuracy(self) -> float:
        return sum(part.right for part in self.parts) / sum(part.asked for part in self.parts)


@torch.no_grad()
def stream_answers(
    model: LatentRecurrentTransformer,
    tokens: Tensor,
    classes: Tensor,
    parts: int = 10,
    execution: Execution = EAGER,
    advance: Callable[[float, str], object] = lambda *_: None,
    first: int = 0,
) -> StreamAnswers:
    """Answers along tokens, classes (B, T) with one carried state of constant size; the first position is `first`.

    Only models that `lrt.schedules.unrolled` covers. The carry is all that is kept, so rows may have any length.
    """
    carry = dataclasses.replace(unrolled.empty_carry(model, tokens.shape[0]), position=first)
    answered = []
    size = -(-tokens.shape[1] // parts)  # rounded up: the last part may be shorter
    for part, part_classes in zip(tokens.split(size, 1), classes.split(size, 1), strict=True):
        asked = right = 0
        for block, block_classes in zip(part.split(BLOCK, 1), part_classes.split(BLOCK, 1), strict=True):
            hidden, carry = unrolled.run_chunks(model, block, carry, execution)
            answers = count_all(model.logits(hidden).argmax(-1), block_classes)
            asked, right = asked + answers.asked, right + answers.right
            advance(block.shape[1] / tokens.shape[1], f"position {carry.position:,}")
        answered.append(Answers(asked, right))
    tensors = (carry.memory, *carry.keys, *carry.values)
    return StreamAnswers(tuple(answered), sum(x.numel() for x in tensors) // tokens.shape[0])
