"""Questions as rows of tokens: prompts with few-shot examples, and which tokens of each row are scored.

As nanochat scores the bundle: the examples of question i are drawn with `random.Random(1234 + i)` among the others. Of
a multiple-choice question's prompts all but the common prefix is scored, of a schema's the common suffix, of a
language-modelling prompt what follows the context.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lrt.data.tokenizer import Tokenizer
from lrt.eval.core_metric.bundle import CoreTask

SEED = 1234
"""nanochat's, for the draw of few-shot examples."""


@dataclass(frozen=True)
class Question:
    """One question, ready to be scored."""

    index: int
    """Which of the task's."""
    rows: tuple[tuple[int, ...], ...]
    """Tokens of each option, BOS first; a single row for language modelling."""
    starts: tuple[int, ...]
    """Of each row, the first token that is scored; all that follow are too."""
    shared: int
    """How many first tokens all rows have in common, and are not scored: at least BOS."""
    gold: int | None
    """The right option; None where every token has to be the likeliest one."""
    cropped: bool = False
    """Whether the context was too short for all of it."""


def build_question(
    task: CoreTask, items: Sequence[dict[str, Any]], index: int, tokenizer: Tokenizer, context: int
) -> Question:
    """Question `index` of a task's items, in at most `context` tokens per row."""
    item = items[index]
    prompts = PROMPTS[task.type](item, few_shot_examples(items, index, task.shots), task.delimiter)
    rows = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    if task.type == "language_modeling":
        without, whole = rows
        start = min(shared_length(without, whole), len(whole) - 1)  # a tokenizer may join what the prompt ends with
        return crop_question(index, [whole], [start], start, None, context)
    shared = min(shared_length(*rows), min(map(len, rows)) - 1)  # a token at least is left to score
    starts = [shared] * len(rows)
    if task.type == "schema":
        suffix = min(shared_length(*(row[::-1] for row in rows)), min(map(len, rows)) - 1)
        starts = [len(row) - suffix for row in rows]
        shared = min(shared, *starts)  # the context up to the suffix may end inside the common prefix
    return crop_question(index, rows, starts, shared, int(item["gold"]), context)


def crop_question(
    index: int, rows: list[list[int]], starts: list[int], shared: int, gold: int | None, context: int
) -> Question:
    """The question with its beginning left out where a row exceeds the context: BOS stays, and all rows lose the same.

    nanochat crops every row for itself, BOS first, so that options of one question may see different contexts.
    """
    excess = max(map(len, rows)) - context
    if excess > 0:
        cut = min(excess, shared - 1)  # of the shared part, but never BOS
        rows = [[row[0], *row[1 + cut :]] for row in rows]
        starts, shared = [start - cut for start in starts], shared - cut
        if cut < excess:  # even without the shared part: each row's own end
            over = [max(0, len(row) - context) for row in rows]
            rows = [[row[0], *row[1 + n :]] for row, n in zip(rows, over, strict=True)]
            starts, shared = [max(1, start - n) for start, n in zip(starts, over, strict=True)], 1
    return Question(index, tuple(map(tuple, rows)), tuple(starts), shared, gold, excess > 0)


def few_shot_examples(items: Sequence[dict[str, Any]], index: int, shots: int) -> list[dict[str, Any]]:
    """The few-shot examples of a question: `shots` others, drawn by its number. ValueError where there are too few."""
    others = [i for i in range(len(items)) if i != index]
    if shots > len(others):
        raise ValueError(f"{shots} examples are wanted of {len(others)} other questions; give more questions")
    return [items[i] for i in random.Random(SEED + index).sample(others, shots)] if shots else []


def multiple_choice_prompts(item: dict[str, Any], shots: Sequence[dict[str, Any]], delimiter: str) -> list[str]:
    """One prompt per choice."""
    before = "".join(f"{e['query']}{delimiter}{e['choices'][e['gold']]}\n\n" for e in shots)
    return [f"{before}{item['query']}{delimiter}{choice}" for choice in item["choices"]]


def schema_prompts(item: dict[str, Any], shots: Sequence[dict[str, Any]], delimiter: str) -> list[str]:
    """One prompt per beginning; all end alike."""
    before = "".join(f"{e['context_options'][e['gold']]}{delimiter}{e['continuation']}\n\n" for e in shots)
    return [f"{before}{option}{delimiter}{item['continuation']}" for option in item["context_options"]]


def language_modeling_prompts(item: dict[str, Any], shots: Sequence[dict[str, Any]], delimiter: str) -> list[str]:
    """The prompt without its continuation, stripped, and with it."""
    before = "".join(f"{e['context'].strip()}{delimiter}{e['continuation']}\n\n" for e in shots)
    prompt = f"{before}{item['context'].strip()}{delimiter}"
    return [prompt.strip(), prompt + item["continuation"]]


PROMPTS = {
    "multiple_choice": multiple_choice_prompts,
    "schema": schema_prompts,
    "language_modeling": language_modeling_prompts,
}


def shared_length(*rows: Sequence[int]) -> int:
    """How many first tokens all rows have in common."""
    alike = (len(set(tokens)) == 1 for tokens in zip(*rows, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, alike))
