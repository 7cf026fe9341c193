"""What decides a training run, apart from the data: RunConfig and its horizon. Plain data, which a checkpoint keeps;
and what is kept and measured on the way.

RunConfig holds what decides numbers, and is compared when a run goes on. What stays on disk (SnapshotConfig), what is
measured on the way (EvalConfig) and how a step is computed (Execution: no number depends on it beyond rounding) are
not in it, and may change from one call to the next. `device_batch` is in it, although it only splits a step: it too
may change, and numbers then differ in their last bits.

torch is imported where a property needs it: the command line makes its flags of these classes without it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lrt.model.config import ModelConfig
from lrt.schedules import library as schedules
from lrt.schedules.parse import parse
from lrt.training.optim_config import OptimConfig
from lrt.utils.short_repr import changed_fields
from lrt.utils.validation import Limits, check_choice, check_numbers

if TYPE_CHECKING:
    import torch

PRECISIONS = ("float32", "bfloat16")
"""What passes compute in. A cast around the objective, not code in the model: the State takes the weights' dtype, and
gradients arrive in float32, in which weights and optimisers stay."""
UNITS = {"steps": 1e12, "tokens": 1e18, "ratio": 1e9, "flops": 1e36}
"""What a horizon is counted in, and the largest of each."""
LIMITS = {
    "batch_size": Limits(1, 10**6, whole=True),
    "device_batch": Limits(-math.inf, 10**6, whole=True, optional=True),
    "seed": Limits(0, 2**63 - 1, whole=True),
}
"""What the numbers of a RunConfig may be. Seeds are those that torch and numpy both take."""
SNAPSHOT_LIMITS = {"every": Limits(0, 10**12, whole=True), "last": Limits(1, 10**6, whole=True)}
EVAL_LIMITS = {"every": Limits(0, 10**12, whole=True, optional=True), "targets": Limits(1, 10**12, whole=True)}


@dataclass(frozen=True)
class Horizon:
    """How long a run trains, in one of four units.

    In a configuration it is text (`ratio=10`), as a schedule is: one field, so that two units never contradict.
    """

    unit: str
    """`steps` of the optimiser, `tokens`, `ratio` (tokens per block and head parameter, the paper's R), or training
    `flops` (all passes counted)."""
    amount: float

    @classmethod
    def parse(cls, text: str) -> Horizon:
        """Read `unit=amount`, for example tokens=3e8 or ratio=10. ValueError with the text and the units."""
        unit, _, amount = text.partition("=")
        try:
            number = float(amount.replace("_", "").replace(",", ""))
        except ValueError:
            number = math.nan
        if unit not in UNITS or not 0 < number <= UNITS[unit]:
            raise ValueError(
                f"horizon is {text!r}; write {', '.join(f'{u}=…' for u in UNITS)} with a number above 0 (of "
                f"{', '.join(f'{u} at most {most:g}' for u, most in UNITS.items())}), such as ratio=10"
            )
        return cls(unit, number)

    def steps(self, run: RunConfig) -> int:
        """Optimiser steps of `run`: whole ones, rounded up for tokens and ratio, to the nearest for FLOPs."""
        if self.unit == "steps":
            return math.ceil(self.amount)
        if self.unit == "flops":
            return max(1, round(self.amount / (run.flops_per_token * run.batch_tokens)))
        tokens = self.amount * (run.weights if self.unit == "ratio" else 1)
        return math.ceil(tokens / run.batch_tokens)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a training run, apart from the data."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The architecture. `vocab_size` is the prepared data's."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Rates and their schedule."""
    schedule: str = schedules.DEFAULT
    """The training schedule as Python would write it: plain(), interleaved(2) (the paper's), mixture([(0.5, …), …])."""
    batch_size: int = 16
    """Rows of `context` tokens per optimiser step, over all devices."""
    device_batch: int | None = None
    """Rows that go through the model at once on each device; fewer need less memory and give the same step. None:
    all of a device's share. Must divide that share."""
    horizon: str = "tokens=1600000"
    """How long to train: steps=N, tokens=N, ratio=R (tokens per block and head parameter) or flops=F, all passes
    counted."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """What the passes compute in. Weights, gradients and optimisers are float32 either way. auto: bfloat16 where its
    steps take at most 0.95 of float32's time, by a few steps of both before training; what that gives is what the run
    is saved with, and keeps when it goes on."""
    seed: int = 0
    """Seed of weights, data order and schedule draws."""
    init: str | None = None
    """What weights it begins with. None: random ones. On the command line the folder of a run or checkpoint, say of the
    Transformer or the control that this model extends: its model with this recipe's memory, of which what is new
    starts neutral. Kept as that model's fingerprint: where the folder lies decides nothing."""

    def __post_init__(self) -> None:
        check_numbers(self, LIMITS)
        Horizon.parse(self.horizon)
        check_choice(self, "precision", (*PRECISIONS, "auto"))
        for _, part in parse(self.schedule).shares():
            part.passes(self.model.context)  # too many of them are an error here, not at the step that needs them
        self.micro_batches(1)

    def __repr__(self) -> str:
        return changed_fields(self)

    @property
    def dtype(self) -> torch.dtype:
        """What the passes compute in. ValueError for `auto`, which is to be resolved before anything is computed."""
        if self.precision == "auto":
            raise ValueError("precision is 'auto', which `lrt train` measures; here give float32 or bfloat16")
        import torch

        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.precision]

    def micro_batches(self, ranks: int) -> int:
        """Micro-batches of each of `ranks` devices per step. ValueError where the rows do not divide."""
        if self.batch_size % ranks != 0:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be a multiple of the {ranks} ranks that share it"
            )
        share = self.batch_size // ranks
        rows = share if self.device_batch is None else min(self.device_batch, share)
        if rows < 1 or share % rows != 0:
            raise ValueError(
                f"device_batch is {self.device_batch}; it must be at least 1 and divide the {share} rows of a device "
                f"(batch_size {self.batch_size}, {ranks} devices)"
            )
        return share // rows

    def one_micro_batch(self, ranks: int) -> RunConfig:
        """This run with the rows of one micro-batch of each of `ranks` devices as its whole batch: what is timed."""
        rows = self.batch_size // self.micro_batches(ranks)
        return dataclasses.replace(self, batch_size=rows, device_batch=None)

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimiser step, over all devices."""
        return self.batch_size * self.model.context

    @property
    def weights(self) -> int:
        """Block and head parameters: what `ratio` counts tokens against."""
        from lrt.model.size import count_parameters

        return count_parameters(self.model)[1] + self.model.vocab_size * self.model.width

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs per token, all passes counted; the mean of a mixture or of stages."""
        from lrt.schedules.flops import training_flops

        return training_flops(self.model, parse(self.schedule), self.model.context)

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return Horizon.parse(self.horizon).steps(self)

    @property
    def tokens(self) -> int:
        """Training tokens: whole steps."""
        return self.steps * self.batch_tokens

    @property
    def flops(self) -> float:
        """Training FLOPs as planned; a mixture's draws may differ a little."""
        return self.tokens * self.flops_per_token

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunConfig:
        """The inverse of `to_dict`. ValueError where a field is unknown or out of range.

        A field that is missing has its default: what wrote `data` was older than the field (contract, section 1). So
        what runs did before a field existed has to be that field's default. Saved runs are compared as values of this
        class, never as JSON.
        """
        try:
            fields = {**data}
            model = ModelConfig.from_dict(fields.pop("model", {}))
            optim = OptimConfig(**fields.pop("optim", {}))
            return cls(model=model, optim=optim, **fields)
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"this describes no run of this version ({error}); read it with the one that wrote it"
            ) from error


