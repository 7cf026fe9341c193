"""Which optimiser trains which parameter, and how its rate moves.

Muon (Jordan et al. 2024; newton_schulz as in torch.optim.Muon) for matrices, AdamW for everything else. TABLE is the
whole placement: every parameter matches exactly one row, or construction fails and says which. A new parameter of the
model that no pattern covers needs a row there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lrt.distributed.single_process import SINGLE_PROCESS, SingleProcess
from lrt.model.config import ModelConfig
from lrt.model.memory import GROUPS
from lrt.model.memory_config import COMBINATIONS, INJECTIONS
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.training.optim_config import OptimConfig


@dataclass(frozen=True)
class ParameterRow:
    """One line of the table: parameters whose name matches, and how they are trained."""

    pattern: str
    optimiser: Literal["muon", "adamw"]
    rate: Literal["matrix_lr", "embedding_lr", "head_lr", "scalar_lr"]
    factor: float = 1.0
    """What the rate is multiplied with for these parameters."""
    betas: tuple[float, float] = (0.8, 0.95)
    """AdamW's, of the mean and of the square."""


# Rates and betas are nanochat's. Order does not matter: no name may match twice.
TABLE = (
    ParameterRow(r"(^|\.)embedding\.weight$", "adamw", "embedding_lr"),
    ParameterRow(r"value_embedding\.table\.weight$", "adamw", "embedding_lr"),
    ParameterRow(r"^head\.weight$", "adamw", "head_lr"),
    ParameterRow(r"\.(query|key|value|out|up|down|gate)\.weight$", "muon", "matrix_lr"),
    ParameterRow(r"^projection\.weight$", "muon", "matrix_lr"),
    # α multiplies the residual stream itself, and moves at a hundredth of the rate; β and γ scale what is added to it.
    ParameterRow(r"\.alpha$", "adamw", "scalar_lr", factor=0.01),
    ParameterRow(r"\.(beta|gamma)$", "adamw", "scalar_lr", betas=(0.96, 0.95)),
    ParameterRow(r"^recall\.weights$", "adamw", "scalar_lr", betas=(0.96, 0.95)),
)

RATES = ("matrix_lr", "embedding_lr", "head_lr", "scalar_lr")
SHORT: dict[str, tuple[str, str]] = {"muon": ("muon", "matrix_lr"), "adamw": ("adamw", "scalar_lr")}
"""What an extension may write for (optimiser, rate)."""


def extension_rows(config: ModelConfig) -> list[ParameterRow]:
    """The rows of a model's injection and combination where users registered them (`register_injection`).

    They come before the table: a `down` of an injection's own is no `down` of an MLP.
    """
    memory = config.memory
    parts = {f"{INJECTIONS.kind} {memory.injection}": r"(^projection|\.injection)\."}
    parts[f"{COMBINATIONS.kind} {memory.combine}"] = r"^recall\."
    rows = []
    for part, prefix in parts.items():
        for name, group in GROUPS.get(part, {}).items():
            fields: Any = SHORT.get(group, ()) if isinstance(group, str) else tuple(group)
            if len(fields) < 2 or fields[0] not in SHORT or fields[1] not in RATES:
                raise ValueError(
                    f"{part} trains {name} by {group!r}; choose one of {', '.join(SHORT)}, or give (optimiser, rate, "
                    f"factor, betas) with a rate of {', '.join(RATES)}"
                )
            rows.append(ParameterRow(rf"{prefix}(.*\.)?{re.escape(name)}(\.|$)", *fields))
    return rows


