"""The fingerprint of a model: a hash of its configuration and weights.

A session or a calibration belongs to one model and names it so. It is used for no other.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from lrt.model.config import ModelConfig
from lrt.model.transformer import LatentRecurrentTransformer

HASHED_ALWAYS = frozenset({
    "depth", "width", "heads", "kv_heads", "head_size", "vocab_size", "context", "value_embeddings", "window_pattern",
    "window", "mlp_ratio", "mlp_width", "rope_base", "softcap", "skip_init", "memory", "loops", "thoughts",
})  # fmt: skip
"""ModelConfig's fields in version 0.1.0, which a fingerprint names always. This list never changes."""
MEMORY_HASHED_ALWAYS = frozenset({
    "injection", "projection", "source", "combine", "initial", "delay", "layers", "residual_init"
})  # fmt: skip
"""MemoryConfig's, likewise."""


def hashed_fields(config: ModelConfig) -> dict[str, Any]:
    """What a fingerprint names of a configuration: 0.1.0's fields, and later ones that are not at their default.

    So a field that a version adds leaves the fingerprints of the models that do not use it as they were, and with them
    the sessions and calibrations that name one.
    """
    fields, defaults = config.to_dict(), type(config)().to_dict()
    memory, memory_defaults = fields["memory"], defaults["memory"]
    fields["memory"] = {k: v for k, v in memory.items() if k in MEMORY_HASHED_ALWAYS or v != memory_defaults[k]}
    return {k: v for k, v in fields.items() if k in HASHED_ALWAYS or v != defaults[k]}


def fingerprint(model: LatentRecurrentTransformer) -> str:
    """SHA-256 of a model's configuration and weights, types included: what a state or a calibration belongs to."""
    digest = hashlib.sha256(json.dumps(hashed_fields(model.config), sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(memoryview(weight.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()
