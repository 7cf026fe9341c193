"""What is not served, refused when a model is loaded: one table, a sentence for each."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from lrt.integrations.vllm.modes import MODES
from lrt.model.config import ModelConfig
from lrt.model.memory_config import OWN_INJECTIONS


@dataclass(frozen=True)
class Refusal:
    """A setting of the model, or of vLLM, and what of it is served."""

    name: str
    """As the user knows it."""
    value: Callable[[ModelConfig, Any], object]
    """Of a model and a `VllmConfig`."""
    served: Collection[object]
    fix: str


def draft(settings: Any) -> str | None:
    """How vLLM is to speculate."""
    return None if settings.speculative_config is None else str(settings.speculative_config.method)


def injection_in_parallel(config: ModelConfig, settings: Any) -> str:
    """A plugin's injection matters only where models are cut."""
    return config.memory.injection if settings.parallel_config.tensor_parallel_size > 1 else "none"


REFUSALS = (
    Refusal("thoughts", lambda m, v: m.thoughts, (0,), "lrt generate decodes latent thoughts"),
    Refusal("loops", lambda m, v: m.loops, (1,), "lrt serve takes loops"),
    Refusal(
        "prefill",
        lambda m, v: v.model_config.hf_config.prefill,
        MODES,
        'give --hf-overrides \'{"prefill": "converged"}\'',
    ),
    Refusal(
        "pipeline_parallel_size",
        lambda m, v: v.parallel_config.pipeline_parallel_size,
        (1,),
        "the first block needs the memory of the last one at every token; use --tensor-parallel-size, or replicas",
    ),
    Refusal(
        "decode_context_parallel_size",
        lambda m, v: v.parallel_config.decode_context_parallel_size,
        (1,),
        "a position reads the memory of the one before, on whatever device that lies; leave it out",
    ),
    Refusal(
        "kv_cache_dtype",
        lambda m, v: v.cache_config.cache_dtype,
        ("auto", "float32", "bfloat16", "float16"),
        "the memory is never quantised, and keys beside it were not tried; leave --kv-cache-dtype out",
    ),
    Refusal(
        "quantization",
        lambda m, v: v.model_config.quantization,
        (None,),
        "lrt's own layers are not quantised; serve the weights as they are",
    ),
    Refusal(
        "enable_lora",
        lambda m, v: v.lora_config is not None,
        (False,),
        "vLLM puts adapters around layers of its own, and the model's are lrt's; merge them, and export that",
    ),
    Refusal(
        "the method of speculative_config",
        lambda m, v: draft(v),
        (None,),
        "it was not tried (on vLLM's CPU distribution n-grams hang with any model); leave it out",
    ),
    Refusal(
        "kv_transfer_config",
        lambda m, v: v.kv_transfer_config is not None,
        (False,),
        "moving pages between engines was not tried; leave it out",
    ),
    Refusal(
        "memory.injection with tensor_parallel_size above 1",
        injection_in_parallel,
        OWN_INJECTIONS,
        "how a plugin's parameters are cut is not known; serve it on one device",
    ),
)


def check(config: ModelConfig, settings: Any) -> None:
    """ValueError for what is not served, with the value, what is served, and the fix. settings: a `VllmConfig`."""
    for refusal in REFUSALS:
        value = refusal.value(config, settings)
        if value not in refusal.served:
            served = ", ".join(map(str, refusal.served))
            raise ValueError(f"{refusal.name} is {value}; an LRT inside vLLM takes {served}: {refusal.fix}")


def check_head_size(config: ModelConfig, sizes: Collection[int]) -> None:
    """ValueError where the attention kernel has sizes, and not this one; none means all."""
    if sizes and config.head_dim not in sizes:
        served = ", ".join(map(str, sizes))
        raise ValueError(
            f"the head size is {config.head_dim}; vLLM's attention kernel here has {served}: train a model with one of "
            "these (ModelConfig.head_size), or use lrt serve, which takes any"
        )
