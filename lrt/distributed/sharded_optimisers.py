"""Read the optimisers' state that ranks wrote in shards, and run nothing that a crafted folder may hold.

torch.distributed.checkpoint unpickles its index, `.metadata`, and every entry that is no tensor (rates, betas). Here
the index may name the classes of such an index and nothing else, and entries are read with `weights_only=True`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from pickle import Unpickler, UnpicklingError
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load

CLASSES = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    **{(metadata.__name__, name): getattr(metadata, name) for name in CLASSES},
    (filesystem.__name__, "_StorageInfo"): getattr(filesystem, "_StorageInfo"),  # noqa: B009
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): lambda name: {"torch.strided": torch.strided}[name],
    **{(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")},
    **{(module, "WindowsPath"): PureWindowsPath for module in ("pathlib", "pathlib._local")},
}
"""What an index is made of: all that unpickling it may call."""


class IndexUnpickler(Unpickler):
    """Unpickles an index; UnpicklingError for what names anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) not in ALLOWED:
            raise UnpicklingError(f"it names {module}.{name}, which is no part of an index of shards")
        return ALLOWED[module, name]


class Reader(filesystem.FileSystemReader):
    """torch's reader of shards, with an index that is unpickled by `IndexUnpickler`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        index = IndexUnpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        if not isinstance(index, metadata.Metadata):
            raise UnpicklingError(f"it holds {type(index).__name__}, no index of shards")
        index.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return index


class Planner(DefaultLoadPlanner):
    """torch's planner; entries that are no tensors are plain data."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        entry = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), entry)  # what the parent unpickles is what was let through
        entry.seek(0)
        super().load_bytes(read_item, entry)


def load_shards(folder: Path, model: nn.Module, optimisers: Sequence[torch.optim.Optimizer]) -> None:
    """Put shards that any number of ranks wrote into the optimisers of this run's ranks. All ranks call it.

    Their names in the shards begin with that of the folder. ValueError, naming it, where it holds anything but shards;
    nothing in it is run.
    """
    reader = Reader(folder)
    try:
        reader.read_metadata()  # before any rank waits for another
        # Reading needs tensors to read into: this makes the moments of optimisers that have not stepped yet.
        state = {folder.name: get_optimizer_state_dict(model, list(optimisers))}
        with warnings.catch_warnings():  # shards may be read by a single process
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            load(state, storage_reader=reader, planner=Planner())
    except (CheckpointException, UnpicklingError, EOFError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder} cannot be read: {reason(error)}; nothing in it was run. Take another snapshot, or a copy"
        ) from error
    set_optimizer_state_dict(model, list(optimisers), optim_state_dict=state[folder.name])


def reason(error: BaseException) -> str:
    """The first line of what went wrong; of what failed on several ranks, of the first."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
