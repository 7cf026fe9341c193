"""Tokens and log-probabilities of vLLM are those of true recurrence, whatever its scheduler does."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.vllm_engine import CONFIGS, NEW, check_answers, counted, engine, exported, ragged_prompts
from vllm import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0)
BATCHED = (32, 48, 64, 96, 128, 160, 256, 512)
"""Tokens per step, one after another over the configurations."""


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_decoding_is_the_native_engines(name: str, tmp_path: Path):
    """64 ragged prompts up to the context, in chunks, through a third of the pages that they would fill."""
    folder, prompts = exported(tmp_path, name), ragged_prompts(64)
    batched = BATCHED[list(CONFIGS).index(name) % len(BATCHED)]
    with engine(folder, max_num_batched_tokens=batched, num_gpu_blocks_override=26) as llm:
        done = llm.generate([{"prompt_token_ids": p} for p in prompts], GREEDY)
        assert counted(llm, "vllm:num_preemptions") > 0
        assert counted(llm, "vllm:prefix_cache_hits") > 0
    undecided = check_answers(folder, prompts, [answer.outputs[0] for answer in done])
    assert undecided <= 2, "almost every token is decided by a margin above rounding"
