"""Run CORE on a model: task by task and mode by mode, resumable, shared among ranks; a table at the end."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrt.data.tokenizer import Tokenizer
from lrt.distributed.single import SINGLE_PROCESS, SingleProcess
from lrt.eval.core_metric.answers import MODES, Mode, On, answer_question, score_questions
from lrt.eval.core_metric.bundle import TASKS, Bundle, CoreTask, bundle_digest
from lrt.eval.core_metric.questions import Question, build_question
from lrt.eval.ledger import Ledger
from lrt.eval.results import Result
from lrt.inference.prefill import Mode as PrefillMode
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.utils.files import sha256
from lrt.utils.progress import bar
from lrt.utils.provenance import hardware

ORDER = 1337
"""Seed of the order of a task's questions (nanochat's): by it they are numbered, and a limit takes the first."""
AHEAD = 256
"""Questions whose prompts exist at one time, so that memory does not grow with the task."""
ROWS = 64
"""Options scored at once."""


@dataclass(frozen=True)
class CoreSettings:
    """How CORE is run."""

    limit: int | None = None
    """Questions of each task; None takes all."""
    prefill: PrefillMode = "converged"
    """How texts are read with recurrence on."""
    rows: int = ROWS
    """Options scored at once; no score depends on it beyond rounding."""

    def mode(self, name: str) -> Mode:
        return On(self.prefill) if name == "on" else MODES[name]()


def run_core(
    model: LatentRecurrentTransformer,
    tokenizer: Tokenizer,
    bundle: Bundle,
    weights: str,
    out: Path,
    settings: CoreSettings | None = None,
    ranks: SingleProcess = SINGLE_PROCESS,
    progress: bool = True,
) -> tuple[Result, list[str]]:
    """Answer the bundle's questions; returns the result, and what is wrong with the tasks that could not be run.

    Every answer is kept in `out`/partial as soon as it is there: a stopped run goes on, and a task with a damaged file
    leaves the others' results alone. `weights` is the checkpoint's SHA-256. All ranks call it.
    """
    settings, begun = settings or CoreSettings(), time.perf_counter()
    recurs = bool(model.config.memory.stored_sources(model.config.depth))
    modes = tuple(MODES) if recurs else ("off",)
    tasks, problems = {}, []
    for task in bundle.tasks:
        try:
            items = task.questions()
        except ValueError as error:
            problems.append(str(error))
            continue
        random.Random(ORDER).shuffle(items)  # before examples are drawn: nanochat's question i is that of this order
        tasks[task.label] = run_task(model, tokenizer, task, items, modes, weights, out, settings, ranks, progress)
    if not tasks:  # a mean of nothing is no score
        raise ValueError("; ".join(problems))
    about = {"bundle": bundle_digest(bundle), "limit": settings.limit, "prefill": settings.prefill}
    values = summarise_tasks(tasks, modes, bundle, settings.limit)
    spent = time.perf_counter() - begun
    result = Result("core", "CORE", weights, about, values, spent, hardware(model.embedding.weight.device))
    if ranks.first:
        result.write(out)
    return result, problems


def run_task(
    model: LatentRecurrentTransformer,
    tokenizer: Tokenizer,
    task: CoreTask,
    items: Sequence[dict[str, Any]],
    modes: Sequence[str],
    weights: str,
    out: Path,
    settings: CoreSettings,
    ranks: SingleProcess,
    progress: bool,
) -> dict[str, Any]:
    """Accuracy of one task by mode, of `items` in the order in which they are numbered."""
    indices = range(len(items))[: settings.limit]
    about = {
        "checkpoint": weights,
        "file": sha256(task.file),
        "shots": task.shots,
        "delimiter": task.delimiter,
        "order": ORDER,
    }
    accuracy: dict[str, float] = {}
    cropped = 0
    for name in modes:
        how = {"prefill": settings.prefill} if name == "on" else {}
        ledger = Ledger(out / "partial", f"core-{task.label}-{name}", about | how, ranks)
        todo = [int(key) for key in ledger.todo([str(i) for i in indices])]
        with bar(f"{task.label}, {name}", len(todo), progress and ranks.first) as advance:
            for batch in question_batches(task, items, todo, tokenizer, model.config.context, settings.rows):
                scored = score_questions(model, batch, settings.mode(name))
                answers = [answer_question(q, rows) for q, rows in zip(batch, scored, strict=True)]
                ledger.add(
                    {
                        str(q.index): {"correct": a.correct, "chosen": a.option, "nats": a.nats, "cropped": q.cropped}
                        for q, a in zip(batch, answers, strict=True)
                    }
                )
                advance(len(batch))
        done = ledger.everybody()
        accuracy[name] = sum(done[str(i)]["correct"] for i in indices) / len(indices)
        cropped = sum(done[str(i)]["cropped"] for i in indices)
    return {
        "type": task.type,
        "shots": task.shots,
        "items": len(indices),
        "of": len(items),
        "cropped": cropped,
        "random": task.random,
        "accuracy": accuracy,
        "error": {name: math.sqrt(p * (1 - p) / len(indices)) for name, p in accuracy.items()},
        "centred": {name: task.centred(p) for name, p in accuracy.items()},
    }


def question_batches(
    task: CoreTask, items: Sequence[dict[str, Any]], todo: Sequence[int], tokenizer: Tokenizer, context: int, rows: int
) -> Iterator[list[Question]]:
    """Questions of similar length, at most `rows` options together (or one question)."""
    for first in range(0, len(todo), AHEAD):
        batch: list[Question] = []
        questions = [build_question(task, items, i, tokenizer, context) for i in todo[first : first + AHEAD]]
        for q in sorted(questions, key=lambda q: (q.shared, max(map(len, q.rows)))):
            if batch and sum(len(b.rows) for b in batch) + len(q.rows) > rows:
                yield batch
                batch = []
            batch.append(q)
        if batch:
            yield batch


def summarise_tasks(tasks: dict[str, Any], modes: Sequence[str], bundle: Bundle, limit: int | None) -> dict[str, Any]:
    """All tasks, and the mean of their centred accuracy: CORE where all 22 are there whole, else a partial one."""
    whole = len(tasks) == TASKS and all(task["items"] == task["of"] for task in tasks.values())
    limited = f", {limit} questions each" if limit is not None else ""
    return {
        "name": "CORE" if whole else f"partial CORE ({len(tasks)}/{TASKS}{limited})",
        "score": {name: sum(t["centred"][name] for t in tasks.values()) / max(1, len(tasks)) for name in modes},
        "modes": list(modes),
        "tasks": tasks,
        "missing": list(bundle.missing),
        "references": {
            # The mean over the same tasks, so that a partial CORE stands beside a partial one.
            model: {**scores, "same tasks": sum(scores[t] for t in tasks) / max(1, len(tasks))}
            for model, scores in bundle.references.items()
            if set(tasks) <= set(scores)
        },
    }
