"""lrt: latent recurrence in transformers, exact wherever it runs.

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, refine, schedules

model = LatentRecurrentTransformer(ModelConfig(memory=MemoryConfig(injection="both")))
out = refine(model, tokens, schedules.interleaved(2))      # a training schedule
nats = score(model, tokens)                                # live: token by token, what a user gets
"""

from lrt import schedules
from lrt.checkpoint import load
from lrt.config import MemoryConfig, ModelConfig
from lrt.evaluate import score
from lrt.generate import Sampling, generate
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.refine import refine

__all__ = [
    "LatentRecurrentTransformer",
    "MemoryConfig",
    "ModelConfig",
    "Sampling",
    "generate",
    "load",
    "refine",
    "schedules",
    "score",
]
