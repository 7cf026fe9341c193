# pyright: reportMissingImports=false
"""LRT inside vLLM: a plugin (entry point `vllm.general_plugins`) that serves exported folders with true recurrence.

`model.py` is the class that vLLM runs; the model in it is lrt's own, over a State of vLLM's pages (`paged_state.py`).
"""

from __future__ import annotations

ARCHITECTURE = "LRTForCausalLM"
"""What config.json of an exported folder names."""


def register() -> None:
    """Make vLLM know exported LRTs. vLLM calls it in each of its processes; twice is as good as once."""
    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry

    from lrt.integrations.hf.configuration import LRTConfig

    AutoConfig.register(LRTConfig.model_type, LRTConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "lrt.integrations.vllm.model:LRTForCausalLM")
