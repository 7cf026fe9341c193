"""Score questions: what all options share is computed once, and continued from its state by each.

Three modes: `on` is true recurrence, token by token or by sweeps that converge to it; `off` reads nothing recurrent,
one forward (what the published code scores); `one_sweep` refines that once. `score_alone` is the plain reference beside
them: every option by itself, under the schedule that the mode stands for.

A shared context is a State whose rows the options fork (`State.select`).

Shapes: B questions, R options of all of them, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lrt.eval.ablations import UnwrittenMemory, with_ablation
from lrt.eval.core_metric.questions import Question
from lrt.inference.prefill import PrefillMode, prefill
from lrt.inference.prompt import Prompt
from lrt.model.cross_entropy import at_least_float32
from lrt.model.state import State
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.base import Schedule
from lrt.schedules.library import multi_refinement, plain, sequential
from lrt.schedules.refinement import refine


@dataclass(frozen=True)
class OptionScore:
    """One row's scored tokens."""

    nats: float
    """Their mean negative log-likelihood."""
    greedy: bool
    """Whether each is the likeliest one."""


@dataclass(frozen=True)
class Answer:
    """A model's answer to a question."""

    option: int
    """The option of least mean nats, counted from 0; the first of equals."""
    correct: bool
    nats: tuple[float, ...]
    """Of each option."""


