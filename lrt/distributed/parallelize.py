"""Several processes that train one model: DDP and FSDP2, applied from outside the model, and their start-up.

Shapes: R ranks, N matrices of a stack. The pattern is torchtitan's parallelize.py: a model knows nothing of it but
`shard_units`, the modules that FSDP2 gathers one by one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lrt.distributed.objective import Objective, make_objective
from lrt.distributed.single_process import OPTIMISERS, M, SingleProcess, T


@dataclass(frozen=True)
class ProcessGroup(SingleProcess):
    """What the ranks of a run have in common, however they share the model."""

    MATRICES_PER_RANK: ClassVar[int] = 4
    """Whole matrices per rank at a time in Muon's step (`chunks`), so that never all of them are whole.

    `torch.optim.Muon` (2.13) works on DTensors too, but with 11 to 16 collectives per matrix, all of the work on every
    rank, and no stacks.
    """

    def sum(self, numbers: Sequence[float]) -> list[float]:
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def broadcast(self, value: T) -> T:
        values = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    @contextmanager
    def collective(self) -> Iterator[None]:
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        # Every rank gets here, failed or not, and so learns of the others.
        failures: list[str | None] = [None] * self.ranks
        dist.all_gather_object(failures, None if failure is None else str(failure))
        if failure is not None:
            raise failure
        for rank, message in enumerate(failures):
            if message is not None:
                raise OSError(f"rank {rank}: {message}")

    def chunks(self, entries: list[T]) -> list[list[T]]:
        size = self.MATRICES_PER_RANK * self.ranks
        return [entries[first : first + size] for first in range(0, len(entries), size)]

    def map_stack(self, function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
        share = -(-len(stack) // self.ranks)  # of N, rounded up: all_gather wants the same size from every rank
        own = stack[self.rank * share : (self.rank + 1) * share]
        computed = stack.new_zeros(share, *stack.shape[1:])
        if len(own):  # the last ranks may have fewer than a share, or nothing
            computed[: len(own)] = function(own)
        gathered = stack.new_empty(self.ranks * share, *stack.shape[1:])
        gather(gathered, computed)
        return gathered[: len(stack)]


@dataclass(frozen=True)
class DDP(ProcessGroup):
    """DDP: every rank holds the whole model and all of the optimisers' state."""

    def parallelise(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
        # Every pass uses every parameter, so DDP need not look for unused ones.
        wrapped = DistributedDataParallel(make_objective(model, dtype))
        wrapped.register_comm_hook(None, sum_gradients)
        return wrapped

    def gradient_sync(self, objective: nn.Module, last: bool) -> AbstractContextManager[None]:
        assert isinstance(objective, DistributedDataParallel)
        return nullcontext() if last else objective.no_sync()


def sum_gradients(state, bucket):  # DDP looks at the annotations and does not understand postponed ones
    """DDP's communication: the sum of a GradBucket's gradients over ranks, as a future. DDP's own is the mean, and a
    rank's loss is a share already."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda reduced: reduced.value()[0])


@dataclass(frozen=True)
class FSDP(ProcessGroup):
    """FSDP2: every rank holds its shard of parameters, gradients and optimiser state.

    A unit is a block, the projections, or the rest. Embeddings and head are in the rest, not units of their own: every
    pass needs both, at its start and its end, so they would be whole nearly always.

    A unit is gathered once per optimiser step and stays whole through all passes and micro-batches. Freed after each
    use, it would be gathered twice per pass: that is `FSDPReshard`. Either way its gradient is reduced once per
    backward, because autograd adds up a parameter's uses before it hands the gradient over. docs/training.md has the
    figures.
    """

    reshard_after_use: ClassVar[bool] = False
    """Whether a unit's whole parameters are freed after each use."""

    def parallelise(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Units are gathered in `dtype`, gradients reduced in float32. α, β and γ stay whole on every rank, in float32.

        They are a few numbers per block, and 1.003 is 1 in bfloat16: `Cast` leaves them alone for the same reason.
        Where the weights are cast, FSDP2 does it before it gathers, which halves what is sent.
        """
        mesh = init_device_mesh(torch.device(self.device).type, (self.ranks,))
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=None if dtype == torch.float32 else torch.float32,
            cast_forward_inputs=False,
        )
        shard = partial(
            fully_shard,
            mesh=mesh,
            mp_policy=policy,
            shard_placement_fn=self._dimension,
            ignored_params={p for p in model.parameters() if p.dim() == 1},
        )
        root = Objective(model)
        shard_units = cast("Callable[[], Sequence[nn.Module]]", model.shard_units)
        for unit in shard_units():
            if next(unit.parameters(), None) is not None:
                shard(unit, reshard_after_forward=self.reshard_after_use)
        # The root is never freed after its forward: its backward follows at once.
        shard(root, reshard_after_forward=False)
        for unit in fsdp_units(root):
            unit.set_reshard_after_backward(self.reshard_after_use, recurse=False)
            unit.set_gradient_divide_factor(1.0)  # sums, not means
            unit.set_force_sum_reduction_for_comms(True)  # else a factor makes it a scaled sum, which gloo lacks
        return root

    def _dimension(self, parameter: nn.Parameter) -> Shard:
        """The dimension to shard: the first; of a stack of fewer matrices than ranks, the first that ranks divide."""
        sizes = parameter.shape
        even = (dim for dim, size in enumerate(sizes) if size % self.ranks == 0)
        return Shard(0 if sizes[0] >= self.ranks else next(even, 0))

    @contextmanager
    def gradient_sync(self, objective: nn.Module, last: bool) -> Iterator[None]:
        yield  # each micro-batch adds its reduced gradients to the shards'
        if last:
            for unit in fsdp_units(objective):
                unit.reshard()  # the optimiser is about to change the shards
            for p in objective.parameters():
                if not isinstance(p, DTensor) and p.grad is not None:
                    dist.all_reduce(p.grad)

    def gathered_model(self, model: M) -> M:
        with torch.device("meta"):  # no memory: the weights are assigned
            copy = type(model)(model.config)
        weights = {name: self.full_tensor(p.detach()) for name, p in model.state_dict().items()}
        copy.load_state_dict(weights, assign=True)
        return copy.train(model.training)

    def full_tensor(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def shard_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor):  # α, β, γ
            return tensor.to(like.device)
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    def write_training(
        self,
        folder: Path,
        training: dict[str, Any],
        model: nn.Module,
        optimisers: Sequence[torch.optim.Optimizer],
    ) -> None:
        if self.first:
            torch.save(training, folder / "training.pt")
        try:
            save_shards(
                {OPTIMISERS: get_optimizer_state_dict(model, list(optimisers))}, checkpoint_id=folder / OPTIMISERS
            )
        except CheckpointException as error:
            raise OSError(f"cannot write {folder / OPTIMISERS}: {error}") from error


@dataclass(frozen=True)
class FSDPReshard(FSDP):
    """FSDP2 that frees a unit after each use: the least memory, two gathers per unit and pass."""

    reshard_after_use: ClassVar[bool] = True


# The name since torch 2.13; the old one still works there, with a warning.
gather: Callable[[Tensor, Tensor], Any] = vars(dist).get("all_gather_single", dist.all_gather_into_tensor)
PARALLEL: dict[str, type[ProcessGroup]] = {"ddp": DDP, "fsdp": FSDP, "fsdp-reshard": FSDPReshard}


def fsdp_units(objective: nn.Module) -> list[FSDPModule]:
    """The modules of an objective that FSDP2 gathers one by one, the objective itself among them."""
    return [module for module in objective.modules() if isinstance(module, FSDPModule)]


@contextmanager
def join_ranks(parallel: str = "fsdp", device: str = "cpu") -> Iterator[SingleProcess]:
    """The ranks that torchrun started, joined for the block; `SingleProcess` without it. gloo on the CPU, NCCL on CUDA.

    ValueError for an unknown `parallel`, or more processes on a machine than it has GPUs.
    """
    if parallel not in PARALLEL:
        raise ValueError(f"parallel is {parallel!r}; choose one of {', '.join(PARALLEL)}")
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        yield SingleProcess(device)
        return
    backend = "gloo"
    if torch.device(device).type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"process {local} (from 0) of this machine has no GPU of its {gpus}; start fewer")
        backend, device = "cpu:gloo,cuda:nccl", f"cuda:{local}"  # counts and flags are on the CPU
        torch.cuda.set_device(local)
    dist.init_process_group(backend)
    try:
        with warnings.catch_warnings():  # FSDP2's, not to change outputs in place, which no part of the model does
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            yield PARALLEL[parallel](device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
