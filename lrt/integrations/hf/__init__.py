"""lrt for transformers: importing this registers `LRTConfig` and `LRTForCausalLM` with its Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from lrt.integrations.hf.configuration import LRTConfig
from lrt.integrations.hf.modeling import LRTForCausalLM
from lrt.integrations.hf.schedule_callback import ScheduleCallback

AutoConfig.register(LRTConfig.model_type, LRTConfig)
AutoModelForCausalLM.register(LRTConfig, LRTForCausalLM)
__all__ = ["LRTConfig", "LRTForCausalLM", "ScheduleCallback"]
