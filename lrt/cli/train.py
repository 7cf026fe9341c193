"""`lrt train`: a recipe, overridden field by field."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lrt.data.prepare import prepare
from lrt.data.prepared import Prepared
from lrt.distributed.single import SingleProcess
from lrt.model import checkpoint
from lrt.model.execution import Execution
from lrt.model.size import count_parameters
from lrt.training import recipes
from lrt.training.config import RunConfig
from lrt.training.loop import train
from lrt.training.matching import Other, compare_runs, match_all
from lrt.training.monitor import EvalConfig
from lrt.training.snapshots import SnapshotConfig
from lrt.utils.device import choose_device
from lrt.utils.progress import warn

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
    keeping: SnapshotConfig = dataclasses.field(default_factory=lambda: SnapshotConfig(every=200))
    """Snapshots."""
    watching: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    """Live scores and the gap while training, and where numbers go."""
    execution: Execution = dataclasses.field(default_factory=Execution)
    """Compiling, and recomputing instead of keeping."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    parallel: Literal["fsdp", "fsdp-reshard", "ddp"] = "fsdp"
    """How the processes of torchrun share the model: in shards, gathered once per step or anew for every pass; or each
    has it whole."""

    def run(self) -> None:
        from lrt.distributed.parallelize import join_ranks  # loads much of torch.distributed

        with join_ranks(self.parallel, choose_device(self.device)) as ranks:
            self.train(ranks)

    def train(self, ranks: SingleProcess) -> None:
        data = ranks.rank0_first(
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

    def matched(self, run: RunConfig, data: Prepared, ranks: SingleProcess) -> RunConfig:
        """The run after every --match, and on the screen what is equal and what is not."""
        others = [(kind, Other.read(path)) for kind, path in self.match]
        run = match_all(run, others, data, ranks, self.out)
        for other in {other.path: other for _, other in others}.values() if ranks.first else ():
            print(f"beside {other.path}:", *map(str, compare_runs(run, other, data, self.out)), sep="\n")
        return run
