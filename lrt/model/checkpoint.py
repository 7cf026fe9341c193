"""Checkpoints: a folder that alone rebuilds a model and its tokenizer. Loading one unpickles nothing.

    model.safetensors   weights
    config.json         model configuration, what trained it, and the tokenizer's hash
    tokenizer.json      the tokenizer
    training.pt         optional: what training needs to go on (optimisers, progress); tensors and plain data only
    optimisers/         optional: the optimisers' state instead, where ranks hold shards (torch.distributed.checkpoint)
    manifest.json       size and SHA-256 of the others

A save is written beside its target, flushed to the disk, and renamed: whatever fails, one whole checkpoint remains.
The weights are one file also where ranks hold shards of them; only the optimisers' state may be saved in shards. So any
number of ranks can load what any other number saved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lrt.data.tokenizer import Tokenizer
from lrt.distributed.single_process import SINGLE_PROCESS, SingleProcess, load_weights
from lrt.model.config import ModelConfig
from lrt.model.memory_config import MODEL_KINDS
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.utils import plugins
from lrt.utils.files import free_megabytes, read_json, recover, replace_folder, sha256, temporary_name

FORMAT = 1
"""Of config.json. A field that is added needs no new number: where it is absent it has its default."""
FILES = ("model.safetensors", "config.json", "tokenizer.json")
"""What every checkpoint has, beside the manifest."""
OWN = (*FILES, "training.pt", "optimisers", "manifest.json")
"""All that a checkpoint may have. What else lies in its folder, such as evaluation/, stays when it is saved again."""


def save(
    path: str | Path,
    model: LatentRecurrentTransformer,
    tokenizer: Tokenizer,
    about: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    parts: Sequence[torch.optim.Optimizer] = (),
    ranks: SingleProcess = SINGLE_PROCESS,
) -> None:
    """Write a checkpoint folder, replacing an older one only once the new one is whole.

    `about` is JSON data that says how the model came to be (schedule, steps, scores); `training` is what
    `load_training` gives back, with the state of the optimisers `parts`. All `ranks` call it; rank 0 makes the folder
    whole. Raises OSError, on every rank, where the disk does not take it; the older checkpoint is then untouched.
    """
    path = Path(path)
    if path.exists() and not (path / "manifest.json").exists() and any(path.iterdir()):
        raise ValueError(f"{path} holds something that is no checkpoint; choose another folder")
    fresh = ranks.broadcast(temporary_name(path))
    try:
        # Two collective blocks: the folder exists on rank 0's word before any rank writes into it, and a failure on one
        # rank is an OSError on all, so that none waits for ever.
        with ranks.collective():
            if ranks.rank == 0:
                for stale in path.parent.glob(f".{path.name}.saving-*"):  # of a save that was killed
                    shutil.rmtree(stale, ignore_errors=True)
                fresh.mkdir(parents=True)
        with ranks.collective():
            if training is not None:
                ranks.write_training(fresh, training, model, parts)
            weights = ranks.weights(model)
            if ranks.rank == 0:
                _write(fresh, weights, model.config, tokenizer, about or {})
                replace_folder(fresh, path, OWN)
    except BaseException as error:
        if ranks.rank == 0:
            shutil.rmtree(fresh, ignore_errors=True)
        # What the libraries' writers raise on a full disk says little of it.
        if isinstance(error, safetensors.SafetensorError | RuntimeError | OSError):
            raise OSError(
                f"cannot save to {path}: {error} ({free_megabytes(path.parent):,.0f} MB free there, a save needs "
                f"about {megabytes_needed(model, training is not None):,.0f}); the previous checkpoint, if any, is "
                "untouched"
            ) from error
        raise


def megabytes_needed(model: LatentRecurrentTransformer, training: bool) -> float:
    """MB that a save takes: the weights, and for training up to two moments of each."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) * (3 if training else 1) / 1e6


def differences(saved: Any, current: Any, name: str) -> str:
    """What differs between two values that JSON can write, field by field, as text; empty where nothing does.

    `name` is the path to them. A field that one of them lacks counts as None.
    """
    if not (isinstance(saved, dict) and isinstance(current, dict)):
        return f"{name}: {saved} there, {current} here"
    return "; ".join(
        differences(saved.get(k), current.get(k), f"{name}.{k}")
        for k in {**saved, **current}
        if saved.get(k) != current.get(k)
    )


def _write(
    folder: Path, weights: dict[str, Tensor], config: ModelConfig, tokenizer: Tokenizer, about: dict[str, Any]
) -> None:
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    if records := plugins.describe(config.memory.plugin_uses()):
        about = {"plugins": records, **about}
    written = {
        "format": FORMAT,
        "model": config.to_dict(),
        "tokenizer_sha256": tokenizer.sha256,
        "torch": str(torch.__version__),
        "about": about,
    }
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    tokenizer.save(folder / "tokenizer.json")
    # The manifest comes last and names all that is there, training state included.
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    manifest = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[LatentRecurrentTransformer, Tokenizer]:
    """The model, in evaluation mode, and the tokenizer of a checkpoint folder, or of a run's folder that holds one.

    Raises ValueError, naming the file, where one is missing, truncated, changed, or belongs to another checkpoint; and
    naming the plugin, where a part of the model is one's that is not loaded: none is loaded by itself.
    """
    return read(verify(Path(path)), device)


def read(folder: Path, device: str | torch.device = "cpu") -> tuple[LatentRecurrentTransformer, Tokenizer]:
    """As `load`, of a folder that `verify` or `check` gave."""
    config, recorded = _config(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.sha256 != recorded:
        raise ValueError(
            f"{folder / 'tokenizer.json'} does not belong to this checkpoint; restore the one saved with it"
        )
    model = LatentRecurrentTransformer(config)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size} tokens, the model {config.vocab_size}"
        )
    try:
        weights = _read_weights(folder)
        model.load_state_dict(weights)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / 'model.safetensors'} does not hold this model's weights: {error}") from error
    return model.to(device).eval(), tokenizer


