"""lrt: latent recurrence in transformers, exact wherever it runs."""

from lrt import schedules
from lrt.config import MemoryConfig, ModelConfig
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.refine import refine

__all__ = ["LatentRecurrentTransformer", "MemoryConfig", "ModelConfig", "refine", "schedules"]
