"""`lrt finetune`: chats, prompts and completions, or texts into a run or a folder of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from lrt.cli.options import Paths
from lrt.integrations.finetune.options import FinetuneOptions, check_options
from lrt.utils.device import choose_device
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
    device: str = "auto"
    """auto, cpu, cuda, mps; of several GPUs CUDA_VISIBLE_DEVICES names the one."""

    def run(self) -> None:
        with extra("finetune", "finetune"):
            from lrt.integrations.finetune.chat_rows import read_rows
            from lrt.integrations.finetune.finetune import finetune
            from lrt.integrations.finetune.targets import open_target
        check_options(self)
        rows = read_rows(self.chat)
        tuned = finetune(open_target(self.model, self.template), rows, self.out, self, choose_device(self.device))
        what = f"an adapter of rank {self.lora}" if self.lora else "all weights"
        print(f"{self.out}: {what}, {tuned.rows} rows")
        print(f"live, {tuned.held_out} held-out rows: {tuned.before:.4f} -> {tuned.after:.4f} nats per learned token")