def _config(folder: Path) -> tuple[ModelConfig, str]:
    """The model's configuration and the tokenizer's SHA-256; ValueError naming config.json where it makes no sense."""
    file = folder / "config.json"
    data = read_json(file)
    if data.get("format") != FORMAT:
        raise ValueError(f"{file}: format {data.get('format')!r}; this version reads {FORMAT}")
    plugins.require(_about(file).get("plugins", ()), MODEL_KINDS)
    try:
        return ModelConfig.from_dict(data["model"]), str(data["tokenizer_sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} describes no model of this version ({error!r}); restore it from a copy") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights as this version shapes them: what was a scalar in earlier ones is a vector of one element."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    return {name: w.reshape(1) if w.dim() == 0 else w for name, w in weights.items()}


def load_training(
    path: str | Path, model: LatentRecurrentTransformer, ranks: SingleProcess = SINGLE_PROCESS
) -> dict[str, Any]:
    """Put a checkpoint's weights into `model`, in place, and return the `training` that was saved with them.

    Raises ValueError where the folder is damaged, holds no training state, or another architecture.
    """
    folder = verify(Path(path))
    saved, _ = _config(folder)
    plugins.require(about(folder).get("plugins", ()), (*MODEL_KINDS, "schedule"))
    if saved != model.config:
        # Through JSON, so that tuples and lists compare and read alike.
        there, here = (json.loads(json.dumps(c.to_dict())) for c in (saved, model.config))
        differing = differences(there, here, "model")
        raise ValueError(
            f"{folder} holds another architecture ({differing}); choose another --out, or start anew with "
            "--resume never"
        )
    if not (folder / "training.pt").is_file():
        raise ValueError(f"{folder} cannot be trained on: it has no training.pt; take a folder of snapshots/")
    load_weights(model, _read_weights(folder), ranks)
    try:
        return torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{folder / 'training.pt'} cannot be read: it holds more than tensors and plain data; nothing in it was "
            "run. Take another snapshot, or a copy"
        ) from error


def about(path: str | Path) -> dict[str, Any]:
    """How the checkpoint came to be: the JSON data that `save` was given; {} where it says nothing.

    ValueError as in `verify`, and where it is no object.
    """
    return _about(verify(Path(path)) / "config.json")


def _about(file: Path) -> dict[str, Any]:
    said = read_json(file).get("about", {})
    if not isinstance(said, dict):
        raise ValueError(f"{file}: 'about' is {said!r:.60}, not an object; restore it from a copy")
    return said


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of a checkpoint's model, without its weights; ValueError where config.json makes no sense."""
    return _config(locate(Path(path)))[0]


def locate(path: Path) -> Path:
    """The checkpoint's folder: `path`, or the newest of a run's folder `path`; `path` where there is none.

    It only looks, so that it may be asked while somebody saves.
    """
    if (path / "manifest.json").exists():
        return path
    # A run's folder: its checkpoint, or how far it has come.
    return next(iter([*path.glob("checkpoint"), *sorted(path.glob("snapshots/step-*"), reverse=True)]), path)


def verify(path: Path) -> Path:
    """The checkpoint's folder, as `check` has it; a save of it that was cut off is undone first."""
    recover(path)  # between two renames
    if not (path / "manifest.json").exists():
        recover(path / "checkpoint")
    return check(path)


def check(path: Path) -> Path:
    """The checkpoint's folder, as `locate` has it. It only looks, so that it may be asked while somebody saves.

    Raises ValueError, naming the file, where one is missing, truncated or changed against the manifest.
    """
    path = locate(path)
    if not (path / "manifest.json").is_file():
        if (path / "config.json").is_file() and "model_type" in read_json(path / "config.json"):
            raise ValueError(
                f"{path} is a folder of transformers, not a checkpoint; `lrt finetune` trains such folders, and "
                "`lrt retrofit` adds a pathway to them"
            )
        raise ValueError(f"{path} is not a checkpoint: it has no manifest.json; give the folder that `lrt train` wrote")
    manifest = read_json(path / "manifest.json")
    if "model.safetensors" not in manifest and "splits" in manifest:
        raise ValueError(f"{path} holds prepared data, not a checkpoint; give the folder that `lrt train` wrote")
    for name in sorted({*FILES, *manifest}):
        file, entry = path / name, manifest.get(name)
        if not file.is_file() or not isinstance(entry, dict):
            raise ValueError(f"{file} is missing; restore the checkpoint from a copy")
        size = file.stat().st_size
        if size != entry.get("bytes"):
            raise ValueError(
                f"{file} has {size} bytes instead of {entry.get('bytes')}: truncated; restore it from a copy"
            )
        if sha256(file) != entry.get("sha256"):
            raise ValueError(f"{file} was changed after it was saved (its SHA-256 differs); restore it from a copy")
    return path


def snapshots(out: Path) -> list[Path]:
    """The snapshots of a run's folder, oldest first: names have eight digits, so that their order is that of steps."""
    return sorted((out / "snapshots").glob("step-*"))


def snapshot_path(out: Path, step: int) -> Path:
    """The folder, in a run's folder, of the snapshot taken after `step` steps."""
    return out / "snapshots" / f"step-{step:08d}"


def snapshot_step(path: Path) -> int:
    """The step a snapshot was taken after; 0 where the folder is none."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdigit() else 0


def drop_snapshots(paths: list[Path]) -> None:
    """Delete these folders."""
    for path in paths:
        shutil.rmtree(path)
