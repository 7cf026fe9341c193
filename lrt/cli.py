"""The command line: one verb per thing to do (`lrt --help`). Each is a dataclass that runs itself."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from lrt import checkpoint, recipes
from lrt.bench.commands import Bench, Calibrate
from lrt.config import require
from lrt.core.bundle import Bundle, download
from lrt.core.run import Settings as CoreSettings
from lrt.core.run import core_lines, run_core
from lrt.data.hub import Dataset
from lrt.data.prepare import SHARD_TOKENS, prepare
from lrt.data.prepared import Prepared
from lrt.data.records import Selection
from lrt.demo import demo
from lrt.device import chosen_device
from lrt.diagnose import corpus_names, diagnose, score_corpora, subject
from lrt.distributed import Alone
from lrt.execution import Execution
from lrt.extras import extra
from lrt.keeping import Keeping
from lrt.matching import Other, compare, matched_all
from lrt.model.flops import count_parameters
from lrt.nanochat import import_checkpoint
from lrt.resultlines import lines
from lrt.run import RunConfig
from lrt.serve.command import Serve
from lrt.terminal import Chat, Sample
from lrt.trainer import train
from lrt.watching import Watching, warn

ABOUT = "Prepare text, train latent recurrent transformers, score them live, let them write, and serve them."
Paths = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE…")]
if TYPE_CHECKING:
    Recipe = RunConfig
else:  # one subcommand per recipe, whose fields the command line overrides
    Recipe = tyro.extras.subcommand_type_from_defaults(
        {name: make() for name, make in recipes.RECIPES.items()}, prefix_names=False
    )


@dataclass(frozen=True)
class Prepare:
    """Turn text into tokens: three splits, and a byte-level BPE trained on the first. Stopped, it goes on next time."""

    out: tyro.conf.Positional[Path]
    """Folder to write."""
    text: Paths = ()
    """UTF-8 text files; JSON lines (.jsonl, .ndjson, also .gz, .xz, .zst); Parquet (.parquet). None, and no data set:
    the source of this Python's own standard library."""
    dataset: str | None = None
    """A Hugging Face data set: a hub name (owner/name), a local folder, fineweb-edu or climbmix. It is streamed."""
    dataset_config: str | None = None
    """The data set's configuration (subset). None: its default; sample-10BT for fineweb-edu."""
    dataset_split: str = "train"
    """Which of the data set's own splits to read."""
    dataset_revision: str | None = None
    """Branch, tag or commit of the data set. None: the newest, which the manifest then names."""
    field: str = "text"
    """The field or column that holds the text, in JSON lines, Parquet and data sets."""
    split_by: str | None = None
    """A field whose value decides the split, so that documents which share it stay together. None: the text does."""
    split_until: str | None = None
    """Only the part of that value before this string, such as / for an id that reads author/title."""
    documents: int | None = None
    """Stop after so many documents. None: take all."""
    vocab_size: int = 2048
    """Size of the vocabulary to train."""
    tokenizer: Path | None = None
    """A tokenizer.json to use instead of training one."""
    workers: int | None = None
    """Processes that encode; the result does not depend on it. None: one per core; 0: only this one."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens of a shard."""

    def run(self) -> None:
        dataset = None
        if self.dataset is not None:
            dataset = Dataset(self.dataset, self.dataset_config, self.dataset_split, self.dataset_revision)
        data = prepare(
            self.out,
            list(self.text) or None,
            self.vocab_size,
            self.tokenizer,
            dataset=dataset,
            selection=Selection(self.field, self.split_by, self.split_until, self.documents),
            workers=self.workers,
            shard_tokens=self.shard_tokens,
        )
        print(f"{self.out}: vocabulary {data.vocab_size}")
        for name, split in data.manifest["splits"].items():
            print(
                f"  {name:5} {len(split['shards']):5,} shards {split['documents']:12,} documents "
                f"{split['tokens']:15,} tokens {split['bytes']:15,} bytes"
            )


Matches = tyro.conf.UseAppendAction[tuple[tuple[Literal["parameters", "tokens", "compute", "wall_clock"], Path], ...]]


