"""The command line: one verb per thing to do (`lrt --help`). Each is a dataclass that runs itself."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from lrt import checkpoint, recipes
from lrt.bench.commands import Bench, Calibrate
from lrt.data.command import Paths, Prepare
from lrt.data.prepare import prepare
from lrt.data.prepared import Prepared
from lrt.device import chosen_device
from lrt.distributed import Alone
from lrt.execution import Execution
from lrt.extras import extra
from lrt.keeping import Keeping
from lrt.matching import Other, compare, matched_all
from lrt.model.flops import count_parameters
from lrt.nanochat import import_checkpoint
from lrt.run import RunConfig
from lrt.scorecommands import Diagnose, Evaluate
from lrt.serve.command import Serve
from lrt.studies.command import RunStudy
from lrt.terminal import Chat, Sample
from lrt.trainer import train
from lrt.watching import Watching, warn

ABOUT = "Prepare text, train latent recurrent transformers, score them live, let them write, and serve them."
if TYPE_CHECKING:
    Recipe = RunConfig
else:  # one subcommand per recipe, whose fields the command line overrides
    Recipe = tyro.extras.subcommand_type_from_defaults(
        {name: make() for name, make in recipes.RECIPES.items()}, prefix_names=False
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
        from lrt.demo import demo  # it draws, which --help should not wait for

        demo(self.out, list(self.text) or None, self.tokens, self.seed, chosen_device(self.device), self.prompt)


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
