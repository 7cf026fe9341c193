"""`lrt retrofit`: a latent recurrent pathway for a pretrained model on one's disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from lrt.cli.loading import hide_bars_of_transformers
from lrt.utils.files import place_and_size
from lrt.utils.imports import extra


@dataclass(frozen=True)
class Retrofit:
    """Add a latent recurrent pathway to a pretrained decoder of transformers (Llama, Qwen, GPT-2, …).

    It is neutral: the new folder computes what the old one does until it is trained (docs/pretrained.md).
    """

    folder: tyro.conf.Positional[Path]
    """The model's folder: config.json, weights and tokenizer."""
    out: tyro.conf.Positional[Path]
    """Folder to write."""
    source: tuple[int, ...] | None = None
    """The layers that the next token reads: 0 is the embedding (the control without recurrence), the number of layers
    is the last; several are channels of their own, as --source 0 12. None is the last."""
    layers: tuple[int, ...] | None = None
    """The blocks, counted from 1, that read the memory. None is all."""
    projection: Literal["shared", "layerwise"] = "shared"
    """One pair of memory projections for all blocks, or one pair each."""
    schedule: str = "settled(0, 1, 1)"
    """How it is trained (docs/training.md)."""
    prefill: Literal["exact", "converged", "fast"] = "converged"
    """How prompts and texts are read."""

    def run(self) -> None:
        with extra("hf", "retrofit"):
            from lrt.integrations.retrofit import retrofit_folder
        hide_bars_of_transformers()
        model = retrofit_folder(
            self.folder,
            self.out,
            source=self.source,
            layers=self.layers,
            projection=self.projection,
            schedule=self.schedule,
            prefill=self.prefill,
        )
        added = sum(p.numel() for p in model.latent.parameters())
        total = sum(p.numel() for p in model.parameters())
        print(f"{total:,} parameters, {added:,} of them new and neutral")
        print(place_and_size(self.out))
