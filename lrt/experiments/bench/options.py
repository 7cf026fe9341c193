"""What is timed by `lrt bench train` and `lrt bench attention`: their flags, which are read without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

PLAIN = "plain()"
SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,6})")


@dataclass(frozen=True)
class TrainingSteps:
    """Which models' whole training steps are timed, and at which sizes."""

    models: tuple[str, ...] = ("recommended", "late", "token shift, 2 channels, layerwise")
    """Families of `lrt study rivals` by name, over the Transformer of as many parameters; or folders of runs of your
    own, each over a Transformer of its size."""
    sources: tuple[float, ...] = (0.5,)
    """Also the recommended LRT that remembers the layer at this share of the depth in place of the last one: its
    settled(0, 1, 1) over its own plain()."""
    sizes: tuple[str, ...] = ("4x96", "6x384")
    """Layers x width of the families."""
    context: int = 256
    """Tokens per row, of the families."""
    batch: int = 8
    """Rows, of the families."""
    vocab_size: int = 4096
    """Tokens, of the families."""

    def __post_init__(self) -> None:
        for size in self.sizes:
            if SIZE.fullmatch(size) is None:
                raise ValueError(f"--training.sizes has {size!r}; write layers x width, for example 4x96")
        for share in self.sources:
            if not 0 < share <= 1:
                raise ValueError(f"--training.sources has {share}; give a share of the depth, above 0 and at most 1")


@dataclass(frozen=True)
class TrainOptions:
    """Time training: forward and backward of each model and schedule over the plain step of the same model; and whole
    steps, optimiser included, over the Transformer's."""

    only: tuple[Literal["passes", "training"], ...] = ()
    """Which rows: passes (forward and backward), training (whole steps). None: both. Models and sizes here are
    those of passes; whole steps have theirs under --training."""
    models: tuple[Literal["transformer", "token-shift", "lrt-shared", "lrt-layerwise"], ...] = ("lrt-shared",)
    """Which models; a Transformer has one schedule only."""
    schedules: tuple[str, ...] = (PLAIN, "interleaved(2)", "settled(0, 1, 1)")
    """Which schedules, as Python would write them; `all` is a row for each of the library."""
    modules: bool = True
    """Also the plain step of the shared LRT in eager PyTorch modules with full logits."""
    recompute: tuple[Literal["blocks", "passes"], ...] = ("passes",)
    """Also each schedule with this recomputed in the backward."""
    depth: int = 6
    width: int = 384
    context: int = 512
    """Tokens per row."""
    batch: int = 4
    """Rows."""
    vocab_size: int = 4096
    compile: Literal["always", "never"] = "always"
    """torch.compile on both sides (the modules stay eager)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    training: TrainingSteps = field(default_factory=TrainingSteps)
    """Whole steps: which models, at which sizes."""
    rounds: int = 10
    """Rounds in which every candidate is timed once."""
    device: str = "cpu"
    json: bool = False
    """Print one JSON object as the last line."""
    progress: Annotated[bool, tyro.conf.arg(help="Show a bar.")] = True
    seed: int = field(default=0)


@dataclass(frozen=True)
class AttentionOptions:
    """Time attention alone, forward and backward: a causal kernel over all positions, and each schedule's passes."""

    schedules: tuple[str, ...] = ("interleaved(2)", "settled(0, 1, 1)", "strided(4, 1)")
    """Schedules of full passes and residue classes."""
    context: int = 512
    batch: int = 4
    heads: int = 3
    kv_heads: int | None = None
    head_size: int = 128
    window: int | None = None
    """Tokens seen, the current one included. None: all."""
    precision: Literal["float32", "bfloat16"] = "float32"
    rounds: int = 10
    device: str = "cpu"
    json: bool = False
    """Print one JSON object as the last line."""
