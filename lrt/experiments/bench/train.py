"""`lrt bench train`: what training takes, in alternated rounds (contract, section 6).

`passes`: the step of every schedule over the plain step of the same model, forward and backward of one batch, without
the optimiser. `training`: whole steps of models over the Transformer's (`steps.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lrt.distributed.objective import make_objective
from lrt.experiments.bench.baselines import PlainModel
from lrt.experiments.bench.options import PLAIN, TrainOptions
from lrt.experiments.bench.peak import peak_bytes
from lrt.experiments.bench.rows import Row, hardware_title, print_json, print_table
from lrt.experiments.bench.steps import Contender, source_text, step_groups, step_rows, time_steps
from lrt.model.config import ModelConfig
from lrt.model.execution import Execution
from lrt.model.memory_config import MemoryConfig
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.base import Schedule
from lrt.schedules.flops import training_flops
from lrt.schedules.loss import StepLoss
from lrt.schedules.parse import parse
from lrt.utils.device import peak_flops
from lrt.utils.provenance import hardware
from lrt.utils.timing import Work, alternate

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
NO_OPTIMISER = "none"


@dataclass(frozen=True)
class Candidate:
    """One row: a model under a schedule."""

    model: str
    source: str
    """The remembered layers."""
    schedule: str
    variant: str
    """What is unlike the other rows of this model; empty where nothing is."""
    module: nn.Module
    step: Work
    """Forward and backward."""
    counted: Work
    """The same, uncompiled: a counter of tensors does not see into compiled code."""
    flops: float


class TrainBench(TrainOptions):
    """What `TrainOptions` ask for, measured."""

    def run(self) -> None:
        rows, about = self.rows(), {"hardware": hardware(self.device)}
        whole = [row for row in rows if row.figures["optimiser"] != NO_OPTIMISER]
        passes = [row for row in rows if row not in whole]
        print(hardware_title(about))
        for part, title in ((whole, "Whole steps, optimiser included"), (passes, "Forward and backward")):
            if part:
                print_table(part, title)
        if self.json:
            print_json(rows, about)

    def rows(self, limit: float = math.inf) -> list[Row]:
        """The rows of `only`; fewer rounds are timed where about `limit` seconds are over.

        A value is a ratio. Beside it in `Row.figures` (contract, section 6): the model and its `source`; the schedule;
        the `optimiser`; the seconds of a step; `ideal`, the ratio that the passes alone would give;
        `tokens_per_second`; `mfu`, FLOPs per second over the device's peak, None where that is not known; `peak_bytes`
        of live activations; `peak_ratio`, those over what the ratio is over (of passes, with nothing recomputed). Of
        whole steps also the `size`, what they are `over`, and `recurrent_share`.
        """
        wanted, parts = self.only or ("passes", "training"), []
        if "passes" in wanted:
            parts.append(self.pass_rows)
        if "training" in wanted:  # what is wrong of the models is said here, before any work
            groups = step_groups(self.training, self.precision, self.seed)
            parts += [partial(self.step_rows, name, contenders) for name, contenders in groups.items()]
        return [row for part in parts for row in part(limit / len(parts))]

    def step_rows(self, group: str, contenders: list[Contender], limit: float = math.inf) -> list[Row]:
        """Whole steps of the contenders of one size, timed in turn."""
        execution = Execution(self.compile)
        timed = time_steps(contenders, execution, self.device, self.rounds, self.progress, limit)
        return step_rows(group, timed, self.device)

    def pass_rows(self, limit: float = math.inf) -> list[Row]:
        """All candidates, timed in turn, over `plain()` of the same model."""
        # All models are timed in one run: on a busy machine only alternated rounds can be compared.
        candidates = [c for name in self.models for c in self.candidates(name)]
        work = {f"{c.model} {c.schedule} {c.variant}": c.step for c in candidates}
        timings = alternate(
            work, self.rounds, device=self.device, title="lrt bench train", progress=self.progress, limit=limit
        )
        peaks = {
            name: peak_bytes(c.module, c.step, c.counted, self.device) for name, c in zip(work, candidates, strict=True)
        }
        top, rows = peak_flops(self.device), []
        for name, c in zip(work, candidates, strict=True):
            base = f"{c.model} {PLAIN} "
            ratio, spread = timings[name].ratio(timings[base])
            seconds, tokens = timings[name].median, self.batch * self.context
            model = f"{c.model}, {c.variant}" if c.variant else c.model
            figures = {
                "model": model,
                "source": c.source,
                "schedule": c.schedule,
                "optimiser": NO_OPTIMISER,
                "seconds": seconds,
                # A forward and backward of every position costs 3 forwards, which is what `plain()` costs.
                "ideal": parse(c.schedule).cost(self.context) / 3,
                "tokens_per_second": tokens / seconds,
                "mfu": None if top is None else c.flops * tokens / seconds / top,
                "peak_bytes": peaks[name],
                "peak_ratio": peaks[name] / peaks[base],
            }
            about = {"rounds": len(timings[name].seconds)}
            rows.append(Row(f"{model}: {c.schedule}", ratio, spread, measure="ratio", figures=figures, about=about))
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
        candidates, source = [], source_text(config)
        for schedule in (PLAIN, *(s for s in schedules if s != PLAIN)):
            for recompute in ("nothing", *self.recompute):
                step, counted = (
                    self.step(model, parse(schedule), tokens, targets, Execution(compile, recompute))
                    for compile in (self.compile, "never")
                )
                variant = "" if recompute == "nothing" else f"recompute {recompute}"
                flops = training_flops(config, parse(schedule), self.context)
                candidates.append(Candidate(name, source, schedule, variant, model, step, counted, flops))
        if self.modules and name == "lrt-shared":
            modules, step = self.modules_step(model, tokens, targets)
            flops = candidates[0].flops
            candidates.append(Candidate(name, source, PLAIN, "eager plain modules", modules, step, step, flops))
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

    def modules_step(
        self, model: LatentRecurrentTransformer, tokens: Tensor, targets: Tensor
    ) -> tuple[PlainModel, Work]:
        if self.precision != "float32":
            raise ValueError("the plain modules are float32; give --no-modules beside bfloat16")
        modules = PlainModel(model.config).to(tokens.device)
        modules.load({name: p.detach() for name, p in model.state_dict().items()})

        def work() -> None:
            modules.zero_grad()
            modules.loss(tokens, targets).backward()

        return modules, work
