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
from lrt.distributed.single_process import SINGLE_PROCESS, SingleProcess
from lrt.eval.core_metric.answers import MODES, Mode, On, answer_question, score_questions
from lrt.eval.core_metric.bundle import TASKS, Bundle, CoreTask, bundle_digest
from lrt.eval.core_metric.questions import Question, build_question
from lrt.eval.ledger import Ledger
from lrt.eval.results import Result
from lrt.inference.prefill import PrefillMode
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
        """The mode of a name of MODES."""
        return On(self.prefill) if name == "on" else MODES[name]()


@dataclass(frozen=True)
class CoreRun:
    """What all tasks of a run have in common."""

    model: LatentRecurrentTransformer
    tokenizer: Tokenizer
    weights_sha256: str
    """Of the checkpoint."""
    out: Path
    """Where results go, and in partial/ what is done."""
    settings: CoreSettings
    ranks: SingleProcess
    progress: bool

    @property
    def modes(self) -> tuple[str, ...]:
        """Names of MODES: without a memory all of them are one."""
        recurs = self.model.config.stored_sources
        return tuple(MODES) if recurs else ("off",)


def run_core(
    model: LatentRecurrentTransformer,
    tokenizer: Tokenizer,
    bundle: Bundle,
    weights_sha256: str,
    out: Path,
    settings: CoreSettings | None = None,
    ranks: SingleProcess = SINGLE_PROCESS,
    progress: bool = True,
) -> tuple[Result, list[str]]:
    """Answer the bundle's questions; returns the result, and what is wrong with the tasks that could not be run.

    Every answer is kept in `out`/partial as soon as it is there: a stopped run goes on, and a task with a damaged file
    leaves the others' results alone. `weights_sha256` identifies the checkpoint. All ranks call it. ValueError where no
    task could be run.
    """
    settings, start = settings or CoreSettings(), time.perf_counter()
    run = CoreRun(model, tokenizer, weights_sha256, out, settings, ranks, progress)
    tasks, problems = {}, []
    for task in bundle.tasks:
        try:
            items = task.questions()
        except ValueError as error:
            problems.append(str(error))
            continue
        random.Random(ORDER).shuffle(items)  # before examples are drawn: nanochat's question i is that of this order
        tasks[task.label] = run_task(run, task, items)
    if not tasks:  # a mean of nothing is no score
        raise ValueError("; ".join(problems))
    result_settings = {"bundle": bundle_digest(bundle), "limit": settings.limit, "prefill": settings.prefill}
    values = summarise_tasks(tasks, run.modes, bundle, settings.limit)
    seconds = time.perf_counter() - start
    machine = hardware(model.embedding.weight.device)
    measured = Result("core", "CORE", weights_sha256, result_settings, values, seconds, machine)
    if ranks.first:
        measured.write(out)
    return measured, problems


def run_task(run: CoreRun, task: CoreTask, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of one task by mode, of `items` in the order in which they are numbered: its entry in the result."""
    count = len(range(len(items))[: run.settings.limit])
    ledger_settings = {
        "checkpoint": run.weights_sha256,
        "file": sha256(task.file),
        "shots": task.shots,
        "delimiter": task.delimiter,
        "order": ORDER,
    }
    accuracy: dict[str, float] = {}
    cropped = 0
    for mode in run.modes:
        # Of the modes only `on` depends on the kind of prefill.
        prefill = {"prefill": run.settings.prefill} if mode == "on" else {}
        ledger = Ledger(run.out / "partial", f"core-{task.label}-{mode}", ledger_settings | prefill, run.ranks)
        answer_all(run, task, items, count, mode, ledger)
        answers = ledger.gather()
        accuracy[mode] = sum(answers[str(i)]["correct"] for i in range(count)) / count
        cropped = sum(answers[str(i)]["cropped"] for i in range(count))
    return {
        "type": task.type,
        "shots": task.shots,
        "items": count,
        "of": len(items),
        "cropped": cropped,
        "random": task.random,
        "accuracy": accuracy,
        # The standard error of a share of `count` independent answers.
        "error": {mode: math.sqrt(p * (1 - p) / count) for mode, p in accuracy.items()},
        "centred": {mode: task.centred(p) for mode, p in accuracy.items()},
    }


def answer_all(
    run: CoreRun, task: CoreTask, items: Sequence[dict[str, Any]], count: int, mode: str, ledger: Ledger
) -> None:
    """Put this rank's share of the first `count` answers into the ledger, where they are not there yet."""
    todo = [int(key) for key in ledger.todo([str(i) for i in range(count)])]
    with bar(f"{task.label}, {mode}", len(todo), run.progress and run.ranks.first) as advance:
        for batch in question_batches(run, task, items, todo):
            scores = score_questions(run.model, batch, run.settings.mode(mode))
            answers = [answer_question(q, rows) for q, rows in zip(batch, scores, strict=True)]
            ledger.add(
                {
                    str(q.index): {"correct": a.correct, "chosen": a.option, "nats": a.nats, "cropped": q.cropped}
                    for q, a in zip(batch, answers, strict=True)
                }
            )
            advance(len(batch))


def question_batches(
    run: CoreRun, task: CoreTask, items: Sequence[dict[str, Any]], todo: Sequence[int]
) -> Iterator[list[Question]]:
    """Questions of similar length, with at most `settings.rows` options together (or one question)."""
    context, rows = run.model.config.context, run.settings.rows
    for first in range(0, len(todo), AHEAD):
        batch: list[Question] = []
        questions = [build_question(task, items, i, run.tokenizer, context) for i in todo[first : first + AHEAD]]
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
