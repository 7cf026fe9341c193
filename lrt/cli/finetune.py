"""`lrt finetune`: chats, prompts and completions, or texts into a run or a folder of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from lrt.cli.options import Paths
from lrt.utils.device import choose_device
from lrt.utils.imports import extra


@dataclass(frozen=True)
class Finetune:
    """Fine-tune a run, or a folder of transformers (a retrofitted one too), on chats or prompts, through TRL.

    Only the assistant's tokens, or the completions, are learned (docs/finetuning.md).
    """

    model: tyro.conf.Positional[Path]
    """A run's or a checkpoint's folder, or a folder of transformers."""
    out: tyro.conf.Positional[Path]
    """Folder to write: the model, or with --lora its adapter."""
    chat: Paths
    """JSON lines with messages (OpenAI's), conversations (ShareGPT's), prompt and completion, or text."""
    lora: int = 0
    """Rank of the adapters that are trained in place of the weights; 0 trains all weights."""
    lr: float | None = None
    """The highest learning rate. None: 2e-4 with adapters, 2e-5 without."""
    epochs: float = 1.0
    """How often every row is seen."""
    steps: int | None = None
    """Stop after so many steps."""
    batch: int = 8
    """Rows of a step on the device at a time."""
    accumulate: int = 1
    """Times that many are one step."""
    length: int = 1024
    """Tokens of a row at most; what is longer is cut."""
    packing: bool = False
    """Put several rows into one of --length; they do not read each other."""
    val: float = 0.05
    """The share of the rows that is held out and scored, live."""
    template: str | None = None
    """How a run's chats are written: nanochat, chatml, plain. None: what its tokenizer is made for."""
    seed: int = 0
    """Decides which rows are held out, and their order."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""

    def run(self) -> None:
        with extra("finetune", "finetune"):
            from lrt.integrations.finetune.chat_rows import read_rows
            from lrt.integrations.finetune.finetune import FinetuneConfig, finetune
            from lrt.integrations.finetune.targets import open_target
        config = FinetuneConfig(
            self.lora, self.lr, self.epochs, self.steps, self.batch, self.accumulate, self.length, self.packing,
            self.val, self.seed,
        )  # fmt: skip
        if self.out.exists() and any(self.out.iterdir()):
            raise ValueError(f"{self.out} is not empty; choose another folder")
        rows = read_rows(self.chat)
        tuned = finetune(open_target(self.model, self.template), rows, self.out, config, choose_device(self.device))
        what = f"an adapter of rank {self.lora}" if self.lora else "all weights"
        print(f"{self.out}: {what}, {tuned.rows} rows")
        print(f"live, {tuned.held_out} held-out rows: {tuned.before:.4f} -> {tuned.after:.4f} nats per learned token")