@dataclass(frozen=True)
class Train:
    """Train a recipe, with whatever fields are overridden: `lrt train d4 --optim.matrix-lr 0.01`."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    """What to train."""
    data: Path | None = None
    """A folder that `lrt prepare` wrote. None: the standard library, prepared in runs/data/stdlib."""
    out: Path = Path("runs/train")
    """Folder for metrics.jsonl, snapshots and the checkpoint."""
    match: Matches = ()
    """Make the run fair beside another: `--match parameters RUN` widens the MLP, `tokens`, `compute` (training FLOPs)
    and `wall_clock` (paired step times, measured here) set the horizon. May be given several times."""
    resume: str = "auto"
    """auto goes on from the newest snapshot in --out; never starts anew; a snapshot's folder goes on from that one,
    also with other rates, schedule or horizon."""
    keeping: Keeping = dataclasses.field(default_factory=lambda: Keeping(every=200))
    """Snapshots."""
    watching: Watching = dataclasses.field(default_factory=Watching)
    """Live scores and the gap while training, and where numbers go."""
    execution: Execution = dataclasses.field(default_factory=Execution)
    """Compiling, and recomputing instead of keeping."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    parallel: Literal["fsdp", "fsdp-reshard", "ddp"] = "fsdp"
    """How the processes of torchrun share the model: in shards, gathered once per step or anew for every pass; or each
    has it whole."""

    def run(self) -> None:
        from lrt.parallel import start  # loads much of torch.distributed

        with start(self.parallel, chosen_device(self.device)) as ranks:
            self.train(ranks)

    def train(self, ranks: Alone) -> None:
        data = ranks.in_turn(
            lambda: prepare(Path("runs/data/stdlib")) if self.data is None else Prepared.open(self.data)
        )
        # The vocabulary is a fact of the data, not a choice of the run.
        model = dataclasses.replace(self.recipe.model, vocab_size=data.vocab_size)
        run = self.matched(dataclasses.replace(self.recipe, model=model), data, ranks)
        total, dense = count_parameters(run.model)
        held = data.manifest["splits"]["train"]["tokens"]
        if ranks.first:
            print(
                f"{total:,} parameters ({dense:,} without tables and head), {run.schedule}, {run.steps:,} steps of "
                f"{run.batch_tokens:,} tokens: {run.tokens:,} tokens ({run.tokens / held:.2f} epochs of {held:,}), "
                f"{run.flops:.3g} training FLOPs"
            )
            if run.tokens > held:
                warn(f"{run.tokens:,} tokens go {run.tokens / held:.1f} times through the {held:,} of the data")
        _, done = train(
            run,
            data,
            self.out,
            ranks.device,
            keeping=self.keeping,
            watching=self.watching,
            resume_from=self.resume,
            ranks=ranks,
            execution=self.execution,
        )
        if not ranks.first:
            return
        print(f"{self.out / 'checkpoint'}: {done.tokens:,} tokens in {done.seconds:.0f} s, loss {done.loss:.4f}")
        about = checkpoint.about(self.out / "checkpoint")
        if scores := about.get("scores"):
            print("live {live_bpb:.4f} bits per byte, parallel {parallel_bpb:.4f}, gap {gap:+.4f}".format(**scores))
        packing = about["packing"]
        share = packing["padded"] / max(1, packing["padded"] + packing["targets"])  # 0 rows: resumed at its end
        print(
            f"packed: {packing['cropped']:,} of {packing['targets']:,} tokens cropped, {share:.2%} of positions padded"
        )

    def matched(self, run: RunConfig, data: Prepared, ranks: Alone) -> RunConfig:
        """The run after every --match, and on the screen what is equal and what is not."""
        others = [(kind, Other.read(path)) for kind, path in self.match]
        run = matched_all(run, others, data, ranks, self.out)
        for other in {other.path: other for _, other in others}.values() if ranks.first else ():
            print(f"beside {other.path}:", *map(str, compare(run, other, data, self.out)), sep="\n")
        return run


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
    json: bool = False
    """Print one JSON object instead of text."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def run(self) -> None:
        if self.tasks:
            return self.run_tasks()
        if self.core is not None:
            return self.run_core(self.core)
        from lrt.parallel import start  # loads much of torch.distributed

        checkpoint.verified(self.checkpoint)  # before the corpora: the first thing named is the first looked for
        require(len(self.data) > 0, "--data names no corpus; give at least one folder that `lrt prepare` wrote")
        out = self.out or self.checkpoint / "evaluation"
        with start("ddp", chosen_device(self.device)) as ranks:
            subjects = [
                subject(
                    self.checkpoint, Prepared.open(folder), self.split, self.at_least, self.batch_size, out, ranks,
                    schedule=self.schedule, name=name,
                )
                for folder, name in zip(self.data, corpus_names(self.data), strict=True)
            ]  # fmt: skip
            result = score_corpora(subjects)
            if ranks.first:
                result.write(out)
                print(json.dumps(result.values) if self.json else "\n".join(lines(result)))

    def run_core(self, folders: tuple[Path, ...]) -> None:
        from lrt.parallel import start  # loads much of torch.distributed

        require(len(folders) <= 1, f"--core is {' '.join(map(str, folders))}; give one folder, or none")
        settings = CoreSettings(self.tasks_limit, self.tasks_prefill, self.batch_size)
        with start("ddp", chosen_device(self.device)) as ranks:
            folder = checkpoint.verified(self.checkpoint)
            model, tokenizer = checkpoint.load(folder, ranks.device)
            place = folders[0] if folders else ranks.in_turn(lambda: download(Path("runs/data/core")))
            weights = checkpoint.sha256(folder / "model.safetensors")
            out = self.out or self.checkpoint / "evaluation"
            result, problems = run_core(model, tokenizer, Bundle.open(place), weights, out, settings, ranks)
            if ranks.first:
                print(json.dumps(result.to_dict()) if self.json else "\n".join(core_lines(result.values)))
        require(not problems, "some tasks could not be run: " + "; ".join(problems))

    def run_tasks(self) -> None:
        with extra("lm-eval", "--tasks"):
            from lrt.hf.harness import run_tasks
        results = run_tasks(
            self.checkpoint, self.tasks, self.tasks_prefill, self.batch_size, self.tasks_limit, self.tasks_shots,
            self.tasks_include, chosen_device(self.device),
        )  # fmt: skip
        if self.json:
            print(json.dumps(results, default=str))
            return
        for task, metrics in results.items():
            for metric, value in metrics.items():
                if isinstance(value, float):
                    print(f"{task:26} {metric:22} {value:.4f}")


@dataclass(frozen=True)
class Export:
    """Write a checkpoint as a Hugging Face folder, which works where lrt is not installed."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run's."""
    out: tyro.conf.Positional[Path]
    """Folder to write."""
    prefill: Literal["exact", "converged", "fast", "one_sweep"] = "converged"
    """How the exported model reads prompts and texts; `model.config.prefill` changes it later."""
    remote_code: bool = True
    """Put the code into the folder, to be loaded with trust_remote_code=True. Without it, the folder needs lrt."""

    def run(self) -> None:
        with extra("hf", "export"):
            from lrt.hf.export import export
        export(self.checkpoint, self.out, self.prefill, self.remote_code)
        print(f"{self.out}: {', '.join(sorted(file.name for file in self.out.iterdir()))}")


