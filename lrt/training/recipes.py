"""Reproducible runs: one function per recipe, each giving a RunConfig, and how to make two runs comparable."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

from lrt.model.config import ModelConfig
from lrt.model.memory_config import MemoryConfig
from lrt.schedules import library as schedules
from lrt.training.config import RunConfig
from lrt.training.optim_config import OptimConfig

CONTEXT = 256
"""The demo's, in tokens."""
DEMO_TOKENS = 560_000
"""The demo's horizon: what two CPU cores train, three times, in about six minutes."""


def recommended_memory(layers: int) -> MemoryConfig:
    """The memory that scored best live so far (docs/log.md): the previous embedding and the final state as channels,
    with projections of each layer's own."""
    return MemoryConfig(projection="layerwise", source=(0, layers), combine="channels", initial="embedding")


def late_memory(layers: int) -> MemoryConfig:
    """The memory of an LRT that is its control until recurrence is switched on: two channels of the previous embedding,
    and one of the layer at three quarters of the depth, which enters from that block on and starts neutral. A free pass
    then costs one block."""
    every, source = tuple(range(1, layers + 1)), max(1, round(0.75 * layers))
    return MemoryConfig(
        projection="layerwise",
        source=(0, 0, source),
        combine="channels",
        layers=(every, every, every[source - 1 :]),
        state_start="neutral",
    )


def families(layers: int) -> dict[str, tuple[MemoryConfig, str]]:
    """The three that are compared: memory and training schedule of each. docs/log.md says how they were chosen."""
    return {
        "transformer": (MemoryConfig(injection="none"), "plain()"),
        "token_shift": (MemoryConfig(source=0), "plain()"),
        "lrt": (recommended_memory(layers), schedules.DEFAULT),
    }


FAMILIES = families(4)
"""Those of the demo's depth."""


def match_parameters(config: ModelConfig, parameters: int) -> ModelConfig:
    """`config` with the MLP width, a multiple of 8 if that is near enough, that brings its total to `parameters`.

    Raises ValueError where 0.5 % (contract, section 5) cannot be met: the model is already larger, or too coarse.
    """
    from lrt.model.size import count_parameters  # loads torch

    def total(mlp_width: int) -> int:
        return count_parameters(dataclasses.replace(config, mlp_width=mlp_width))[0]

    # The MLP has two matrices per block, so that the total is linear in the width: one point and the slope are enough.
    base, per_unit = total(8), 2 * config.depth * config.width
    exact = 8 + (parameters - base) / per_unit
    for unit in (8, 1):
        width = max(1, round(exact / unit) * unit)
        if abs(total(width) - parameters) <= 0.005 * parameters:
            return dataclasses.replace(config, mlp_width=width)
    raise ValueError(
        f"no MLP width brings this model of {total(config.mlp_dim)} parameters within 0.5 % of {parameters}"
    )


DEMO_MLP = {"transformer": 768, "token_shift": 736, "lrt": 512}
"""Widths that give the demo's models equal parameters, as `match_parameters` has them. Embedding and head are the same
in all three, so these hold for every vocabulary. Written down, as counting would load torch for `lrt train --help`."""


def demo_models(vocab_size: int) -> dict[str, ModelConfig]:
    """The demo's three models: equal depth, width and context, MLPs widened to the largest one's parameters."""
    return {
        name: ModelConfig(vocab_size=vocab_size, context=CONTEXT, mlp_width=DEMO_MLP[name], memory=memory)
        for name, (memory, _) in FAMILIES.items()
    }


DEMO_OPTIM = OptimConfig(
    matrix_lr=0.02, embedding_lr=0.2, head_lr=0.01, scalar_lr=0.02, momentum_steps=100, reference_batch=2048
)
"""Rates at the demo's own batch of 2048 tokens, so that nothing scales them with it."""


def demo_recipe(family: str, vocab_size: int = 2048, tokens: int = DEMO_TOKENS, seed: int = 0) -> RunConfig:
    """One of the demo's runs: 4 layers, width 128, context 256, 2048 tokens a step. ValueError if it is unknown."""
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")
    return RunConfig(
        model=demo_models(vocab_size)[family],
        optim=DEMO_OPTIM,
        schedule=FAMILIES[family][1],
        batch_size=8,
        horizon=f"tokens={tokens}",
        seed=seed,
    )


