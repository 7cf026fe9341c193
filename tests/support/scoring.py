"""Small models, texts and windows that scores are tested on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lrt import MemoryConfig, ModelConfig
from lrt.data.prepared import Documents
from lrt.data.windows import Windows, windows
from lrt.distributed.single_process import SingleProcess
from lrt.eval.scoring import bits_per_byte

V, CONTEXT = 31, 8
BYTES = torch.arange(V) % 4  # token t stands for t mod 4 bytes; BOS, 0, for none


def configuration(**memory: Any) -> ModelConfig:
    return ModelConfig(
        depth=2, width=12, heads=2, vocab_size=V, context=CONTEXT, mlp_width=20, memory=MemoryConfig(**memory)
    )


LRT = configuration()
NONE = configuration(injection="none")
SHIFT = configuration(source=0)


def text(lengths: tuple[int, ...] = (19, 3, 11, 1), size: int = 0) -> Documents:
    """Documents of random tokens, none of them BOS."""
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    return Documents(np.random.default_rng(0).integers(1, V, offsets[-1]).astype(np.uint16), offsets, bos=0, bytes=size)


def cut(documents: Documents | None = None) -> Windows:
    return windows(documents or text(), CONTEXT)


def bpb(model: Any, scorer: Any, found: Windows | None = None, **fields: Any) -> float:
    return bits_per_byte(model, found or cut(), fields.pop("token_bytes", BYTES), scorer, progress=False, **fields)[0]


@dataclass(frozen=True)
class Thread(SingleProcess):
    """A rank that is a thread of this process."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    @contextmanager
    def collective(self) -> Iterator[None]:
        yield
        self.barrier.wait(60)


def on_ranks(count: int, work: Callable[[SingleProcess], Any]) -> list[Any]:
    """What `work` gives on each of several ranks at once."""
    barrier = threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, [Thread(rank=r, ranks=count, barrier=barrier) for r in range(count)]))
