"""What an LRT inside vLLM refuses, and how a request asks; without vLLM, by settings that look like its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lrt import MemoryConfig, ModelConfig
from lrt.integrations.vllm.modes import MODES, asked_mode, more_exact
from lrt.integrations.vllm.refusals import REFUSALS, check, check_head_size


def settings(**changes: Any) -> Any:
    """A `VllmConfig` with all that is looked at."""
    plain = {
        "prefill": "converged",
        "quantization": None,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "cache_dtype": "auto",
        "lora_config": None,
        "speculative_config": None,
        "kv_transfer_config": None,
    } | changes
    part = SimpleNamespace(**plain)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=part, quantization=part.quantization),
        parallel_config=part,
        cache_config=part,
        lora_config=part.lora_config,
        speculative_config=part.speculative_config,
        kv_transfer_config=part.kv_transfer_config,
    )


PLAIN = ModelConfig()
REFUSED: dict[str, tuple[ModelConfig, Any]] = {
    "thoughts": (ModelConfig(thoughts=1, memory=MemoryConfig(injection="none")), settings()),
    "loops": (ModelConfig(loops=2), settings()),
    "prefill": (PLAIN, settings(prefill="one_sweep")),
    "pipeline_parallel_size": (PLAIN, settings(pipeline_parallel_size=2)),
    "decode_context_parallel_size": (PLAIN, settings(decode_context_parallel_size=2)),
    "kv_cache_dtype": (PLAIN, settings(cache_dtype="fp8")),
    "quantization": (PLAIN, settings(quantization="gptq")),
    "enable_lora": (PLAIN, settings(lora_config=object())),
    "the method of speculative_config": (PLAIN, settings(speculative_config=SimpleNamespace(method="ngram"))),
    "kv_transfer_config": (PLAIN, settings(kv_transfer_config=object())),
}


def test_a_plain_model_is_served():
    check(PLAIN, settings())


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_named_with_value_and_fix(name: str):
    (refusal,) = (refusal for refusal in REFUSALS if refusal.name == name)
    config, changed = REFUSED[name]
    with pytest.raises(ValueError, match=rf"^{name} is .*; an LRT inside vLLM takes .*: ") as raised:
        check(config, changed)
    assert str(raised.value).endswith(refusal.fix)


def test_every_refusal_is_tried():
    assert {refusal.name for refusal in REFUSALS} - {*REFUSED} == {"memory.injection with tensor_parallel_size above 1"}


def test_the_kernel_says_which_head_sizes_there_are():
    check_head_size(PLAIN, ())
    check_head_size(PLAIN, (32, 64))
    with pytest.raises(ValueError, match="the head size is 64; vLLM's attention kernel here has 32, 128: "):
        check_head_size(PLAIN, (32, 128))


def test_the_more_exact_mode_counts():
    assert [more_exact("converged", asked) for asked in (None, *MODES)] == ["converged", "exact", *["converged"] * 2]
    assert asked_mode(None) is asked_mode({}) is asked_mode({"other": 1}) is None
    for wrong in ("one_sweep", "exakt", 1, ["exact"]):
        with pytest.raises(ValueError, match=r"vllm_xargs: prefill is .*; choose one of exact, converged, fast"):
            asked_mode({"prefill": wrong})
