"""`lrt export` and `lrt import`: checkpoints to and from others' formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from lrt.cli.loading import hide_bars_of_transformers
from lrt.utils.files import place_and_size
from lrt.utils.imports import extra


@dataclass(frozen=True)
class Export:
    """Write a checkpoint as a Hugging Face folder, which works where lrt is not installed."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run's."""
    out: tyro.conf.Positional[Path]
    """Folder to write."""
    prefill: Literal["exact", "converged", "fast", "one_sweep"] = "converged"
    """How the exported model reads prompts and texts; `model.config.prefill` changes it later."""
    remote_code: bool = True
    """Put the code into the folder, to be loaded with trust_remote_code=True. Without it, the folder needs lrt."""

    def run(self) -> None:
        with extra("hf", "export"):
            from lrt.integrations.hf.export import export
        hide_bars_of_transformers()
        export(self.checkpoint, self.out, self.prefill, self.remote_code)
        print(f"{place_and_size(self.out)}. In Python:")
        code = ", trust_remote_code=True" if self.remote_code else ""
        print(f'AutoModelForCausalLM.from_pretrained("{self.out}"{code})')


@dataclass(frozen=True)
class Import:
    """Convert a checkpoint of nanochat, or of the paper's authors' LRT, to a checkpoint of this library."""

    source: tyro.conf.Positional[Path]
    """A model_*.pt with its meta_*.json beside it, or their folder (the newest is taken). Nothing in it is run."""
    out: tyro.conf.Positional[Path]
    """Folder to write."""
    tokenizer: Path
    """The tokenizer.json that it was trained with."""

    def run(self) -> None:
        from lrt.integrations.nanochat import import_checkpoint
        from lrt.model import checkpoint
        from lrt.model.size import count_parameters

        model = import_checkpoint(self.source, self.out, self.tokenizer)
        total, _ = count_parameters(model.config)
        print(f"{total:,} parameters, schedule {checkpoint.about(self.out)['schedule']}")
        print(place_and_size(self.out))