class Mode(Protocol):
    """Computes texts piece by piece. What it knows of a text so far is a tuple of States."""

    @property
    def schedule(self) -> Schedule:
        """Under which `score_alone` gives the same."""
        ...

    def __call__(
        self, model: LatentRecurrentTransformer, tokens: Tensor, lengths: Tensor, states: tuple[State, ...]
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Hidden states (B, T, D) of tokens (B, T), row b having lengths[b] of them, behind what the states hold."""
        ...

    def begin(self, model: LatentRecurrentTransformer, batch: int, slots: int) -> tuple[State, ...]:
        """States of `batch` empty texts, with `slots` for each."""
        ...


@dataclass(frozen=True)
class On:
    """True recurrence."""

    prefill: PrefillMode = "converged"
    schedule: Schedule = dataclasses.field(default_factory=sequential)

    def begin(self, model: LatentRecurrentTransformer, batch: int, slots: int) -> tuple[State, ...]:
        return (ragged_state(model, batch, slots).in_place(),)

    def __call__(
        self, model: LatentRecurrentTransformer, tokens: Tensor, lengths: Tensor, states: tuple[State, ...]
    ) -> tuple[Tensor, tuple[State, ...]]:
        computed = prefill(model, tokens, states[0], self.prefill, lengths)
        return computed.sequence, (computed.state,)


@dataclass(frozen=True)
class Off:
    """Nothing recurrent is read: one forward."""

    schedule: Schedule = dataclasses.field(default_factory=plain)

    def begin(self, model: LatentRecurrentTransformer, batch: int, slots: int) -> tuple[State, ...]:
        return (ragged_state(model, batch, slots),)

    def __call__(
        self, model: LatentRecurrentTransformer, tokens: Tensor, lengths: Tensor, states: tuple[State, ...]
    ) -> tuple[Tensor, tuple[State, ...]]:
        hidden, state = forward_ragged(with_ablation(model, UnwrittenMemory), tokens, lengths, states[0])
        return hidden, (state,)


@dataclass(frozen=True)
class OneSweep:
    """The forward of `off`, and a second one that reads the memory of the first.

    There are two States, one for each forward, as both go on: the second reads the first one's memory and attends to
    second keys and values.
    """

    schedule: Schedule = dataclasses.field(default_factory=lambda: multi_refinement(1))

    def begin(self, model: LatentRecurrentTransformer, batch: int, slots: int) -> tuple[State, ...]:
        return Off().begin(model, batch, slots) * 2

    def __call__(
        self, model: LatentRecurrentTransformer, tokens: Tensor, lengths: Tensor, states: tuple[State, ...]
    ) -> tuple[Tensor, tuple[State, ...]]:
        _, (first,) = Off()(model, tokens, lengths, states[:1])
        second = dataclasses.replace(first, keys=states[1].keys, values=states[1].values)
        hidden, second = forward_ragged(model, tokens, lengths, second, states[0].lengths)
        return hidden, (first, second)


MODES: dict[str, type[On] | type[Off] | type[OneSweep]] = {"on": On, "off": Off, "one_sweep": OneSweep}


def ragged_state(model: LatentRecurrentTransformer, batch: int, slots: int) -> State:
    """An empty State of `slots` slots, also where they are more than the context: only padding may lie behind it."""
    config = model.config
    allowed = slots if config.unlimited_context else min(slots, config.context)
    state = model.empty_state(batch, allowed)
    return state if allowed == slots else state.resized(slots)


def forward_ragged(
    model: LatentRecurrentTransformer, tokens: Tensor, lengths: Tensor, state: State, starts: Tensor | None = None
) -> tuple[Tensor, State]:
    """One forward of ragged rows, from `starts` on (None: behind what the state holds), padding forgotten."""
    begin = state.lengths if starts is None else starts
    prompt = Prompt(tokens, lengths.tolist(), begin.tolist())
    hidden, state = model(tokens, prompt.positions(range(tokens.shape[1])), state)
    return hidden, state.crop(prompt.ends)


def score_questions(
    model: LatentRecurrentTransformer, questions: Sequence[Question], mode: Mode
) -> list[list[OptionScore]]:
    """Scores of each question's rows, computed together: shared tokens once per question, then the options' own."""
    device = model.embedding.weight.device
    options = [
        row[q.shared : -1] for q in questions for row in q.rows
    ]  # each option's own inputs; a row's last token is only predicted
    longest = max(q.shared for q in questions) + max(map(len, options))
    tokens, lengths = pad_rows([q.rows[0][: q.shared] for q in questions], device)
    with torch.no_grad():
        hidden, states = mode(model, tokens, lengths, mode.begin(model, len(questions), longest))
        last = hidden[torch.arange(len(questions), device=device), lengths - 1]  # predicts each option's first token
        question_of = torch.tensor([i for i, q in enumerate(questions) for _ in q.rows], device=device)
        continuing = torch.tensor([i for i, tail in enumerate(options) if tail], dtype=torch.long, device=device)
        after: dict[int, Tensor] = {}
        if len(continuing) > 0:
            tokens, lengths = pad_rows([options[i] for i in continuing.tolist()], device)
            forked = tuple(state.select(question_of[continuing]) for state in states)
            hidden, _ = mode(model, tokens, lengths, forked)
            after = {i: h[:n] for i, h, n in zip(continuing.tolist(), hidden, lengths.tolist(), strict=True)}
        rows = [(q, row, start) for q in questions for row, start in zip(q.rows, q.starts, strict=True)]
        scores = []
        for i, (q, row, start) in enumerate(rows):
            predicting = torch.cat([last[question_of[i]].unsqueeze(0), after.get(i, last[:0])])
            scores.append(score_tokens(model, predicting[start - q.shared :], row[start:]))
    in_order = iter(scores)
    return [[next(in_order) for _ in q.rows] for q in questions]


def score_alone(model: LatentRecurrentTransformer, question: Question, mode: Mode) -> list[OptionScore]:
    """The plain reference: every option by itself, whole, under the mode's schedule. Scores of the question's rows."""
    scores = []
    with torch.no_grad():
        for row, start in zip(question.rows, question.starts, strict=True):
            tokens = torch.tensor([row], device=model.embedding.weight.device)
            state = model.empty_state(1, len(row) - 1, tokens=tokens[:, :-1]).in_place()
            hidden = refine(model, tokens[:, :-1], mode.schedule, state=state).hidden[0]
            scores.append(score_tokens(model, hidden[start - 1 :], row[start:]))
    return scores


def score_tokens(model: LatentRecurrentTransformer, hidden: Tensor, tokens: Sequence[int]) -> OptionScore:
    """The score of tokens (n,) under the hidden states (n, D) that predict them."""
    logits = model.logits(hidden).to(at_least_float32(hidden))
    targets = torch.tensor(tokens, device=logits.device)
    nats = torch.nn.functional.cross_entropy(logits, targets)
    return OptionScore(float(nats), bool((logits.argmax(-1) == targets).all()))


def answer_question(question: Question, rows: Sequence[OptionScore]) -> Answer:
    """The option of least mean nats; a question without options is right where all of its tokens are the likeliest."""
    nats = tuple(row.nats for row in rows)
    option = nats.index(min(nats))
    correct = rows[0].greedy if question.gold is None else option == question.gold
    return Answer(option, correct, nats)


def pad_rows(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows as (B, T) int, padded on the right, and their lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long, device=device)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row, device=device)
    return tokens, lengths
