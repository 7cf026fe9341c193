"""lrt: latent recurrence in transformers, exact wherever it runs.

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, refine, schedules

model = LatentRecurrentTransformer(ModelConfig(memory=MemoryConfig(injection="both")))
out = refine(model, tokens, schedules.interleaved(2))      # a training schedule
nats = score(model, tokens)                                # live: token by token, what a user gets
"""

from lrt import schedules
from lrt.eval.scoring import score
from lrt.inference.generation import generate
from lrt.inference.sampling import Sampling
from lrt.model.checkpoint import load
from lrt.model.config import MemoryConfig, ModelConfig
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.refinement import refine

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
