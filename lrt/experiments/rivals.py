"""The families of the published comparisons, each as what it changes of a Transformer of the same size.

Loops and latent thoughts are two numbers of ModelConfig (`loops`, `thoughts`), so that State, schedules, live scores,
checkpoints and decoding serve them as they are. A loop is the blocks again, with caches of its own. A latent thought is
a position of the State that holds no token; every caller counts tokens. Doubling the sequence outside the model would
have made every caller know of it. What counts positions of the State itself (prefill, engine, sessions) refuses
thoughts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lrt.model.config import ModelConfig
from lrt.model.memory_config import MemoryConfig
from lrt.schedules import library as schedules
from lrt.training.recipes import late_memory, recommended_memory

CHUNK = 64
"""Tokens of a chunk of the paper's losing baseline."""


@dataclass(frozen=True)
class Rival:
    """A family of the published comparisons: what it changes of a Transformer of the same size, and how it trains."""

    changes: dict[str, Any]
    """Fields of ModelConfig."""
    schedule: str
    source: str
    """Where it is published."""

    def model(self, base: ModelConfig) -> ModelConfig:
        """`base`, whatever its memory, as this rival."""
        return dataclasses.replace(base, **{"memory": MemoryConfig(injection="none"), **self.changes})


JACOBI = (
    "mixture([(0.34, multi_refinement(1, (0, 1))), (0.33, multi_refinement(2, (0, 0, 1))), "
    "(0.33, multi_refinement(3, (0, 0, 0, 1)))])"
)
"""PonderLM-2's: 1 to 3 Jacobi iterations, drawn per step, and the loss on the last."""


def rivals(layers: int) -> dict[str, Rival]:
    """Everything that the LRT is compared with, and its own variants (the study `rivals`).

    T²MLR's recurrence is that of one middle block, read from an upper-middle layer: its gate is ours, and the rest of
    its block is not rebuilt. The loops add the embedding again in every block, as all models here do.

    The short convolution is local mixing without recurrence: keys, values and the residual stream of every block get
    the three previous tokens' embeddings, each with γ, gates and projections of its own. It is not Canon: those layers
    mix the hidden states of every layer, with one learned weight per channel and place, so that what they mix reaches
    further with depth. Here embeddings are mixed, three tokens back in every layer.
    """
    upper, middle = max(1, round(0.75 * layers)), max(1, layers // 2)
    lrt, thought = "2605.26797", "PonderLM-2, 2509.23184"  # numbers of arXiv
    twice, best = MemoryConfig(source=(0, 0), combine="channels"), recommended_memory(layers)
    convolution = MemoryConfig(source=(0, 0, 0), combine="channels", delay=(1, 2, 3), projection="layerwise")
    return {
        "transformer": Rival({}, "plain()", "nanochat"),
        "token shift": Rival({"memory": MemoryConfig(source=0)}, "plain()", "control: the previous embedding"),
        "token shift, 2 channels": Rival({"memory": twice}, "plain()", "control: as many projections, shared"),
        "token shift, 2 channels, layerwise": Rival(
            {"memory": dataclasses.replace(twice, projection="layerwise")}, "plain()", "control: as many projections"
        ),
        "short convolution, width 4": Rival(
            {"memory": convolution},
            "plain()",
            "control: the three previous embeddings, after Canon layers (Physics of Language Models 4.1, 2512.17351)",
        ),
        "loop 2": Rival({"loops": 2}, "plain()", "ALBERT, 1909.11942, as in " + thought),
        "loop 3": Rival({"loops": 3}, "plain()", "ALBERT, 1909.11942, as in " + thought),
        "ponder": Rival({"thoughts": 1}, JACOBI, thought),
        "middle recurrence": Rival(
            {"memory": MemoryConfig(source=upper, layers=(middle,))}, schedules.DEFAULT, "after T²MLR, 2607.15178"
        ),
        "chunked": Rival({"memory": MemoryConfig()}, f"chunked({CHUNK})", lrt),
        "shared": Rival({"memory": MemoryConfig()}, "interleaved(2)", lrt),
        "layerwise": Rival({"memory": MemoryConfig(projection="layerwise")}, "interleaved(2)", lrt),
        "recommended, shared": Rival(
            {"memory": dataclasses.replace(best, projection="shared")}, schedules.DEFAULT, "docs/log.md"
        ),
        "recommended": Rival({"memory": best}, schedules.DEFAULT, "docs/log.md"),
        "late": Rival({"memory": late_memory(layers)}, schedules.LATE, "docs/log.md"),
    }
