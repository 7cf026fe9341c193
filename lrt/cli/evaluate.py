"""`lrt evaluate`, `lrt diagnose` and `lrt report`: what measures runs, and shows what was measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lrt.cli.options import Paths
from lrt.cli.results import choose_format, show_core, show_diagnosis, show_scores, show_tables
from lrt.eval.report.table import TableFormat
from lrt.utils import files
from lrt.utils.imports import extra

CORE_BUNDLE = Path("runs/data/core")
"""Where the questions of CORE are downloaded to."""


@dataclass(frozen=True)
class Evaluate:
    """Bits per byte of a checkpoint: under its schedule, live, the gap, and live with its memory replaced.

    Stopped, it goes on; torchrun's processes share the windows.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run's."""
    data: Paths = (Path("runs/data/stdlib"),)
    """Folders that `lrt prepare` wrote with the checkpoint's tokenizer: one or several corpora."""
    split: str = "val"
    """train, val or test. Choose on val; report test, once."""
    schedule: str | None = None
    """Schedule of the parallel score. None: the one trained with."""
    at_least: int | None = 50_000
    """Score windows of each corpus until this many tokens; None scores the whole split."""
    batch_size: int = 64
    """Windows scored at once; no score depends on it."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval to run instead, with true recurrence (needs the extra `lm-eval`)."""
    tasks_include: Path | None = None
    """A folder of tasks of your own, as lm-eval's YAML."""
    tasks_limit: int | None = None
    """Only so many items of each task. None: all."""
    tasks_shots: int | None = None
    """Few-shot examples. None: what each task says."""
    tasks_prefill: Literal["exact", "converged", "fast", "one_sweep"] = "converged"
    """How tasks read their texts."""
    core: Annotated[tuple[Path, ...] | None, tyro.conf.arg(metavar="[FOLDER]")] = None
    """Run CORE instead: 22 tasks, with recurrence on, off and one sweep, from this folder; none: from runs/data/core,
    downloaded first. Stopped, it goes on. (--tasks-limit and --tasks-prefill count here too.)"""
    out: Path | None = None
    """Folder for the results. None: evaluation/ in the folder of the checkpoint."""
    full: bool = False
    """Show how much was scored of each corpus, too."""
    format: TableFormat = "text"
    """Of what is printed: text, json, csv, md or latex."""
    json: bool = False
    """The same as --format json: one JSON object."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        choose_format(self.format, self.json)
        if self.tasks and self.core is not None:
            raise ValueError("--tasks and --core exclude each other; run one after the other")
        for flag, for_tasks in (("--tasks-include", self.tasks_include), ("--tasks-shots", self.tasks_shots)):
            if for_tasks is not None and not self.tasks:
                raise ValueError(f"{flag} is {for_tasks}, but no task is run; name some with --tasks")
        if self.tasks_include is not None and not self.tasks_include.is_dir():
            raise ValueError(
                f"tasks_include is {self.tasks_include}, which is no folder; name the folder of your tasks"
            )
        if self.tasks_limit is not None and self.tasks_limit < 1:
            raise ValueError(f"tasks_limit is {self.tasks_limit}; it must be at least 1")
        if self.tasks_limit is not None and not self.tasks and self.core is None:
            raise ValueError(f"--tasks-limit is {self.tasks_limit}, but no task is run; give --tasks or --core")

    def run(self) -> None:
        if self.tasks:
            return self.evaluate_tasks()
        if self.core is not None:
            return self.evaluate_core(self.core)
        from lrt.data.prepared import Prepared
        from lrt.distributed.parallelize import join_ranks
        from lrt.eval.diagnose import corpus_names, load_subject, score_corpora
        from lrt.eval.runs import run_name
        from lrt.model import checkpoint
        from lrt.utils.device import choose_device

        checkpoint.verify(self.checkpoint)  # before the corpora: the first thing named is the first looked for
        if len(self.data) == 0:
            raise ValueError("--data names no corpus; give at least one folder that `lrt prepare` wrote")
        files.check_writable(out := self.out or self.checkpoint / "evaluation")
        with join_ranks("ddp", choose_device(self.device)) as ranks:
            subjects = [
                load_subject(
                    self.checkpoint, Prepared.open(folder), self.split, self.at_least, self.batch_size, out, ranks,
                    schedule=self.schedule, name=name,
                )
                for folder, name in zip(self.data, corpus_names(self.data), strict=True)
            ]  # fmt: skip
            scores = score_corpora(subjects)
            if ranks.first:
                scores.write(out)
                name = run_name(self.checkpoint)
                show_scores(name, scores, choose_format(self.format, self.json), self.full, out)

    def evaluate_core(self, bundles: tuple[Path, ...]) -> None:
        """Print CORE, from the bundle that is named or else downloaded.

        ValueError, after the others' scores are printed, where some tasks could not be run: a partial score is no
        success. Every rank raises it, so that torchrun fails as a whole.
        """
        from lrt.distributed.parallelize import join_ranks
        from lrt.eval.core_metric.benchmark import CoreSettings, run_core
        from lrt.eval.core_metric.bundle import Bundle, download
        from lrt.eval.runs import run_name
        from lrt.model import checkpoint
        from lrt.utils.device import choose_device

        if len(bundles) > 1:
            raise ValueError(f"--core is {' '.join(map(str, bundles))}; give one folder, or none")
        settings = CoreSettings(self.tasks_limit, self.tasks_prefill, self.batch_size)
        with join_ranks("ddp", choose_device(self.device)) as ranks:
            folder = checkpoint.verify(self.checkpoint)
            model, tokenizer = checkpoint.load(folder, ranks.device)
            bundle = bundles[0] if bundles else ranks.rank0_first(lambda: download(CORE_BUNDLE))
            weights_sha256 = files.sha256(folder / "model.safetensors")
            files.check_writable(out := self.out or self.checkpoint / "evaluation")
            scores, problems = run_core(model, tokenizer, Bundle.open(bundle), weights_sha256, out, settings, ranks)
            if ranks.first:
                name = run_name(self.checkpoint)
                show_core(name, scores, choose_format(self.format, self.json), out)
        if problems:
            raise ValueError("some tasks could not be run: " + "; ".join(problems))

    def evaluate_tasks(self) -> None:
        """Print the metrics of lm-eval's tasks."""
        from lrt.eval.report.result_tables import task_table
        from lrt.utils.device import choose_device

        with extra("lm-eval", "--tasks"):
            from lrt.integrations.lm_eval import run_tasks
        results = run_tasks(
            self.checkpoint, self.tasks, self.tasks_prefill, self.batch_size, self.tasks_limit, self.tasks_shots,
            self.tasks_include, choose_device(self.device),
        )  # fmt: skip
        if (form := choose_format(self.format, self.json)) == "json":
            print(json.dumps(results, default=str))
        else:
            show_tables([f"True recurrence, texts read {self.tasks_prefill}."], [task_table(results)], form, None)


