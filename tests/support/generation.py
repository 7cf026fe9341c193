"""The models that every way to generate is tested on."""

from __future__ import annotations

from typing import Any

import pytest

from lrt import MemoryConfig, ModelConfig

V, CONTEXT = 31, 16


def configuration(**fields: Any) -> ModelConfig:
    memory = fields.pop("memory", MemoryConfig())
    return ModelConfig(
        **{"depth": 2, "width": 12, "heads": 2, "vocab_size": V, "context": CONTEXT, "mlp_width": 20, **fields},
        memory=memory,
    )


CONFIGS = {
    "both": configuration(),
    "none": configuration(memory=MemoryConfig(injection="none")),
    "channels": configuration(
        memory=MemoryConfig(source=(0, 2), combine="channels", initial="embedding", delay=2), value_embeddings="all"
    ),
    "windows": configuration(window_pattern="SL", window=3, kv_heads=1, memory=MemoryConfig(source=1)),
    "delays": configuration(memory=MemoryConfig(source=(0, 0, 2, 2), combine="channels", delay=(1, 3, 1, 2))),
    "sliding": configuration(window_pattern="S", window=3, memory=MemoryConfig(projection="layerwise")),
}
every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