def newton_schulz(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, of a stack (N, rows, columns); quintic iteration.

    On the CPU in float32 or better: bfloat16 there is slower than the rest of the step, and turns differences of
    1e-7 into 1e-4 within 20 steps. On a GPU in bfloat16, as torch.optim.Muon does everywhere.
    """
    # On singular values σ -> aσ + bσ³ + cσ⁵. Steep at 0, so that small ones grow fast; they end near 1, not at it.
    a, b, c = 3.4445, -4.7750, 2.0315
    dtype = torch.bfloat16 if matrices.is_cuda else torch.promote_types(matrices.dtype, torch.float32)
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT  # the smaller Gram matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: one update per logical matrix.

    A parameter of more than two dimensions is a stack of matrices; equal shapes are orthogonalised in one batch. The
    rate of a tall matrix grows with sqrt(rows / columns), as in torch.optim.Muon("original"). Ours because that one
    takes no stacks and has its Newton-Schulz fixed to bfloat16; a test holds the two against each other.

    Sharded matrices are gathered, a few per rank at a time, and each rank orthogonalises its share of them: the update
    is that of the whole matrix, however many `ranks` there are, to 1e-10 in float64. torch.optim.Muon (2.13) on FSDP2's
    DTensors is right too, up to its bfloat16, but sends 11 to 16 collectives per matrix, and every rank does all of the
    work. Microsoft's dion, the library for this, is not on PyPI.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        ranks: SingleProcess = SINGLE_PROCESS,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.ranks = ranks

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient. All ranks call it."""
        for group in self.param_groups:
            # Matrices of one shape, also those of different parameters, are one stack: (parameter, its update).
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    update = self._momentum(p, group["momentum"])
                    by_shape.setdefault(update.shape[-2:], []).append((p, update))
            for (rows, columns), entries in by_shape.items():
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for portion in self.ranks.chunks(entries):
                    stacks = [self.ranks.full_tensor(update).reshape(-1, rows, columns) for _, update in portion]
                    updates = self.ranks.map_stack(newton_schulz, torch.cat(stacks)).split([len(s) for s in stacks])
                    for (p, _), update in zip(portion, updates, strict=True):
                        p.mul_(1 - group["lr"] * group["weight_decay"])  # decoupled, as AdamW's
                        p.add_(self.ranks.shard_like(update.view(p.shape), p), alpha=-rate)

    def _momentum(self, p: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum of the gradient: the running mean, looked at one step ahead."""
        assert p.grad is not None
        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)


def place(model: nn.Module, rows_of_model: Sequence[ParameterRow] = ()) -> list[tuple[ParameterRow, list[Tensor]]]:
    """The parameters of each row. A name that no row or several rows match is an error that says so.

    `rows_of_model` are those of a module that is none of ours; they come before the table.
    """
    own = [*rows_of_model, *(extension_rows(model.config) if isinstance(model, LatentRecurrentTransformer) else ())]
    placed: dict[ParameterRow, list[Tensor]] = {row: [] for row in (*TABLE, *own)}
    for name, parameter in model.named_parameters():
        rows = [row for row in own if re.search(row.pattern, name)] or [
            row for row in TABLE if re.search(row.pattern, name)
        ]
        if len(rows) != 1:
            matched = [row.pattern for row in rows]
            raise ValueError(
                f"parameter {name} matches {matched or 'no row'} of lrt.training.optim.TABLE; it must match one (a "
                "registered injection says with optim={…} how its own are trained)"
            )
        placed[rows[0]].append(parameter)
    unused = [row.pattern for row in own if not placed[row]]
    if unused:
        raise ValueError(f"no parameter of this model matches {unused}; name what the registered class has")
    return [(row, parameters) for row, parameters in placed.items() if parameters]


class Optimiser:
    """Muon and AdamW over a model, with their rates as a function of the step."""

    def __init__(
        self,
        model: nn.Module,
        width: int,
        batch_tokens: int,
        steps: int,
        config: OptimConfig,
        ranks: SingleProcess = SINGLE_PROCESS,
        rows_of_model: Sequence[ParameterRow] = (),
    ) -> None:
        self.config, self.steps = config, steps
        batch_factor = (batch_tokens / config.reference_batch) ** 0.5
        width_factor = (width / 768) ** -0.5
        rates = {
            "matrix_lr": config.matrix_lr * batch_factor,
            "embedding_lr": config.embedding_lr * width_factor * batch_factor,
            "head_lr": config.head_lr * width_factor * batch_factor,
            "scalar_lr": config.scalar_lr * batch_factor,
        }
        muon: list[dict[str, Any]] = []
        adamw: list[dict[str, Any]] = []
        for row, parameters in place(model, rows_of_model):
            group = {"params": parameters, "lr": rates[row.rate] * row.factor}
            muon.append(group) if row.optimiser == "muon" else adamw.append({**group, "betas": row.betas})
        self.muon = Muon(muon, ranks=ranks)
        # eps as in nanochat. No decay: what is no matrix has none.
        self.adamw = torch.optim.AdamW(adamw, eps=1e-10, weight_decay=0.0, fused=True)
        self.rates = [[group["lr"] for group in part.param_groups] for part in self.parts]
        """The peak rate of every group of each part; `step` sets the groups' own from it."""

    @property
    def parts(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        """The two optimisers, in the order in which a snapshot saves their state."""
        return self.muon, self.adamw

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def fraction(self, step: int) -> float:
        """What the rates are multiplied with at `step`: 1, then a straight line to 0 at the end."""
        left = (self.steps - step) / max(1, self.steps)
        return min(1.0, left / self.config.warmdown) if self.config.warmdown > 0 else 1.0

    def step(self, step: int) -> float:
        """Update with the rates of `step` and forget the gradients; returns the rates' fraction of the peak.

        Rates, momentum and decay are functions of the step, so that a run that goes on needs no state of them.
        """
        fraction = self.fraction(step)
        for part, rates in zip(self.parts, self.rates, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * fraction
        start, end = self.config.momentum
        risen = min(1.0, step / max(1, self.config.momentum_steps))
        for group in self.muon.param_groups:
            group["momentum"] = start + (end - start) * risen
            group["weight_decay"] = self.config.weight_decay * (1 - step / max(1, self.steps))
        for part in self.parts:
            part.step()
        self.zero_grad()
        return fraction