LADDER = (2, 4, 6, 8, 12, 16, 20, 24)
"""Depths with a recipe: 2 to 6 for CPUs, 20 and 24 the paper's."""
PUBLISHED_BATCH = 524288
"""Tokens per step of the published runs, where their rates hold."""


def batch_tokens(layers: int) -> int:
    """Tokens per step: the published 524288 from 12 layers on; below, with the cube of the depth, as a power of two.

    Tokens at a fixed ratio grow with the cube of the depth too, so that every rung takes a few thousand steps.
    """
    scaled = PUBLISHED_BATCH * min(1.0, (layers / 12) ** 3)
    return max(4096, 2 ** math.floor(math.log2(scaled)))


def depth_recipe(layers: int, family: str = "lrt") -> RunConfig:
    """A rung of the ladder: `layers` blocks of width 64 · layers, value embeddings everywhere, the published rates.

    Published (spec, sections 1 and 3; nanochat): Muon 0.02 with momentum 0.85 to 0.95 over 300 steps, embeddings 0.3
    and head 0.004 times (width / 768)^-0.5, batch 524288 with square-root scaling of the rates, weight decay
    0.2 · (12 / depth)² falling to zero, no warm-up, a linear warm-down over the last half; 10 tokens per parameter.
    """
    memory, schedule = {**families(layers), "late": (late_memory(layers), schedules.LATE)}[family]
    context, batch = 512 if layers <= 6 else 2048, batch_tokens(layers)
    model = ModelConfig.from_depth(layers, context=context, value_embeddings="all", memory=memory)
    rows = batch // context
    # Square-root scaling over a factor of 128 leaves the rates of d2 far too low, of d4 likely so (docs/log.md).
    reference = min(PUBLISHED_BATCH, 8 * batch)
    return RunConfig(
        model=model,
        optim=OptimConfig(weight_decay=0.2 * (12 / layers) ** 2, reference_batch=reference),
        schedule=schedule,
        batch_size=rows,
        device_batch=min(rows, 8 if layers >= 20 else 16),
        precision="float32" if layers <= 6 else "bfloat16",
        horizon="ratio=10",
    )


SUFFIXES = {"": "lrt", "-late": "late", "-transformer": "transformer", "-token-shift": "token_shift"}
"""Ending of a rung's name -> what is trained."""
RECIPES: dict[str, Callable[[], RunConfig]] = {
    "demo-transformer": partial(demo_recipe, "transformer"),
    "demo-token-shift": partial(demo_recipe, "token_shift"),
    "demo-lrt": partial(demo_recipe, "lrt"),
    **{
        f"d{layers}{suffix}": partial(depth_recipe, layers, family)
        for layers in LADDER
        for suffix, family in SUFFIXES.items()
    },
}

SIZES = {
    2: "1.6 M parameters, 7.9 M tokens, 5.9e13 FLOPs",
    4: "7.3 M parameters, 47 M tokens, 2.2e15 FLOPs",
    6: "20 M parameters, 150 M tokens, 2.1e16 FLOPs",
    8: "44 M parameters, 347 M tokens, 1.3e17 FLOPs",
    12: "135 M parameters, 1,151 M tokens, 1.4e18 FLOPs",
    16: "307 M parameters, 2,711 M tokens, 7.4e18 FLOPs",
    20: "583 M parameters, 5,280 M tokens, 2.8e19 FLOPs",
    24: "990 M parameters, 9,109 M tokens, 8.1e19 FLOPs",
}
"""Of the rungs' LRTs, with a vocabulary of 2,048. Written down for `lrt train --help`, as counting would load torch."""
DESCRIPTIONS = {
    **{f"demo-{name}": f"{what} of `lrt demo`: 4 layers of 128, 1.6 M parameters, 0.56 M tokens" for name, what in (
        ("transformer", "the Transformer"), ("token-shift", "token shift"), ("lrt", "the LRT"),
    )},
    **{f"d{layers}": f"an LRT, {layers} layers of {64 * layers}: {size}" for layers, size in SIZES.items()},
    **{f"d{layers}-late": f"d{layers}, recurrent for the last tenth of the training" for layers in LADDER},
    **{f"d{layers}-transformer": f"d{layers} without memory: a Transformer" for layers in LADDER},
    **{f"d{layers}-token-shift": f"d{layers} that remembers the previous embedding alone" for layers in LADDER},
}  # fmt: skip
"""What each recipe is, in a line."""
