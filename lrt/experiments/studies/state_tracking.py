"""State-tracking cells: train on short sequences, score the tracked state live on long ones."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from lrt.eval.ablations import ablate
from lrt.eval.report.style import FAMILIES, GREY, family_of, markers_of
from lrt.eval.report.table import Table
from lrt.experiments.state_tracking import measure
from lrt.experiments.state_tracking.tasks import TASKS, Task
from lrt.experiments.state_tracking.training import TrackingRun, train_tracking
from lrt.experiments.studies import grid
from lrt.experiments.studies.figures import legend_below, make_panels
from lrt.experiments.studies.grid import Cell, Fields
from lrt.experiments.studies.runner import Line
from lrt.model.config import ModelConfig
from lrt.model.execution import Execution
from lrt.model.memory_config import MemoryConfig
from lrt.model.size import count_parameters
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules import unrolled
from lrt.schedules.flops import training_flops
from lrt.schedules.parse import parse
from lrt.training.optim_config import OptimConfig
from lrt.utils.progress import Advance
from lrt.utils.torch_private import missing_compiler
from lrt.utils.validation import check_fields

TRAINING = 0.8
"""The part of a cell's time that training takes, for the bar."""
ABLATED = ("zero", "embedding")
"""What the memory is replaced with, live, at the shortest test (contract, section 5)."""
FEW = 250
"""Rows for that."""


