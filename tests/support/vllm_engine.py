"""Exported models inside vLLM, and what they must give: lrt's own numbers, token by token."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrt import MemoryConfig, refine, schedules
from lrt.integrations.hf.export import export
from lrt.model import checkpoint
from support.server import saved

CONTEXT = 192
NEW = 40
"""Tokens that each request continues with."""
MARGIN = 1e-4
"""Of the deciding logits in float32, below which two decodes may differ (docs/contract.md, section 7)."""
CLOSE = 1e-3
"""How far a log-probability may be off in float32."""
CONFIGS: dict[str, dict[str, Any]] = {
    "shared": {},
    "layerwise": {"memory": MemoryConfig(projection="layerwise")},
    "channels (0, L)": {"memory": MemoryConfig(source=(0, 4), combine="channels", initial="embedding")},
    "source L/2": {"memory": MemoryConfig(source=2)},
    "delay 2": {"memory": MemoryConfig(delay=2)},
    "windows": {"window_pattern": "SL", "window": 24},
    "grouped heads": {"heads": 4, "kv_heads": 2, "head_size": 32},
    "value embeddings": {"value_embeddings": "alternate"},
    "residual, several delays": {
        "memory": MemoryConfig(injection="residual", source=(0, 2, 4), delay=(2, 1, 3), combine="sum")
    },
    "token shift": {"memory": MemoryConfig(source=0)},
    "none": {"memory": MemoryConfig(injection="none")},
}
"""Name -> fields of a model of width 64 and 4 layers. vLLM's kernel for CPUs has head sizes from 32 on."""


def exported(folder: Path, name: str, **fields: Any) -> Path:
    """A random model of that configuration, exported; the checkpoint is beside it."""
    fields = {"depth": 4, "width": 64, "heads": 2, "context": CONTEXT} | CONFIGS[name] | fields
    export(saved(folder / "checkpoint", **fields), folder / "exported")
    return folder / "exported"


def settings(**changes: Any) -> dict[str, Any]:
    """What every engine here is started with."""
    return {
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "kv_cache_memory_bytes": 2**26,
        "max_num_seqs": 16,
        "disable_log_stats": False,
        "hf_overrides": {"prefill": "exact"},
    } | changes


@contextmanager
def engine(folder: Path, **changes: Any) -> Iterator[Any]:
    """vLLM in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(str(folder), **settings(**changes))
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def counted(llm: Any, name: str) -> float:
    """The sum of a counter of vLLM's."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def ragged_prompts(count: int, vocabulary: int = 300, seed: int = 0, common: int = 70) -> list[list[int]]:
    """Prompts of 1 token up to what the context leaves; every third begins as the others of them do."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    longest, beginning = CONTEXT - NEW, draw(common)
    lengths = [1 + i * (longest - 1) // (count - 1) for i in range(count)]
    return [(beginning + draw(n))[:n] if i % 3 == 0 else draw(n) for i, n in enumerate(lengths)]


@functools.cache
def native(folder: Path) -> Any:
    """lrt's own model of an exported folder."""
    return checkpoint.load(folder.parent / "checkpoint")[0]


@torch.no_grad()
def true_logits(folder: Path, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Next-token logits (n, V) at every position of each text, by true recurrence."""
    model, longest = native(folder), max(map(len, texts))
    tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    hidden = refine(model, tokens, schedules.sequential()).hidden
    return [model.logits(row[: len(text)]) for row, text in zip(hidden, texts, strict=True)]


def check_answers(folder: Path, prompts: Sequence[list[int]], answers: Sequence[Any], greedy: bool = True) -> int:
    """Every token and log-probability of vLLM's answers against true recurrence over the same text.

    Returns at how many tokens greedy decoding was undecided.
    """
    texts = [[*prompt, *answer.token_ids] for prompt, answer in zip(prompts, answers, strict=True)]
    undecided = 0
    for prompt, answer, logits in zip(prompts, answers, true_logits(folder, texts), strict=True):
        own = logits[len(prompt) - 1 : -1]
        tokens = torch.tensor(list(answer.token_ids))
        logprobs = own.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
        given = torch.tensor(
            [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        )
        assert (given - logprobs).abs().max() < CLOSE, f"log-probabilities behind a prompt of {len(prompt)}"
        behind = own.amax(-1) - own.gather(1, tokens.unsqueeze(1)).squeeze(1)
        if greedy:
            assert behind.max() < MARGIN, f"tokens behind a prompt of {len(prompt)}"
            undecided += int((behind > 0).sum())
    return undecided