@dataclass(frozen=True)
class Diagnose:
    """Measure what a checkpoint's memory does, and whether training and decoding agree. Results stay beside it."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run's."""
    only: tuple[Literal["bpb", "sweeps", "hops", "ablations", "memory", "text", "bfloat16"], ...] = (
        "bpb",
        "sweeps",
        "hops",
        "ablations",
        "memory",
        "text",
    )
    """What to measure. bpb: by pass, position and document, with intervals; sweeps: the score after 1 to 64
    refinements, and a verdict; hops: over how many steps from token to token the model's state survives; ablations:
    live, with the memory replaced in every way; memory: gates, scales, reach; text: what recurrence gains token by
    token; bfloat16: live, and with the exact memory as a control."""
    probe: Literal["repl", "log", "chess"] | None = None
    """Instead: what a linear probe reads from the memory after every token, with chance beside it. Of programs (repl)
    the variables, of a key-value store (log) its keys, of chess (random games) the board. The texts are drawn; --data
    and --split are not used. The page of `lrt serve` shows what the probe reads."""
    data: Paths = (Path("runs/data/stdlib"),)
    """Folders that `lrt prepare` wrote with the checkpoint's tokenizer: one or several corpora."""
    split: str = "val"
    """train, val or test."""
    at_least: int | None = 10_000
    """Measure on windows with so many tokens; None takes the whole split. A probe is judged on texts of so many words,
    and fitted to four times as many."""
    batch_size: int = 16
    """Windows, or texts, at once."""
    out: Path | None = None
    """Folder for the results. None: evaluation/ in the folder of the checkpoint."""
    full: bool = False
    """Show the tables behind the sentences."""
    format: TableFormat = "text"
    """Of what is printed: text, json, csv, md or latex. All but text are in full."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        if self.probe is not None and self.at_least is None:
            raise ValueError(f"--at-least is None, and texts of {self.probe} are drawn without end; give a number")

    def run(self) -> None:
        if self.probe is not None:
            return self.fit_probe(self.probe)
        from lrt.data.prepared import Prepared
        from lrt.distributed.parallelize import join_ranks
        from lrt.eval.diagnose import corpus_names, diagnose, load_subject
        from lrt.eval.runs import run_name
        from lrt.utils.device import choose_device

        files.check_writable(out := self.out or self.checkpoint / "evaluation")
        with join_ranks("ddp", choose_device(self.device)) as ranks:
            results = []
            for folder, name in zip(self.data, corpus_names(self.data), strict=True):
                data = Prepared.open(folder)
                measured = load_subject(
                    self.checkpoint, data, self.split, self.at_least, self.batch_size, out, ranks, name=name
                )
                results += diagnose(measured, self.only)
            if ranks.first:
                show_diagnosis(run_name(self.checkpoint), results, self.format, self.full, out)

    def fit_probe(self, kind: Literal["repl", "log", "chess"]) -> None:
        """Fit a probe, print its scores, and keep it for the page."""
        from lrt.distributed.parallelize import join_ranks
        from lrt.eval.runs import run_name
        from lrt.experiments.state_data.probing import ProbeSettings, probe_checkpoint
        from lrt.utils.device import choose_device

        assert self.at_least is not None
        settings = ProbeSettings(kind, self.at_least, self.batch_size)
        files.check_writable(out := self.out or self.checkpoint / "evaluation")
        with join_ranks("ddp", choose_device(self.device)) as ranks, ranks.collective():
            if ranks.first:
                scores, _ = probe_checkpoint(self.checkpoint, settings, out, ranks.device)
                show_diagnosis(run_name(self.checkpoint), [scores], self.format, self.full, out)


@dataclass(frozen=True)
class Report:
    """One HTML file of some runs: curves, scores, sweep curves, gates, a text with what recurrence gains, settings."""

    runs: tyro.conf.Positional[Paths]
    """Folders of runs: what `lrt diagnose` and `lrt evaluate --core` found there is shown. And results of studies,
    STUDY.EDITION.jsonl: their tables and figures; and folders of `lrt finetune --controls`."""
    out: Path = Path("report.html")
    """File to write."""

    def run(self) -> None:
        from lrt.eval.report.page import report
        from lrt.experiments.studies.report_section import section
        from lrt.integrations.finetune import comparison

        results = [path for path in self.runs if path.suffix == ".jsonl"]
        compared = [path for path in self.runs if (path / comparison.FILE).is_file()]
        folders = [path for path in self.runs if path not in (*results, *compared)]
        sections = [section(path) for path in results] + [comparison.section(path) for path in compared]
        report(self.out, folders, sections)
        print(files.place_and_size(self.out))
