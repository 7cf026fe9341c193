"""Add a latent recurrent pathway to a pretrained decoder."""

from __future__ import annotations

from typing import Any

from lrt.integrations.retrofit.configuration import MODEL_TYPE, check_base, config_class
from lrt.integrations.retrofit.modeling import model_class
from lrt.integrations.retrofit.pathway import attach
from lrt.integrations.retrofit.pathway_config import PathwayConfig
from lrt.schedules.parse import parse


def retrofit(model: Any, **pathway: Any) -> Any:
    """Add a latent recurrent pathway to `model`, a decoder of transformers, in place. Returns the model.

    pathway: the fields of `PathwayConfig`, such as source=(0, 12) or layers=(7, 8, 9). The model computes what it did,
    bit for bit, until the pathway is trained (LRT, arXiv 2605.26797, section 3); `model.detach()` takes it away again.
    ValueError, naming what is wrong, for a model that cannot have one.
    """
    config = model.config
    about = pathway_of(config, pathway)
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        raise ValueError(f"the model lies on {', '.join(devices)}; a pathway needs all of it on one device")
    base_type = config.model_type
    config.base_model_type, config.latent_memory = base_type, about.to_dict()
    config.__class__, model.__class__ = config_class(base_type), model_class(base_type)
    attach(model)
    return model


def pathway_of(config: Any, fields: dict[str, Any]) -> PathwayConfig:
    """The pathway of these fields. ValueError where a decoder of this configuration cannot have it."""
    if config.model_type == MODEL_TYPE:
        raise ValueError("this model has a pathway already; take it away first (model.detach()), or train it on")
    check_base(config.model_type)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "this model is quantised; add the pathway to its original weights, train, and quantise what comes of it"
        )
    about = PathwayConfig(**fields)
    about.sources(config.num_hidden_layers)
    about.readers(config.num_hidden_layers)
    parse(about.schedule)
    return about
