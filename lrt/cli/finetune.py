"""`lrt finetune`: chats, prompts and completions, or texts into a run or a folder of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from lrt.cli.loading import hide_bars_of_transformers
from lrt.cli.options import Paths
from lrt.integrations.finetune.options import FinetuneOptions, check_options
from lrt.utils.files import place_and_size
from lrt.utils.imports import extra


@dataclass(frozen=True, kw_only=True)
class Finetune(FinetuneOptions):
    """Fine-tune a run, or a folder of transformers (a retrofitted one too), on chats or prompts, through TRL.

    Only the assistant's tokens, or the completions, are learned (docs/finetuning.md).
    """

    model: tyro.conf.Positional[Path]
    """A run's or a checkpoint's folder, or a folder of transformers."""
    out: tyro.conf.Positional[Path]
    """Folder to write: the model, or with --lora its adapter."""
    chat: Paths
    """JSON lines with messages (OpenAI's), conversations (ShareGPT's), prompt and completion, or text."""
    template: str | None = None
    """How a run's chats are written: nanochat, chatml, plain. None: what its tokenizer is made for."""
    controls: tuple[Literal["tokens", "wall_clock"], ...] = ()
    """Of a retrofitted model: train it on the same rows also without its pathway, and with the previous embedding
    alone, for as many tokens, as much time, or both, and print what each came to. OUT then holds a folder for each."""
    device: str = "auto"
    """auto, cpu, cuda, mps; of several GPUs CUDA_VISIBLE_DEVICES names the one."""

    def run(self) -> None:
        from rich.console import Console

        from lrt.eval.report.table import print_table
        from lrt.utils.device import choose_device

        with extra("finetune", "finetune"):
            from lrt.integrations.finetune.chat_rows import read_rows
            from lrt.integrations.finetune.comparison import NOTE, comparison_table
            from lrt.integrations.finetune.controls import train_with_controls
            from lrt.integrations.finetune.finetune import finetune
            from lrt.integrations.finetune.targets import open_target
        check_options(self)
        hide_bars_of_transformers()
        rows, target, device = read_rows(self.chat), open_target(self.model, self.template), choose_device(self.device)
        if self.controls:
            outcomes = train_with_controls(target, rows, self.out, self, device, self.controls)
            print_table(comparison_table(outcomes), "text", Console())
            print(f"{NOTE}\n{place_and_size(self.out)}; `lrt report {self.out}` makes a page of it")
            return
        tuned = finetune(target, rows, self.out, self, device)
        what = f"an adapter of rank {self.lora}" if self.lora else "the pathway" if self.freeze else "all weights"
        print(f"{what}, {tuned.rows} rows, {tuned.tokens:,} tokens, {tuned.seconds:.0f} s")
        scores = f"{tuned.before.mean:.4f} -> {tuned.after.mean:.4f} nats per learned token"
        print(f"live, {len(tuned.after.tokens)} held-out rows: {scores}")
        print(place_and_size(self.out))
