"""What a training run asks of its processes, and the answers of a single one.

`SingleProcess` is the neutral object: its methods return their arguments, so that no caller asks how many ranks there
are. The others (DDP, FSDP2) are in `parallelize.py`, which loads much of torch.distributed and is imported on demand.

A loss is a share of the whole step's loss (contract, section 3: targets are counted over all micro-batches and ranks),
so gradients are summed over ranks, never averaged.

A snapshot has whole weights in one safetensors file, like every checkpoint. The optimisers' state lies in training.pt
where a process holds all of it, and in shards beside it under FSDP2. Either loads into any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lrt.distributed.objective import make_objective

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
"""A model: parameters, whose units `shard_units` names, and a `config` that makes another like it."""
OPTIMISERS = "optimisers"
"""The optimisers' state: a key of training.pt where a process holds it whole, else a folder beside it."""


@dataclass(frozen=True)
class SingleProcess:
    """One process: the neutral object, and the interface of the others.

    `ProcessGroup` overrides methods. "All ranks call it" binds the callers, also where there is one rank: under several
    a method is a collective, in which a rank that is missing would be waited for.
    """

    device: str = "cpu"
    """Where this process computes."""
    rank: int = 0
    ranks: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    # --- agreement ---------------------------------------------------------------------------------------------

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over ranks; exact for whole numbers below 2^53."""
        return list(numbers)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return self.sum([flag])[0] > 0

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        return value

    def collective(self) -> AbstractContextManager[None]:
        """A block that all ranks leave together. Where it fails on one, it raises OSError on the others.

        Else those that got through would wait for ever in their next collective.
        """
        return nullcontext()

    def rank0_first(self, make: Callable[[], T]) -> T:
        """`make()`, by rank 0 before the others, who find what it left on the disk."""
        if not self.first:
            with self.collective():
                pass
            return make()
        with self.collective():
            return make()

    # --- the model and its gradients ---------------------------------------------------------------------------

    def parallelise(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The objective of a model, which is changed in place, computing in `dtype`. Make optimisers afterwards."""
        return make_objective(model, dtype)

    def gradient_sync(self, objective: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; after the `last` one, gradients are sums over ranks.

        DDP sends them only then. FSDP2 sends each micro-batch's, as no rank has room for whole gradients.
        """
        return nullcontext()

    def gathered_model(self, model: M) -> M:
        """The model with whole weights, to be called by each rank on its own. All ranks call this."""
        return model

    # --- tensors that may be sharded ---------------------------------------------------------------------------

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor that may be sharded. All ranks call it."""
        return tensor

    def shard_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A whole tensor, which all ranks hold, laid out as `like` is: this rank's shard, or all of it."""
        return tensor

    def chunks(self, entries: list[T]) -> list[list[T]]:
        """Entries in the order given, so many at a time as may be whole at once."""
        return [entries]

    def map_stack(self, function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
        """`function` of a stack of N matrices (N, …) that all ranks hold; each rank computes its share of the N.

        `function` keeps the shape and treats matrices apart. Muon orthogonalises a step's gradients so.
        """
        return function(stack)

    # --- snapshots ---------------------------------------------------------------------------------------------

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The whole weights on the CPU of rank 0, nothing elsewhere. All ranks call it."""
        gathered = ((name, self.full_tensor(p.detach())) for name, p in model.state_dict().items())
        return {name: p.cpu().contiguous() for name, p in gathered if self.first}

    def write_training(
        self,
        folder: Path,
        training: dict[str, Any],
        model: nn.Module,
        optimisers: Sequence[torch.optim.Optimizer],
    ) -> None:
        """Write training.pt, the optimisers' state in it or, under FSDP2, in shards beside it. All ranks call it.

        `model` is for FSDP2 alone, whose shards name each parameter's state as the model does.
        """
        if self.first:
            torch.save(
                {**training, OPTIMISERS: [optimiser.state_dict() for optimiser in optimisers]}, folder / "training.pt"
            )


SINGLE_PROCESS = SingleProcess()


def clip_gradients(model: nn.Module, max_norm: float | None, ranks: SingleProcess = SINGLE_PROCESS) -> Tensor:
    """The norm of the gradient over all parameters and shards, before it is scaled down to `max_norm` (None: never)."""
    trained = [p for p in model.parameters() if p.grad is not None]
    # torch takes no mixture: under FSDP2 vectors are whole on every rank, matrices are shards.
    groups = [[p for p in trained if (p.dim() == 1) == is_vector] for is_vector in (True, False)]
    norms = [ranks.full_tensor(nn.utils.get_total_norm([p.grad for p in g if p.grad is not None])) for g in groups]
    norm = torch.stack(norms).norm()
    if max_norm is not None:
        for group in groups:
            nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


def load_weights(model: nn.Module, weights: dict[str, Tensor], ranks: SingleProcess = SINGLE_PROCESS) -> None:
    """Put whole weights into a model, sharded or not. torch names what does not fit."""
    state = model.state_dict()
    model.load_state_dict(
        {name: ranks.shard_like(w, state[name]) if name in state else w for name, w in weights.items()}
    )


def load_optimisers(
    folder: Path,
    training: dict[str, Any],
    model: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    ranks: SingleProcess = SINGLE_PROCESS,
) -> None:
    """Put what `write_training` wrote, on any number of ranks, into the optimisers of this run's ranks."""
    if OPTIMISERS not in training:
        from lrt.distributed.sharded_optimisers import load_shards  # loads much of torch.distributed

        load_shards(folder / OPTIMISERS, model, optimisers)
        return
    for optimiser, saved in zip(optimisers, training[OPTIMISERS], strict=True):
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        state = {
            i: {  # moments are sharded as their parameter is; a step count is the same everywhere
                name: ranks.shard_like(value, parameters[i]) if value.shape == parameters[i].shape else value
                for name, value in entries.items()
            }
            for i, entries in saved["state"].items()
        }
        optimiser.load_state_dict({**saved, "state": state})
