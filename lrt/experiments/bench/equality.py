"""Equality (contract, section 7): in float32 two ways to one text may differ in a token only where it hardly matters.

Each case reaches a prompt's continuation in its own way and decodes greedily; it is held, token by token, against the
prompt prefilled exactly and decoded alone. At the first token that differs the *margin* is taken, the distance of the
two tokens' logits in the reference; below 1e-4 the difference is allowed, and counted. In float64 the same is tested
to 1e-10 (tests/inference/test_session.py, tests/inference/test_prefill.py).
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
Way = Callable[[LatentRecurrentTransformer, Sequence[Tokens], int], list[Tokens]]
"""(model, prompts, n) -> each prompt and its n greedy tokens."""


def split_prompts(text: Sequence[int], room: int) -> list[Tokens]:
    """Prompts out of a text of tokens: one after another, as long as LENGTHS say and `room` allows."""
    found: list[Tokens] = []
    for length in LENGTHS:
        begin = sum(map(len, found))
        if length <= room and begin + length <= len(text):
            found.append(tuple(text[begin : begin + length]))
    return found


def alone(model: LatentRecurrentTransformer, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """The reference: each by itself, token by token."""
    return [Session.start(model, prompt, "exact").generate(count, GREEDY).tokens for prompt in prompts]


def by_forking(model: LatentRecurrentTransformer, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """By a fork, after the session itself went another way, and by the session after the fork did."""
    found = []
    for row, prompt in enumerate(prompts):
        pair = [Session.start(model, prompt, "exact")]
        pair.append(pair[0].fork(1))
        pair[row % 2].generate(count, Sampling(temperature=2.0))
        found.append(pair[1 - row % 2].generate(count, GREEDY).tokens)
    return found


def by_cropping(model: LatentRecurrentTransformer, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """From a longer session cut back to the prompt."""
    longer = [Session.start(model, p, "exact").generate(count, Sampling(temperature=2.0)) for p in prompts]
    return [s.crop(len(p)).generate(count, GREEDY).tokens for s, p in zip(longer, prompts, strict=True)]


def rewound(model: LatentRecurrentTransformer, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """With the second half of the prompt replaced, taken back, and given again."""
    found = []
    for prompt in prompts:
        half = max(1, len(prompt) // 2)
        wrong = Session.start(model, (*prompt[:half], *reversed(prompt[half:])), "exact")
        right = wrong.rewind(len(prompt) - half).extend(prompt[half:], "exact") if half < len(prompt) else wrong
        found.append(right.generate(count, GREEDY).tokens)
    return found


def by_reloading(model: LatentRecurrentTransformer, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """Saved, and read again."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for prompt in prompts:
            Session.start(model, prompt, "exact").save(Path(folder) / "session")
            found.append(Session.load(Path(folder) / "session", model).generate(count, GREEDY).tokens)
    return found


def split(model: LatentRecurrentTransformer, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """Prefilled in three parts."""
    found = []
    for prompt in prompts:
        session = Session.start(model, prompt[:1], "exact")
        middle = max(1, 2 * len(prompt) // 3)
        for part in (prompt[1:middle], prompt[middle:]):
            session = session.extend(part, "exact") if part else session
        found.append(session.generate(count, GREEDY).tokens)
    return found


def by_ragged_batch(model: LatentRecurrentTransformer, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    """Prefilled at once, padded, and decoded by the model itself."""
    device = model.embedding.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    with torch.no_grad():
        done = prefill(model, tokens, model.empty_state(len(prompts), model.config.context), "exact", lengths)
        hidden, state, drawn = done.hidden, done.state.in_place(), []
        for step in range(count):
            drawn.append(model.logits(hidden[:, -1]).argmax(-1, keepdim=True))
            if step < count - 1:
                hidden, state = model(drawn[-1], (lengths + step).unsqueeze(1), state)
    following = torch.cat(drawn, 1).tolist()
    return [(*prompt, *more) for prompt, more in zip(prompts, following, strict=True)]


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


WAYS: dict[str, Way] = {
    "rows of a ragged batch": by_batching,
    "rows that replace others": by_replacing,
    "rows of a ragged prefill": by_ragged_batch,
    "forked": by_forking,
    "cropped": by_cropping,
    "rewound": rewound,
    "saved and reloaded": by_reloading,
    "split prefill": split,
}


@dataclass(frozen=True)
class Equality:
    """One way beside the reference."""

    compared: int
    """Tokens compared: up to and including the first that differs, of each prompt."""
    margins: tuple[float, ...]
    """Of those that differ."""

    @property
    def allowed(self) -> bool:
        """Whether every difference was decided by less than 1e-4."""
        return all(margin < MARGIN for margin in self.margins)


def compare_continuations(
    model: LatentRecurrentTransformer, expected: Sequence[Tokens], found: Sequence[Tokens], begins: Sequence[int]
) -> Equality:
    """Continuations from position begins[i] of each text, held against the expected ones."""
    compared, margins = 0, []
    for theirs, mine, begin in zip(expected, found, begins, strict=True):
        assert len(theirs) == len(mine)
        assert theirs[:begin] == mine[:begin]
        differing = [i for i in range(begin, len(theirs)) if theirs[i] != mine[i]]
        compared += (differing[0] + 1 if differing else len(theirs)) - begin
        if differing:  # what follows it continues another text
            place = differing[0]
            with torch.no_grad():
                logits = model.logits(Session.start(model, theirs[:place], "exact").hidden)[0, 0]
            margins.append(float(logits[theirs[place]] - logits[mine[place]]))
    return Equality(compared, tuple(margins))


def equality_rows(
    model: LatentRecurrentTransformer,
    prompts: Sequence[Tokens],
    count: int = NEW,
    ways: dict[str, Way] | None = None,
    progress: bool = True,
) -> list[Row]:
    """Per way, the tokens that differ by a margin that is not allowed: 0 is the target."""
    chosen = WAYS if ways is None else ways
    found: list[Row] = []
    with bar("equality", len(chosen) + 1, progress) as tell:
        expected = alone(model, prompts, count)
        tell(1)
        for name, way in chosen.items():
            equality = compare_continuations(model, expected, way(model, prompts, count), [len(p) for p in prompts])
            wrong = sum(margin >= MARGIN for margin in equality.margins)
            about = {"tokens": equality.compared, "differing": len(equality.margins), "margins": equality.margins}
            found.append(Row(f"{name}: tokens that differ", wrong, at_most=0, about=about))
            tell(1, name)
    return found
