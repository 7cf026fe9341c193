"""What a request may ask for: samples, seeds, stop strings, how exactly its prompt is read. And what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY
from support.vllm_engine import CONTEXT, NEW, check_answers, counted, engine, exported, native, ragged_prompts
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

PROMPTS = ragged_prompts(8, seed=3)
LONG = PROMPTS[-2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose memory weighs little, so that sweeps contract."""
    out = exported(tmp_path_factory.mktemp("requests"), "shared")
    model = native(out)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("gamma") or name == "projection.weight":
                weight.mul_(0.1)
    from lrt.integrations.hf.export import export
    from lrt.model import checkpoint

    _, tokenizer = checkpoint.load(out.parent / "checkpoint")
    checkpoint.save(out.parent / "checkpoint", model, tokenizer)
    export(out.parent / "checkpoint", out)
    return out


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[Any]:
    # No prompt is cut: vLLM 0.32.0 on a CPU fails where a request with a seed is, whatever the model.
    with engine(folder, max_num_batched_tokens=4096, hf_overrides={"prefill": "converged"}) as llm:
        yield llm


def ask(llm: Any, prompts: list[list[int]], **fields: Any) -> list[Any]:
    params = SamplingParams(**{"max_tokens": NEW, "ignore_eos": True, "logprobs": 0} | fields)
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def prompts_read(mode: str, path: str) -> float:
    return REGISTRY.get_sample_value("lrt_prompts_total", {"mode": mode, "path": path}) or 0.0


def test_four_samples_with_a_seed_are_the_same_in_any_batch(folder: Path, llm: Any):
    several = ask(llm, PROMPTS, temperature=1.0, n=4, seed=7)
    (alone,) = ask(llm, [PROMPTS[5]], temperature=1.0, n=4, seed=7)
    texts = [tuple(answer.token_ids) for answer in alone.outputs]
    assert texts == [tuple(answer.token_ids) for answer in several[5].outputs]
    assert len(set(texts)) == 4
    for prompt, request in zip(PROMPTS, several, strict=True):
        check_answers(folder, [prompt] * 4, request.outputs, greedy=False)


def test_a_stop_string_ends_an_answer(llm: Any):
    (free,) = ask(llm, [LONG], temperature=0)
    text = free.outputs[0].text
    stop = text[len(text) // 2 :][:3]
    (stopped,) = ask(llm, [LONG], temperature=0, stop=[stop])
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].text == text[: text.index(stop)]


def test_a_converged_prompt_is_certified_and_true(folder: Path, llm: Any):
    before = prompts_read("converged", "sweeps")
    prompts = ragged_prompts(4, seed=11)[2:]
    done = ask(llm, prompts, temperature=0)
    assert prompts_read("converged", "sweeps") == before + len(prompts)
    assert REGISTRY.get_sample_value("lrt_prefill_bound_bucket", {"mode": "converged", "le": "1e-05"}) >= len(prompts)
    check_answers(folder, prompts, [answer.outputs[0] for answer in done])


def test_a_request_may_ask_for_more_exactness_and_reads_no_prefix_then(folder: Path, llm: Any):
    (prompt,) = ragged_prompts(2, seed=21)[1:]
    ask(llm, [prompt], temperature=0)
    hits, exact = counted(llm, "vllm:prefix_cache_hits"), prompts_read("exact", "exact")
    ask(llm, [prompt], temperature=0)
    assert counted(llm, "vllm:prefix_cache_hits") > hits
    hits = counted(llm, "vllm:prefix_cache_hits")
    (done,) = ask(llm, [prompt], temperature=0, extra_args={"prefill": "exact"})
    assert counted(llm, "vllm:prefix_cache_hits") == hits
    assert prompts_read("exact", "exact") == exact + 1
    check_answers(folder, [prompt], [done.outputs[0]])


def test_a_request_for_less_gets_what_the_server_gives(llm: Any):
    (prompt,) = ragged_prompts(2, seed=31)[1:]
    before = prompts_read("converged", "sweeps"), prompts_read("fast", "sweeps")
    ask(llm, [prompt], temperature=0, extra_args={"prefill": "fast"})
    assert (prompts_read("converged", "sweeps"), prompts_read("fast", "sweeps")) == (before[0] + 1, before[1])


def test_an_unknown_mode_is_refused_and_nobody_else_disturbed(llm: Any):
    with pytest.raises(VLLMValidationError, match="prefill is 'exakt'; choose one of exact, converged, fast"):
        ask(llm, [LONG], extra_args={"prefill": "exakt"})
    assert len(ask(llm, [LONG], temperature=0)[0].outputs[0].token_ids) == NEW


def test_scores_of_a_prompt_are_true(folder: Path, llm: Any):
    (done,) = ask(llm, [LONG], temperature=0, prompt_logprobs=0, max_tokens=1)
    from support.vllm_engine import true_logits

    (logits,) = true_logits(folder, [LONG])
    own = logits[:-1].log_softmax(-1).gather(1, torch.tensor(LONG[1:])[:, None])[:, 0]
    given = torch.tensor([step[token].logprob for step, token in zip(done.prompt_logprobs[1:], LONG[1:], strict=True)])
    assert (given - own).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("fields", "changes", "sentence"),
    [
        ({"heads": 4}, {}, "the head size is 16; vLLM's attention kernel here has 32, "),
        ({"loops": 2}, {}, "loops is 2; an LRT inside vLLM takes 1: lrt serve takes loops"),
        ({}, {"hf_overrides": {"prefill": "one_sweep"}}, "prefill is one_sweep; an LRT inside vLLM takes exact, "),
    ],
)
def test_what_is_not_served_is_refused_at_load(
    fields: dict[str, Any], changes: dict[str, Any], sentence: str, tmp_path: Path
):
    folder = exported(tmp_path, "shared", context=CONTEXT, **fields)
    with pytest.raises(ValueError, match=sentence), engine(folder, **changes):
        pass
