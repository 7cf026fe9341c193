"""LRTConfig: a ModelConfig and how it was trained, as transformers stores it (config.json)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from lrt.inference.prefill import PREFILL_MODES
from lrt.model.config import ModelConfig
from lrt.model.memory_config import MODEL_KINDS
from lrt.schedules.parse import parse_saved
from lrt.utils import plugins as loaded

SCORING = ("auto", "schedule", "live")
"""By what `eval()` computes a call without a cache."""


def check_scoring(scoring: str) -> None:
    """ValueError where it is none of `SCORING`."""
    if scoring not in SCORING:
        raise ValueError(f"unknown scoring {scoring!r}; choose one of {', '.join(SCORING)}")


class LRTConfig(PreTrainedConfig):
    """Configuration of an `LRTForCausalLM`."""

    model_type = "lrt"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "last_hidden_state"]  # noqa: RUF012 (their convention)

    def __init__(
        self,
        architecture: dict[str, Any] | None = None,
        schedule: str = "plain()",
        prefill: str = "converged",
        plugins: list[dict[str, Any]] | None = None,
        scoring: str = "auto",
        **kwargs: Any,
    ) -> None:
        """`architecture` is `ModelConfig.to_dict()` (None: its defaults); the rest of a model's shape follows from it.

        schedule: the training schedule. prefill: how prompts and whole texts are read, one of "exact", "converged",
        "fast", "one_sweep" (lrt.inference.prefill). plugins: what a user's own parts come from
        (`lrt.utils.plugins.describe`). scoring: what a call without a cache runs. "live": true recurrence, in `train()`
        too; "schedule": the training schedule; "auto": in `train()` the schedule, in `eval()` live where the model is
        called, and the schedule where `base_model` is, as TRL does for its losses. generate() is live whatever it says.
        ValueError on an unknown one, and where a part's plugin is not loaded; only the schedule's may be missing until
        it is run.
        """
        loaded.require(plugins or (), MODEL_KINDS)
        model = ModelConfig.from_dict(architecture or {})
        parse_saved(schedule)
        if prefill not in PREFILL_MODES:
            raise ValueError(f"unknown prefill {prefill!r}; choose one of {', '.join(PREFILL_MODES)}")
        check_scoring(scoring)
        self.architecture = model.to_dict()
        self.scoring = scoring
        self.schedule = schedule
        self.prefill = prefill
        self.plugins = plugins or []
        # What transformers and the tools around it ask of a config, under their names: derived, so never read back.
        self.vocab_size = model.vocab_size
        self.hidden_size = model.width
        self.intermediate_size = model.mlp_dim
        self.num_hidden_layers = model.kv_layers
        self.num_attention_heads = model.heads
        self.num_key_value_heads = model.num_kv_heads
        self.head_dim = model.head_dim
        self.max_position_embeddings = model.context
        self.final_logit_softcapping = model.softcap
        derived = {
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "final_logit_softcapping",
        }  # fmt: skip
        kwargs = {name: value for name, value in kwargs.items() if name not in derived}
        self.use_cache = kwargs.pop("use_cache", True)
        self.bos_token_id = kwargs.pop("bos_token_id", None)
        self.eos_token_id = kwargs.pop("eos_token_id", None)
        self.pad_token_id = kwargs.pop("pad_token_id", None)
        super().__init__(**{"tie_word_embeddings": False, **kwargs})

    @property
    def model(self) -> ModelConfig:
        """The model's own configuration."""
        return ModelConfig.from_dict(self.architecture)
