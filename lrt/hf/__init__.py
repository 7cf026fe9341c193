"""lrt for transformers: importing this registers `LRTConfig` and `LRTForCausalLM` with its Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from lrt.hf.configuration import LRTConfig
from lrt.hf.modeling import LRTForCausalLM

AutoConfig.register(LRTConfig.model_type, LRTConfig)
AutoModelForCausalLM.register(LRTConfig, LRTForCausalLM)

__all__ = ["LRTConfig", "LRTForCausalLM"]
