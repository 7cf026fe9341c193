"""One rank's part of a model is a narrower model; together the parts compute what the whole does."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest
import torch
from support.models import PAIRWISE, VOCABULARY, assert_same, over, random_model, random_tokens
from torch import Tensor

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, refine, schedules
from lrt.integrations.vllm.tensor_parallel import load_part, local_config, sum_over_ranks

RANKS = 2
CONFIGS = {
    name: replace(config, heads=4, kv_heads=kv_heads)
    for (name, config), kv_heads in zip(list(PAIRWISE.items())[::3], [2, 4, None] * 20, strict=False)
}


class Together:
    """Sums what every rank gives, one thread each."""

    def __init__(self) -> None:
        self.parts: list[Any] = [None] * RANKS
        self.barrier = Barrier(RANKS, timeout=60)

    def of(self, rank: int):
        def all_reduce(x: Tensor) -> Tensor:
            self.parts[rank] = x
            self.barrier.wait()
            total = sum(self.parts)
            self.barrier.wait()
            return total

        return all_reduce


def run_rank(model: Any, tokens: Tensor, together: Together, rank: int) -> Tensor:
    part = LatentRecurrentTransformer(local_config(model.config, RANKS)).double()
    sum_over_ranks(part, together.of(rank))
    load_part(part, dict(model.named_parameters()), model.config, rank, RANKS)
    with torch.no_grad():
        return part.logits(refine(part, tokens, schedules.interleaved(2)).hidden)


@over(CONFIGS)
def test_the_parts_compute_what_the_whole_does(config: ModelConfig):
    model, tokens, together = copy.deepcopy(random_model(config)), random_tokens(), Together()
    with torch.no_grad():
        expected = model.logits(refine(model, tokens, schedules.interleaved(2)).hidden)
    with ThreadPoolExecutor(RANKS) as pool:
        outputs = list(pool.map(lambda rank: run_rank(model, tokens, together, rank), range(RANKS)))
    for output in outputs:
        assert_same(output, expected)


def test_what_cannot_be_divided_is_named():
    config = ModelConfig(width=96, heads=6, kv_heads=3, vocab_size=VOCABULARY, memory=MemoryConfig())
    with pytest.raises(
        ValueError, match="kv_heads is 3, which tensor_parallel_size 2 does not divide; give one that does"
    ):
        local_config(config, 2)