@dataclass(frozen=True)
class Import:
    """Convert a checkpoint of nanochat, or of the paper's authors' LRT, to a checkpoint of this library."""

    source: tyro.conf.Positional[Path]
    """A model_*.pt with its meta_*.json beside it, or their folder (the newest is taken). Nothing in it is run."""
    out: tyro.conf.Positional[Path]
    """Folder to write."""
    tokenizer: Path
    """The tokenizer.json that it was trained with."""

    def run(self) -> None:
        model = import_checkpoint(self.source, self.out, self.tokenizer)
        total, _ = count_parameters(model.config)
        print(f"{self.out}: {total:,} parameters, schedule {checkpoint.about(self.out)['schedule']}")


@dataclass(frozen=True)
class Demo:
    """Train a transformer, token shift and an LRT alike, score them live, and write a report."""

    text: Paths = ()
    """Your own UTF-8 text files. None: the source of this Python's own standard library."""
    out: Path = Path("runs/demo")
    """Folder for checkpoints, report.html and summary.json."""
    tokens: int | None = None
    """Training tokens per model. None: 800,000, or 8 times through a short text."""
    seed: int = 0
    """Seed of weights, data order and sample."""
    prompt: str | None = None
    """What the sample continues. None: the first line of a held-out document."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def run(self) -> None:
        demo(self.out, list(self.text) or None, self.tokens, self.seed, chosen_device(self.device), self.prompt)


@dataclass(frozen=True)
class Diagnose:
    """Measure what a checkpoint's memory does, and whether training and decoding agree. Results stay beside it."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run's."""
    only: tuple[Literal["bpb", "sweeps", "ablations", "memory", "text", "bfloat16"], ...] = (
        "bpb",
        "sweeps",
        "ablations",
        "memory",
        "text",
    )
    """What to measure. bpb: by pass, position and document, with intervals; sweeps: the score after 1 to 64
    refinements, and a verdict; ablations: live, with the memory replaced in every way; memory: gates, scales, reach;
    text: what recurrence gains token by token; bfloat16: live, and with the exact memory as a control."""
    data: Paths = (Path("runs/data/stdlib"),)
    """Folders that `lrt prepare` wrote with the checkpoint's tokenizer: one or several corpora."""
    split: str = "val"
    """train, val or test."""
    at_least: int | None = 10_000
    """Measure on windows with so many tokens; None takes the whole split."""
    batch_size: int = 16
    """Windows at once."""
    out: Path | None = None
    """Folder for the results. None: evaluation/ in the folder of the checkpoint."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def run(self) -> None:
        from lrt.parallel import start  # loads much of torch.distributed

        out = self.out or self.checkpoint / "evaluation"
        with start("ddp", chosen_device(self.device)) as ranks:
            for folder, name in zip(self.data, corpus_names(self.data), strict=True):
                data = Prepared.open(folder)
                measured = subject(
                    self.checkpoint, data, self.split, self.at_least, self.batch_size, out, ranks, name=name
                )
                for result in diagnose(measured, self.only):
                    if ranks.first:
                        print("\n".join([f"{result.kind}, {result.subject}", *lines(result), ""]))
            if ranks.first:
                print(f"results in {out}")


@dataclass(frozen=True)
class Report:
    """One HTML file of some runs: curves, scores, sweep curves, gates, a text with what recurrence gains, settings."""

    runs: tyro.conf.Positional[Paths]
    """Folders of runs: what `lrt diagnose` and `lrt evaluate --core` found there is shown. And results of studies,
    STUDY.EDITION.jsonl: their tables and figures."""
    out: Path = Path("report.html")
    """File to write."""

    def run(self) -> None:
        from lrt.runreport import report  # loads matplotlib
        from lrt.studies.page import section

        results = [path for path in self.runs if path.suffix == ".jsonl"]
        folders = [path for path in self.runs if path.suffix != ".jsonl"]
        report(self.out, folders, [section(path) for path in results])
        print(f"{self.out}: {self.out.stat().st_size / 1e6:.2f} MB")


@dataclass(frozen=True)
class RunStudy:
    """Run a study's grid, cell by cell, and show its table and figure. What is done is skipped; stopped, it goes on."""

    study: tyro.conf.Positional[str]
    """A study that comes with the library (rivals, schedule, source, injection, scaling, state-tracking), or a .yaml
    file of one's own."""
    edition: str = "tiny"
    """Which of its sizes: tiny is for two CPU cores."""
    only: tuple[str, ...] = ()
    """Run only the cells that have all of these choices, for example parity sequential."""
    results: Path = Path("runs/studies")
    """Folder of the results, STUDY.EDITION.jsonl."""
    figure: Path | None = None
    """File of the figure, an SVG. None: beside the results."""
    show: bool = False
    """Run nothing: only the table and the figure of what is there."""
    devices: tuple[str, ...] = ("cpu",)
    """Where cells run: one process for each, side by side. cpu; or for example cuda:0 cuda:1."""

    def run(self) -> None:
        from lrt.studies import grid, runner
        from lrt.studies.figures import saved
        from lrt.studies.kinds import kind
        from lrt.studies.tables import markdown

        study = grid.read(self.study, self.edition)
        file, runs = self.results / study.results, kind(study.kind)
        require(len(self.devices) > 0, "no device is given; name at least one, such as cpu")
        first, *others = self.devices
        if others and not self.show:
            same = ["study", self.study, "--edition", self.edition, "--results", str(self.results)]
            runner.on_devices([*same, *(["--only", *self.only] if self.only else [])], self.devices)
        elif not self.show:
            runner.run(study, runs, file, self.only, device=first)
        lines = runner.of(study, runner.current(runs, file))
        print(markdown(runs.tables(lines)))
        if lines:
            saved(lambda: runs.figure(lines), self.figure or file.with_suffix(".svg"))


Verb = (
    Prepare | Train | Evaluate | Diagnose | Report | Sample | Chat | Serve | Calibrate | Bench | Export | Import | Demo
    | Annotated[RunStudy, tyro.conf.subcommand("study")]
)  # fmt: skip


RESUMED = {"prepare", "train", "evaluate", "diagnose", "study", "demo"}
"""Verbs whose work is kept when they are stopped."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. A user's mistake ends with one line on standard error and status 2."""
    try:
        tyro.cli(Verb, prog="lrt", description=ABOUT, args=arguments, config=(tyro.conf.CascadeSubcommandArgs,)).run()
    except (ValueError, OSError, FloatingPointError) as error:
        Console(stderr=True, highlight=False).print(f"lrt: {error}", style="red", soft_wrap=True, markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        verb = next(iter(sys.argv[1:] if arguments is None else arguments), "")
        kept = "; what was done is kept, and the same command goes on from there" if verb in RESUMED else ""
        print(f"lrt: interrupted{kept}", file=sys.stderr)
        sys.exit(130)
