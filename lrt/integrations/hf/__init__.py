"""lrt for transformers: importing this registers `LRTConfig` and `LRTForCausalLM` with its Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from lrt.integrations.hf.configuration import LRTConfig
from lrt.integrations.hf.modeling import LRTForCausalLM

AutoConfig.register(LRTConfig.model_type, LRTConfig)
AutoModelForCausalLM.register(LRTConfig, LRTForCausalLM)
__all__ = ["LRTConfig", "LRTForCausalLM"]
