"""An adapter of `lrt finetune --lora`, merged into the run that it was made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

from lrt.data.tokenizer import Tokenizer
from lrt.integrations.hf.export import wrap_model
from lrt.model import checkpoint
from lrt.model.transformer import LatentRecurrentTransformer


def load_adapted(source: Path, adapter: Path, device: str) -> tuple[LatentRecurrentTransformer, Tokenizer]:
    """(the run's model with the adapter merged into its weights, its tokenizer). ValueError where they do not match."""
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} is no adapter: it has no adapter_config.json; give what lrt finetune --lora wrote")
    native, tokenizer = checkpoint.load(source, device)
    model: Any = wrap_model(native, tokenizer, checkpoint.about(source).get("schedule", "plain()"), "converged")
    try:
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{adapter} does not fit {source}: {error}") from error
    return merged.model.eval().requires_grad_(True), tokenizer
