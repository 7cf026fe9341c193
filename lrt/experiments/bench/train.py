"""`lrt bench train`: the step of every schedule over the plain step of the same model (contract, section 6).

A step is forward and backward of one batch, without the optimiser. All candidates run in turn, round after round.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from lrt.distributed.objective import make_objective
from lrt.experiments.bench.baselines import PlainModel
from lrt.experiments.bench.rows import Row, hardware_title, print_json, print_table
from lrt.model.config import MemoryConfig, ModelConfig
from lrt.model.execution import Execution
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.base import Schedule
from lrt.schedules.flops import training_flops
from lrt.schedules.loss import StepLoss
from lrt.schedules.parse import parse
from lrt.utils.device import peak_flops
from lrt.utils.provenance import hardware
from lrt.utils.timing import Work, alternate
from lrt.utils.torch_private import TorchDispatchMode, tree_leaves

MODELS: dict[str, MemoryConfig] = {
    "transformer": MemoryConfig(injection="none"),
    "token-shift": MemoryConfig(source=0),
    "lrt-shared": MemoryConfig(),
    "lrt-layerwise": MemoryConfig(projection="layerwise"),
}
EVERY: tuple[str, ...] = (
    "plain()", "interleaved(2)", "multi_refinement(1)", "multi_refinement(3)", "chunked(64)", "strided(2, 1)",
    "settled(0, 1, 1)", "settled(1, 1, 1)", "settled(1, 8, 2)", "sequential()",
)  # fmt: skip
"""A row for each schedule of the library: what `--schedules all` stands for."""
PLAIN = "plain()"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made and alive within the block, and their peak.

    Storages are counted, not tensors: a view holds its base's memory, and several views hold it once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                # Autograd holds what the backward needs, without a name; it too is freed when its storage goes.
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def tensors(tree: object) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Candidate:
    """One row: a model under a schedule."""

    model: str
    schedule: str
    variant: str
    """What is unlike the other rows of this model; empty where nothing is."""
    step: Work
    """Forward and backward."""
    counted: Work
    """The same, uncompiled: a counter of tensors does not see into compiled code."""
    flops: float


@dataclass(frozen=True)
class TrainBench:
    """Time training steps: every (model, schedule) pair beside the plain step of the same model, in turn."""

    models: tuple[Literal["transformer", "token-shift", "lrt-shared", "lrt-layerwise"], ...] = ("lrt-shared",)
    """Which models; a Transformer has one schedule only."""
    schedules: tuple[str, ...] = (PLAIN, "interleaved(2)", "settled(0, 1, 1)")
    """Which schedules, as Python would write them; `all` is a row for each of the library."""
    modules: bool = True
    """Also the plain step of the shared LRT in eager PyTorch modules with full logits."""
    recompute: tuple[Literal["blocks", "passes"], ...] = ("passes",)
    """Also each schedule with this recomputed in the backward."""
    depth: int = 6
    width: int = 384
    context: int = 512
    """Tokens per row."""
    batch: int = 4
    """Rows."""
    vocab_size: int = 4096
    compile: Literal["always", "never"] = "always"
    """torch.compile on both sides (the modules stay eager)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    rounds: int = 10
    """Rounds in which every candidate is timed once."""
    device: str = "cpu"
    json: bool = False
    """Print one JSON object as the last line."""
    progress: Annotated[bool, tyro.conf.arg(help="Show a bar.")] = True
    seed: int = field(default=0)

    def run(self) -> None:
        rows, about = self.rows(), {"hardware": hardware(self.device)}
        print_table(rows, hardware_title(about))
        if self.json:
            print_json(rows, about)

    def rows(self) -> list[Row]:
        """All candidates, timed in turn. A value is a ratio, over `plain()` of the same model.

        Beside it in `Row.figures` (contract, section 6): the seconds of a step; `ideal`, the ratio that the passes
        alone would give; `tokens_per_second`; `mfu`, FLOPs per second over the device's peak, None where that is not
        known; `peak_bytes` of live activations; `peak_ratio`, those over `plain()` with nothing recomputed.
        """
        # All models are timed in one run: on a busy machine only alternated rounds can be compared.
        candidates = [c for name in self.models for c in self.candidates(name)]
        work = {f"{c.model} {c.schedule} {c.variant}": c.step for c in candidates}
        timings = alternate(work, self.rounds, device=self.device, title="lrt bench train", progress=self.progress)
        peaks = {name: self.peak(c) for name, c in zip(work, candidates, strict=True)}
        top, rows = peak_flops(self.device), []
        for name, c in zip(work, candidates, strict=True):
            base = f"{c.model} {PLAIN} "
            ratio, spread = timings[name].ratio(timings[base])
            seconds, tokens = timings[name].median, self.batch * self.context
            model = f"{c.model}, {c.variant}" if c.variant else c.model
            figures = {
                "model": model,
                "schedule": c.schedule,
                "seconds": seconds,
                # A forward and backward of every position costs 3 forwards, which is what `plain()` costs.
                "ideal": parse(c.schedule).cost(self.context) / 3,
                "tokens_per_second": tokens / seconds,
                "mfu": None if top is None else c.flops * tokens / seconds / top,
                "peak_bytes": peaks[name],
                "peak_ratio": peaks[name] / peaks[base],
            }
            rows.append(Row(f"{model}: {c.schedule}", ratio, spread, measure="ratio", figures=figures))
        return rows

    def candidates(self, name: str) -> list[Candidate]:
        """The rows of one model, the plain step first."""
        torch.manual_seed(self.seed)
        memory = MODELS[name]
        config = ModelConfig.from_depth(
            self.depth, width=self.width, context=self.context, vocab_size=self.vocab_size, memory=memory
        )
        model = LatentRecurrentTransformer(config).to(self.device).train()
        text = torch.randint(self.vocab_size, (self.batch, self.context + 1), device=self.device)
        tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        schedules = EVERY if "all" in self.schedules else tuple(repr(parse(s)) for s in self.schedules)
        if memory.injection == "none":
            schedules = ()  # every pass of a Transformer gives the same
        candidates = []
        for schedule in (PLAIN, *(s for s in schedules if s != PLAIN)):
            for recompute in ("nothing", *self.recompute):
                step, counted = (
                    self.step(model, parse(schedule), tokens, targets, Execution(compile, recompute))
                    for compile in (self.compile, "never")
                )
                variant = "" if recompute == "nothing" else f"recompute {recompute}"
                flops = training_flops(config, parse(schedule), self.context)
                candidates.append(Candidate(name, schedule, variant, step, counted, flops))
        if self.modules and name == "lrt-shared":
            step = self.modules_step(model, tokens, targets)
            candidates.append(Candidate(name, PLAIN, "eager plain modules", step, step, candidates[0].flops))
        return candidates

    def step(
        self,
        model: LatentRecurrentTransformer,
        schedule: Schedule,
        tokens: Tensor,
        targets: Tensor,
        execution: Execution,
    ) -> Work:
        loss = StepLoss.of(schedule, [targets], execution=execution)
        objective = make_objective(model, torch.bfloat16 if self.precision == "bfloat16" else torch.float32)

        def work() -> None:
            model.zero_grad()
            objective(loss, tokens, targets, None).backward()

        return work

    def modules_step(self, model: LatentRecurrentTransformer, tokens: Tensor, targets: Tensor) -> Work:
        if self.precision != "float32":
            raise ValueError("the plain modules are float32; give --no-modules beside bfloat16")
        modules = PlainModel(model.config).to(tokens.device)
        modules.load({name: p.detach() for name, p in model.state_dict().items()})

        def work() -> None:
            modules.zero_grad()
            modules.loss(tokens, targets).backward()

        return work

    def peak(self, candidate: Candidate) -> int:
        """The most bytes alive in a step, weights not counted."""
        if torch.device(self.device).type == "cuda":
            candidate.step()
            weights = torch.cuda.memory_allocated(self.device)  # and gradients, which a step leaves
            torch.cuda.reset_peak_memory_stats(self.device)
            candidate.step()
            return torch.cuda.max_memory_allocated(self.device) - weights
        with LiveBytes() as counter:
            candidate.counted()
        return counter.peak
