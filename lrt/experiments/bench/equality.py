"""Equality (contract, section 7): in float32 two paths to one text may differ in a token only where it hardly matters.

Each path reaches a prompt's continuation by other operations and decodes greedily. It is held, token by token, against
the prompt prefilled exactly and decoded alone. At the first token that differs the *margin* is taken: the distance of
the two tokens' logits in the reference. Below 1e-4 the difference is allowed, and counted. Tests hold the same to
1e-10 in float64 (tests/inference).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lrt.experiments.bench.rows import Row
from lrt.inference.engine import Engine
from lrt.inference.prefill import prefill
from lrt.inference.request import Request
from lrt.inference.sampling import Sampling
from lrt.inference.session import Session
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.utils.progress import bar

MARGIN = 1e-4
"""Largest distance of two logits between which rounding may decide."""
LENGTHS = (7, 33, 64, 100, 150, 200)
"""Lengths of the prompts."""
NEW = 64
"""Tokens of their continuations."""
GREEDY = Sampling(temperature=0)
Tokens = tuple[int, ...]
DecodingPath = Callable[[LatentRecurrentTransformer, Sequence[Tokens], int], list[Tokens]]
"""(model, prompts, n) -> each prompt and its n greedy tokens."""


def split_prompts(text: Sequence[int], room: int) -> list[Tokens]:
    """Prompts out of a text of tokens: one after another, as long as LENGTHS say and `room` allows."""
    prompts: list[Tokens] = []
    for length in LENGTHS:
        begin = sum(map(len, prompts))
        if length <= room and begin + length <= len(text):
            prompts.append(tuple(text[begin : begin + length]))
    return prompts


def decode_alone(model: LatentRecurrentTransformer, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """The reference: each by itself, token by token."""
    return [Session.start(model, prompt, "exact").generate(count, GREEDY).tokens for prompt in prompts]


def by_forking(model: LatentRecurrentTransformer, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """By a fork, after the session itself went another way, and by the session after the fork did."""
    texts = []
    for row, prompt in enumerate(prompts):
        pair = [Session.start(model, prompt, "exact")]
        pair.append(pair[0].fork(1))
        pair[row % 2].generate(count, Sampling(temperature=2.0))  # writes into what both might share
        texts.append(pair[1 - row % 2].generate(count, GREEDY).tokens)
    return texts


def by_cropping(model: LatentRecurrentTransformer, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """From a longer session cut back to the prompt."""
    longer = [Session.start(model, p, "exact").generate(count, Sampling(temperature=2.0)) for p in prompts]
    return [s.crop(len(p)).generate(count, GREEDY).tokens for s, p in zip(longer, prompts, strict=True)]


def by_rewinding(model: LatentRecurrentTransformer, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """With the second half of the prompt replaced, taken back, and given again."""
    texts = []
    for prompt in prompts:
        half = max(1, len(prompt) // 2)  # a session holds at least one token
        wrong = Session.start(model, (*prompt[:half], *reversed(prompt[half:])), "exact")
        right = wrong.rewind(len(prompt) - half).extend(prompt[half:], "exact") if half < len(prompt) else wrong
        texts.append(right.generate(count, GREEDY).tokens)
    return texts


def by_reloading(model: LatentRecurrentTransformer, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """Saved, and read again."""
    texts = []
    with tempfile.TemporaryDirectory() as folder:
        for prompt in prompts:
            Session.start(model, prompt, "exact").save(Path(folder) / "session")
            texts.append(Session.load(Path(folder) / "session", model).generate(count, GREEDY).tokens)
    return texts


def by_split_prefill(model: LatentRecurrentTransformer, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """Prefilled in three parts."""
    texts = []
    for prompt in prompts:
        session = Session.start(model, prompt[:1], "exact")
        middle = max(1, 2 * len(prompt) // 3)  # a token, the first two thirds, the rest
        for part in (prompt[1:middle], prompt[middle:]):
            session = session.extend(part, "exact") if part else session
        texts.append(session.generate(count, GREEDY).tokens)
    return texts


def by_ragged_batch(model: LatentRecurrentTransformer, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """Prefilled at once, padded, and decoded by the model itself."""
    device = model.embedding.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    with torch.no_grad():
        done = prefill(model, tokens, model.empty_state(len(prompts), model.config.context), "exact", lengths)
        hidden, state, columns = done.hidden, done.state.in_place(), []
        for step in range(count):
            columns.append(model.logits(hidden[:, -1]).argmax(-1, keepdim=True))
            if step < count - 1:  # the last token is never read
                hidden, state = model(columns[-1], (lengths + step).unsqueeze(1), state)
    continuations = torch.cat(columns, 1).tolist()
    return [(*prompt, *tokens) for prompt, tokens in zip(prompts, continuations, strict=True)]


def by_engine(model: LatentRecurrentTransformer, prompts: Sequence[Tokens], count: int, rows: int) -> list[Tokens]:
    """By the engine, with so many rows."""
    requests = [Request(prompt, count, GREEDY) for prompt in prompts]
    answers = Engine(model, rows, slots=max(map(len, prompts)) + count).complete(requests)
    return [(*prompt, *answer.tokens) for prompt, (answer,) in zip(prompts, answers, strict=True)]


def by_batching(model: LatentRecurrentTransformer, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """All in the engine at once."""
    return by_engine(model, prompts, count, len(prompts))


def by_replacing(model: LatentRecurrentTransformer, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """In the engine with two rows, which are taken by those waiting as soon as they are free."""
    return by_engine(model, prompts, count, 2)


PATHS: dict[str, DecodingPath] = {
    "rows of a ragged batch": by_batching,
    "rows that replace others": by_replacing,
    "rows of a ragged prefill": by_ragged_batch,
    "forked": by_forking,
    "cropped": by_cropping,
    "rewound": by_rewinding,
    "saved and reloaded": by_reloading,
    "split prefill": by_split_prefill,
}


@dataclass(frozen=True)
class Equality:
    """One path held against the reference."""

    compared: int
    """Tokens compared: up to and including the first that differs, of each prompt."""
    margins: tuple[float, ...]
    """Of the tokens that differ: how much the reference preferred its own."""


def compare_continuations(
    model: LatentRecurrentTransformer, expected: Sequence[Tokens], texts: Sequence[Tokens], begins: Sequence[int]
) -> Equality:
    """Continuations from position begins[i] of each text, held against the expected ones."""
    compared, margins = 0, []
    for right, text, begin in zip(expected, texts, begins, strict=True):
        assert len(right) == len(text)
        assert right[:begin] == text[:begin]
        differing = [i for i in range(begin, len(right)) if right[i] != text[i]]
        compared += (differing[0] + 1 if differing else len(right)) - begin
        if differing:  # what follows it continues another text
            place = differing[0]
            with torch.no_grad():
                logits = model.logits(Session.start(model, right[:place], "exact").hidden)[0, 0]
            margins.append(float(logits[right[place]] - logits[text[place]]))
    return Equality(compared, tuple(margins))


def equality_rows(
    model: LatentRecurrentTransformer,
    prompts: Sequence[Tokens],
    count: int = NEW,
    paths: dict[str, DecodingPath] | None = None,
    progress: bool = True,
) -> list[Row]:
    """Per path, the tokens that differ by a margin that is not allowed: 0 is the target."""
    paths = PATHS if paths is None else paths
    rows: list[Row] = []
    with bar("equality", len(paths) + 1, progress) as advance:
        expected = decode_alone(model, prompts, count)
        advance(1)
        for name, path in paths.items():
            equality = compare_continuations(model, expected, path(model, prompts, count), [len(p) for p in prompts])
            wrong = sum(margin >= MARGIN for margin in equality.margins)
            about = {"tokens": equality.compared, "differing": len(equality.margins), "margins": equality.margins}
            rows.append(Row(f"{name}: tokens that differ", wrong, at_most=0, about=about))
            advance(1, name)
    return rows
