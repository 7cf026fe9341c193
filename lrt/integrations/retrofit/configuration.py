"""RetrofitConfig: the configuration of a decoder of transformers, and of the pathway that was added to it.

The configuration of a retrofitted Llama is a LlamaConfig in all but its `model_type`: the decoder's code reads it as
its own. So there is one class per decoder, made when it is needed (`config_class`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lrt.integrations.retrofit.architectures import ARCHITECTURES
from lrt.integrations.retrofit.pathway_config import PathwayConfig

MODEL_TYPE = "lrt_retrofit"
WHEN_READ: list[Callable[[str], object]] = []
"""What is called with the decoder's model type when a configuration is read; nothing where this code comes from a
folder, whose config.json names the model's class."""


class Retrofitted:
    """What is in front of a decoder's configuration."""

    model_type = MODEL_TYPE
    _auto_class: str | None = None
    base_model_type: str
    """The decoder's own model type."""
    latent_memory: dict[str, Any]
    """`PathwayConfig.to_dict()`."""

    @property
    def pathway(self) -> PathwayConfig:
        """The pathway's own configuration."""
        return PathwayConfig(**self.latent_memory)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration from config.json. ValueError where it names no decoder that is known."""
        base_type = check_base(config_dict.get("base_model_type"))
        made = config_class(base_type)
        for call in WHEN_READ:
            call(base_type)
        return made.from_dict(config_dict, **kwargs) if cls is not made else super().from_dict(config_dict, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


class RetrofitConfig(Retrofitted, PreTrainedConfig):
    """What config.json names: reading it gives the class of the decoder that it is of."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """Note that the class comes from a folder, whose code is to be saved along: of all decoders' classes."""
        Retrofitted._auto_class = auto_class if isinstance(auto_class, str) else auto_class.__name__


def check_base(model_type: str | None) -> str:
    """The model type of a decoder that can be retrofitted. ValueError, naming those, where it is none."""
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"models of type {model_type!r} cannot be retrofitted: how they make keys and values is not known; those "
            f"that can: {', '.join(ARCHITECTURES)}"
        )
    return model_type


@functools.cache
def config_class(base_type: str) -> type[Any]:
    """The configuration of a retrofitted decoder of this model type."""
    base = CONFIG_MAPPING[base_type]
    # Its name and module are those of the class in config.json, where save_pretrained writes what it finds here.
    return type(RetrofitConfig.__name__, (Retrofitted, base), {"__module__": __name__})
