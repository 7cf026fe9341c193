"""How verbs load a model: a checkpoint, with an adapter of `lrt finetune --lora` where one is named."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lrt.utils.files import read_json
from lrt.utils.imports import extra

if TYPE_CHECKING:
    import torch

    from lrt.data.tokenizer import Tokenizer
    from lrt.model.transformer import LatentRecurrentTransformer

RETROFITTED = "lrt_retrofit"
"""The model_type of retrofitted folders; what defines it imports transformers, which is an extra."""


def hide_bars_of_transformers() -> None:
    """No bars of weights being loaded and written where standard error is a file: they would be its only lines."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def is_retrofitted(folder: Path) -> bool:
    """Whether it is a folder of transformers that `lrt retrofit` made."""
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == RETROFITTED


def load_model(
    folder: Path, device: str | torch.device, adapter: Path | None = None
) -> tuple[LatentRecurrentTransformer, Tokenizer]:
    """(the model, the adapter merged into its weights; its tokenizer) of a folder that `checkpoint.verify` or `check`
    gave."""
    if adapter is None:
        from lrt.model import checkpoint

        return checkpoint.read(folder, device)
    with extra("finetune", "--adapter"):
        from lrt.integrations.finetune.adapter import load_adapted
    return load_adapted(folder, adapter, str(device))