class StateTracking:
    """Fields: those of TrackingRun (`model` without vocab_size), `tests` (lengths), `sequences`, `reads`.

    `stream`: {symbols, rows, compile}, a stream with one carried state per row, together so many symbols.
    `reads`: {task: {length, reads}}, further tests in which every answer is counted, not the last one's only.
    Tests longer than a model can read, which has a layer of full attention, are left out.

    Tests draw from seeds of 2^31 and more, training from lower ones (`measure.HELD_OUT`): a generator on the CPU knows
    32 bits of a seed.
    """

    def missing(self, cell: Cell) -> str | None:
        """Nothing: rows are drawn."""
        return None

    def is_current(self, line: Line) -> bool:
        """Always: the key hashes the fields, and they decide the run. What they leave out means its default, which a
        test holds (tests/experiments/test_committed_results.py)."""
        return True

    def discard(self, line: Line) -> None:
        """Nothing: a cell that is stopped begins anew."""

    def minutes(self, cell: Cell, device: str) -> float:
        """As the study says: measuring would take training to mastery. Raises ValueError for fields that are wrong."""
        run = tracking_run(cell.fields)
        stream = cell.fields.get("stream", {})
        if stream.get("compile") == "always":
            missing = missing_compiler(device)
            if missing is not None:
                raise ValueError(f"{cell.name} compiles its stream, but {missing}; set compile: never")
        if stream and unrolled.reason_uncovered(LatentRecurrentTransformer(run.model)) is not None:
            raise ValueError(
                f"{cell.name}: a stream needs a memory, and in every layer a window of at most "
                f"{unrolled.CHUNK + 1} positions"
            )
        return cell.minutes

    def run(self, fields: Fields, advance: Advance, device: str) -> dict[str, Any]:
        run = tracking_run(fields)
        task, sequences = run.source, fields.get("sequences", measure.SEQUENCES)
        scores: dict[str, Any] = {"parameters": count_parameters(run.model)[0], "chance": task.chance}
        try:
            done = train_tracking(run, lambda steps, text: advance(TRAINING * steps / run.steps, text), device=device)
        except FloatingPointError as error:
            return {**scores, "diverged": str(error)}
        scores |= {
            "tokens": done.tokens,
            # Counted at the longest rows: attention costs less on the shorter ones that came first.
            "training_flops": done.tokens * training_flops(run.model, parse(run.schedule), run.longest),
            "train_seconds": round(done.seconds, 1),
            "grown": {str(length): step for length, step in done.grown.items()},
            "loss": statistics.fmean(done.losses[-max(1, run.steps // 20) :]),  # of the last twentieth
            "last_state": {},
            "reads": {},
            "ablated": {},
        }
        # With a layer of full attention, positions behind the context cannot be read.
        longest = math.inf if run.model.unlimited_context else run.model.context
        tests, extra = [n for n in fields.get("tests", []) if n <= longest], fields.get("reads", {})
        share = (1 - TRAINING) / max(1, len(tests) + len(extra) + ("stream" in fields))
        for wanted in tests:
            length = task.length(wanted)
            answers = measure.score_last_state(done.model, task, length, sequences, run.seed)
            scores["last_state"][str(length)] = {"sequences": answers.asked, "accuracy": answers.accuracy}
            advance(share, f"length {length}: {answers.accuracy:.1%}")
        for name, test in extra.items():
            answers = measure.score_reads(done.model, TASKS[name], test["length"], test["reads"], run.seed)
            scores["reads"][name] = {"length": test["length"], "reads": answers.asked, "errors": answers.errors}
            advance(share, f"{name}: {answers.errors} errors")
        if tests and run.model.stored_sources:
            for name in ABLATED:
                ablated, shortest = ablate(done.model, name), task.length(tests[0])
                answers = measure.score_last_state(ablated, task, shortest, FEW, run.seed)
                scores["ablated"][name] = {"sequences": FEW, "accuracy": answers.accuracy}
        if "stream" in fields:
            scores["stream"] = score_stream(
                done.model, task, fields["stream"], run.seed, lambda amount, text="": advance(share * amount, text)
            )
        return scores

    def score(self, line: Line) -> str:
        """The last state of the longest rows."""
        if "diverged" in line["result"]:
            return "diverged"
        by_length = {int(length): test["accuracy"] for length, test in line["result"]["last_state"].items()}
        longest = max(by_length, default=0)
        return f"last state {100 * by_length[longest]:.1f} % right at length {longest:,}" if longest else "trained"

    def tables(self, lines: Sequence[Line]) -> list[Table]:
        """A summary of all tasks; each, mean and standard deviation over seeds; errors among all reads; streams."""
        tasks = [task_table(task, of_task) for (task,), of_task in group_by_choices(lines, "task").items()]
        finished = [line for line in lines if "diverged" not in line["result"]]
        return [summary_table(lines), *tasks, reads_table(finished), stream_table(finished)]

    def figure(self, lines: Sequence[Line]) -> Figure:
        """Accuracy of the last state against length, a panel per task, a line per model: mean and deviation."""
        curves: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(dict)
        for (task, model), by_length in accuracies(lines).items():
            curves[task][model] = by_length
        models = list(dict.fromkeys(model for task in curves.values() for model in task))
        markers = markers_of(models)
        figure, panels = make_panels(list(curves), width=4.8)
        for panel, (task, by_model) in zip(panels, curves.items(), strict=True):
            for model, points in by_model.items():
                draw_curve(panel, models.index(model), model, markers[model], points)
            first = next(line for line in lines if choice_on(line, "task") == task)
            panel.axhline(100 * TASKS[first["fields"]["task"]].chance, color=GREY, linewidth=0.8, linestyle=":")
            panel.axvspan(1, first["fields"]["longest"], color=GREY, alpha=0.12, linewidth=0)
            panel.set(xlabel="length, symbols (grey: trained on)", ylim=(0, 104))
            panel.set_ylabel("last state right, % (dotted: chance)")
            lengths = sorted({length for points in by_model.values() for length in points})
            panel.set(xscale="log", xlim=(0.75 * lengths[0], 1.5 * lengths[-1]))
            panel.set_xticks(lengths, [str(n) for n in lengths])
            panel.minorticks_off()
        handles = {str(h.get_label()): h for p in panels for h in p.get_legend_handles_labels()[0]}
        legend_below(figure, list(handles.values()), columns=3)
        return figure


def score_stream(
    model: LatentRecurrentTransformer, task: Task, stream: Fields, seed: int, advance: Advance
) -> dict[str, Any]:
    """The accuracy of a stream, whole and in tenths, and how it was run."""
    generator = measure.held_out_generator("stream", task.name, stream["symbols"], seed)
    tokens, classes = measure.sample_rows(model, task, stream["rows"], stream["symbols"] // stream["rows"], generator)
    begun = time.perf_counter()
    answers = measure.stream_answers(model, tokens, classes, execution=Execution(stream["compile"]), advance=advance)
    return {
        "symbols": tokens.numel(),
        "rows": stream["rows"],
        "accuracy": answers.accuracy,
        "tenths": [part.accuracy for part in answers.parts],
        "carried_numbers": answers.carried,
        "seconds": round(time.perf_counter() - begun, 1),
    }


TESTS = {"tests", "sequences", "reads", "stream"}
"""Fields that say what is measured after training."""


def tracking_run(fields: Fields) -> TrackingRun:
    """The run that a cell's fields describe. ValueError where they are wrong, those of tests included."""
    own = {field.name for field in dataclasses.fields(TrackingRun)}
    unknown = sorted(set(fields) - own - TESTS)
    if unknown:
        raise ValueError(f"a tracking cell has no field {', '.join(unknown)}; it has {', '.join(sorted(own | TESTS))}")
    missing = {"task", "model", "optim"} - set(fields)
    if missing:
        raise ValueError(f"a tracking cell needs {', '.join(sorted(missing))}")
    for name in (fields["task"], *fields.get("reads", ())):
        TASKS.check(name)
    task = TASKS[fields["task"]]
    check_fields(ModelConfig, fields["model"], "model")
    check_fields(MemoryConfig, fields["model"].get("memory", {}), "model.memory")
    check_fields(OptimConfig, fields["optim"], "optim")
    model = ModelConfig.from_dict({**fields["model"], "vocab_size": task.vocabulary})
    # `tests` and the like are measured after training: they decide the cell, not its run.
    rest = {k: v for k, v in fields.items() if k not in {"model", "optim", *TESTS}}
    check_fields(TrackingRun, rest, "the cell")
    return TrackingRun(model=model, optim=OptimConfig(**fields["optim"]), **rest)


def recipe(task: str, model: str = "sequential", edition: str = "tiny", seed: int = 0) -> TrackingRun:
    """The run of a cell of the study, by its choices there: `recipe("S5 by swaps")` is what solves it.

    ValueError for choices that the study has not.
    """
    study = grid.read_study("state-tracking", edition)
    cell = next((cell for cell in study.cells if cell.choices == (task, model)), None)
    if cell is None:
        pairs = ", ".join(f"{a!r} {b!r}" for a, b in dict.fromkeys(cell.choices for cell in study.cells))
        raise ValueError(f"edition {edition} has no {task!r} under {model!r}; it has {pairs}")
    return tracking_run({**cell.fields, "seed": seed})


def accuracies(lines: Sequence[Line]) -> dict[tuple[str, str], dict[int, list[float]]]:
    """(task, model) -> length -> each seed's accuracy."""
    by_pair: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        for length, score in line["result"].get("last_state", {}).items():
            by_pair[choice_on(line, "task"), choice_on(line, "model")][int(length)].append(score["accuracy"])
    return by_pair


def summary_table(lines: Sequence[Line]) -> Table:
    """A row per model, a column per task and length: accuracy of the last state. No rows where there is one task.

    Of fewer seeds than the most that a cell has, how many stands behind.
    """
    scores = accuracies(lines)
    columns = list(dict.fromkeys((task, n) for (task, _), by_length in scores.items() for n in sorted(by_length)))
    models = list(dict.fromkeys(choice_on(line, "model") for line in lines))
    most = max((len(v) for by_length in scores.values() for v in by_length.values()), default=0)

    def entry(values: Sequence[float]) -> str:
        fewer = f" ({len(values)} seed{'s' * (len(values) > 1)})" if len(values) < most else ""
        return mean_and_deviation(values).removesuffix(" ± 0.0") + fewer if values else ""

    body = [[m, *(entry(scores.get((task, m), {}).get(n, [])) for task, n in columns)] for m in models]
    head = ["last state right, %", *(f"{task}, {n}" for task, n in columns)]
    return Table("", head, body if len({task for task, _ in columns}) > 1 else [])


def task_table(task: str, lines: Sequence[Line]) -> Table:
    """A row per model: accuracy of the last state by length, what its memory is worth, and what it was trained with.

    How far the rows grew says how long its mean loss kept falling, not what it answers. The ablations are at the
    shortest test.
    """
    scores = accuracies(lines)
    lengths = sorted({length for by_length in scores.values() for length in by_length})
    names = {"zero": "memory zero", "embedding": "memory embedding"}
    head = ["model", "seeds", *map(str, lengths), *(names[a] for a in ABLATED), "rows grew to (of)", "training FLOPs"]
    body = []
    for (model,), of_model in group_by_choices(lines, "model").items():
        finished = [line for line in of_model if "diverged" not in line["result"]]
        lost = len(of_model) - len(finished)
        seeds = f"{len(finished)}" + (f", {lost} diverged" if lost else "")
        if not finished:
            body.append([model, seeds, *[""] * (len(head) - 2)])
            continue
        # The first results were made before memories were ablated.
        ablated = [line["result"]["ablated"] for line in finished if line["result"].get("ablated")]
        replaced = [mean_and_deviation([by_name[name]["accuracy"] for by_name in ablated]) for name in ABLATED]
        grown = ", ".join(max(line["result"]["grown"], key=int) for line in finished)
        at_length = [mean_and_deviation(scores[task, model].get(length, [])) for length in lengths]
        flops = statistics.fmean(line["result"]["training_flops"] for line in finished)
        longest = finished[0]["fields"]["longest"]
        body.append([model, seeds, *at_length, *replaced, f"{grown} ({longest})", f"{flops:.1e}"])
    chance = lines[0]["result"]["chance"]
    return Table(f"{task}: last state right, %, by length; chance {chance:.1%}", head, body)


def reads_table(lines: Sequence[Line]) -> Table:
    """Errors among all answers of longer or other sequences."""
    rows = []
    for (task, model), of_pair in group_by_choices(lines, "task", "model").items():
        for test in of_pair[0]["result"]["reads"]:
            reads = [line["result"]["reads"][test] for line in of_pair]
            errors = ", ".join(f"{read['errors']:,} / {read['reads']:,}" for read in reads)
            rows.append([task, model, test, errors])
    return Table("", ["trained on", "model", "test", "errors / reads, by seed"], rows)


def stream_table(lines: Sequence[Line]) -> Table:
    """One row per stream."""
    rows = []
    for line in lines:
        if "stream" in line["result"]:
            stream, task, model = line["result"]["stream"], choice_on(line, "task"), choice_on(line, "model")
            scores = [f"{100 * accuracy:.4f}" for accuracy in (stream["accuracy"], min(stream["tenths"]))]
            rows.append([task, model, str(line["seed"]), f"{stream['symbols']:,}", *scores])
    return Table("", ["stream", "model", "seed", "symbols", "right, %", "worst tenth, %"], rows)


def group_by_choices(lines: Sequence[Line], *axes: str) -> dict[tuple[str, ...], list[Line]]:
    """Lines by their choices on these axes, in order."""
    groups: dict[tuple[str, ...], list[Line]] = defaultdict(list)
    for line in lines:
        groups[tuple(choice_on(line, axis) for axis in axes)].append(line)
    return groups


def choice_on(line: Line, axis: str) -> str:
    """A line's choice on an axis; in a study without that axis, the task or the schedule that it ran."""
    if axis in line["choices"]:
        return line["choices"][axis]
    return line["fields"]["task"] if axis == "task" else line["fields"].get("schedule", TrackingRun.schedule)


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean ± standard deviation, in per cent; nothing of no values."""
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.fmean(values):.1f} ± {100 * deviation:.1f}"


def draw_curve(panel: Any, index: int, model: str, marker: str, points: dict[int, list[float]]) -> None:
    """A model's curve, its mean with a bar of one standard deviation either side: in colour where a state recurs."""
    lengths = sorted(points)
    means = [100 * statistics.fmean(points[n]) for n in lengths]
    spreads = [100 * statistics.stdev(points[n]) if len(points[n]) > 1 else 0.0 for n in lengths]
    # No bar says more than 100 %, or less than nothing.
    bars = [[min(s, m) for s, m in zip(spreads, means, strict=True)]]
    bars.append([min(s, 100 - m) for s, m in zip(spreads, means, strict=True)])
    places = [n * 1.02**index for n in lengths]  # side by side, where many are at 100 %
    colour = FAMILIES["lrt"] if family_of(model) == "lrt" else GREY
    panel.plot(places, means, marker=marker, markersize=4, linewidth=1, color=colour, label=model)
    panel.errorbar(places, means, yerr=bars, fmt="none", ecolor=colour, capsize=2)
