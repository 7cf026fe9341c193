"""Reproducible runs: one function per recipe, each giving a RunConfig, and how to make two runs comparable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from lrt.config import MemoryConfig, ModelConfig, require
from lrt.model.flops import count_parameters
from lrt.optim import OptimConfig
from lrt.trainer import RunConfig

CONTEXT = 256
DEMO_TOKENS = 800_000
"""The demo's horizon: what two CPU cores train, three times, in about five minutes."""
SETTLED = "settled(1, 1, 1)"


def recommended(layers: int) -> MemoryConfig:
    """The memory that scored best live so far (docs/log.md): the previous embedding and the final state as channels."""
    return MemoryConfig(source=(0, layers), combine="channels", initial="embedding")


FAMILIES = {
    "transformer": (MemoryConfig(injection="none"), "plain()"),
    "token_shift": (MemoryConfig(source=0), "plain()"),
    "lrt": (recommended(4), SETTLED),
}
"""The demo's models: memory and training schedule of each. docs/log.md says how they were chosen."""


def matched(config: ModelConfig, parameters: int) -> ModelConfig:
    """`config` with the MLP width, a multiple of 8 if that is near enough, that brings its total to `parameters`.

    Raises ValueError where 0.5 % (contract, section 5) cannot be met: the model is already larger, or too coarse.
    """

    def total(mlp_width: int) -> int:
        return count_parameters(dataclasses.replace(config, mlp_width=mlp_width))[0]

    base, per_unit = total(8), 2 * config.depth * config.width
    exact = 8 + (parameters - base) / per_unit
    for unit in (8, 1):
        width = max(1, round(exact / unit) * unit)
        if abs(total(width) - parameters) <= 0.005 * parameters:
            return dataclasses.replace(config, mlp_width=width)
    raise ValueError(
        f"no MLP width brings this model of {total(config.mlp_dim)} parameters within 0.5 % of {parameters}"
    )


def demo_models(vocab_size: int) -> dict[str, ModelConfig]:
    """The demo's three models: equal depth, width and context, MLPs widened to the largest one's parameters."""
    models = {
        name: ModelConfig(vocab_size=vocab_size, context=CONTEXT, memory=memory)
        for name, (memory, _) in FAMILIES.items()
    }
    largest = max(count_parameters(model)[0] for model in models.values())
    return {name: matched(model, largest) for name, model in models.items()}


DEMO_OPTIM = OptimConfig(
    matrix_lr=0.02, embedding_lr=0.2, head_lr=0.01, scalar_lr=0.02, momentum_steps=100, reference_batch=2048
)


def demo(family: str, vocab_size: int = 2048, tokens: int = DEMO_TOKENS, seed: int = 0) -> RunConfig:
    """One of the demo's runs: 4 layers, width 128, context 256, 2048 tokens a step."""
    require(family in FAMILIES, f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")
    return RunConfig(
        model=demo_models(vocab_size)[family],
        optim=DEMO_OPTIM,
        schedule=FAMILIES[family][1],
        batch_size=8,
        tokens=tokens,
        seed=seed,
    )


def depth(layers: int) -> RunConfig:
    """The one dial: an LRT of `layers` blocks, width 64 per block, 20 tokens per block and head parameter."""
    model = ModelConfig.from_depth(layers, context=512, memory=recommended(layers))
    weights = 12 * layers * model.width**2 + model.vocab_size * model.width  # blocks and head
    return RunConfig(model=model, schedule=SETTLED, tokens=20 * weights)


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "demo-transformer": partial(demo, "transformer"),
    "demo-token-shift": partial(demo, "token_shift"),
    "demo-lrt": partial(demo, "lrt"),
    **{f"d{layers}": partial(depth, layers) for layers in (2, 4, 6, 8, 12)},
}