@dataclass(frozen=True)
class SnapshotConfig:
    """What is saved on disk while a run goes on. Nothing of it changes what is trained."""

    every: int = 0
    """Save a snapshot every so many steps; 0 saves none before the end. An interruption always saves one."""
    last: int = 2
    """How many snapshots stay, the newest ones."""
    best: bool = True
    """Keep the weights of the best live evaluation so far in best/."""

    def __post_init__(self) -> None:
        check_numbers(self, SNAPSHOT_LIMITS)


USUAL_SNAPSHOTS = SnapshotConfig(every=200)
"""What `lrt train` and `lrt.train` save where nothing else is asked for."""


@dataclass(frozen=True)
class EvalConfig:
    """What is measured while a run goes on. Nothing of it changes what is trained."""

    every: int | None = None
    """Score live every so many steps, and at the end. None: about ten times a run; 0: never."""
    targets: int = 10_000
    """Score so many tokens of the validation split each time; at the end at least 50,000, or all of it."""

    def __post_init__(self) -> None:
        check_numbers(self, EVAL_LIMITS)

    def interval(self, steps: int) -> int:
        """Steps between two scores in a run of `steps`; 0 for none."""
        return max(1, steps // 10) if self.every is None else self.every

    def due(self, step: int, steps: int) -> bool:
        """Whether to score after `step` of `steps`."""
        every = self.interval(steps)
        return every > 0 and (step % every == 0 or step == steps)
