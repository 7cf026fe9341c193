"""Models whose parameters are all random, every configuration they come in, and how numbers are compared."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, schedules
from lrt.schedules.base import Simple
from support.oracle import Weights, oracle

if TYPE_CHECKING:
    import pytest

# The largest difference allowed, relative to the norm of what is expected. Set once, not loosened.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
# Far above any rounding: what must differ, differs by more than this (relative to the norm).
VISIBLE = 1e-3
# Parameters with one row per token.
TABLES = ("embedding.weight", "value_embedding.table.weight")
BATCH = 2
LENGTH = 9  # odd, and a multiple of neither stride below
VOCABULARY = 31  # enough for BATCH rows without a repeated token: see `distinct_tokens`
# ---------------------------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------------------------

# Sources by name; "L" is the final state, whatever the depth.
SOURCES: dict[str, dict[str, Any]] = {
    "0": {"source": 0},
    "1": {"source": 1},
    "L": {"source": None},
    "(0,L)sum": {"source": (0, "L"), "combine": "sum"},
    "(0,L)channels": {"source": (0, "L"), "combine": "channels"},
    "(1,L)channels": {"source": (1, "L"), "combine": "channels"},
    "(0,0,L)channels": {"source": (0, 0, "L"), "combine": "channels"},
    "(0,0)channels": {"source": (0, 0), "combine": "channels"},
    "(L,1,0)sum": {"source": ("L", 1, 0), "combine": "sum"},
    "(L)sum": {"source": ("L",), "combine": "sum"},
}
CHOICES: dict[str, Sequence[Any]] = {
    "source": list(SOURCES),
    "injection": ["residual", "key_value", "both"],
    "projection": ["shared", "layerwise"],
    "initial": ["zeros", "embedding"],
    "delay": [1, 2],
    "layers": ["all", "some", "per source"],
    "depth": [2, 3],
    "head_size": [4, 8],
    "kv_heads": [None, 1],
    "value_embeddings": ["none", "alternate", "all"],
    "window_pattern": ["L", "S", "SL"],
}


def configuration(choice: dict[str, Any]) -> ModelConfig:
    """A tiny model from one value per entry of CHOICES; what is missing takes its first value."""
    chosen = {**{name: values[0] for name, values in CHOICES.items()}, **choice}
    depth = chosen["depth"]
    recalled = dict(SOURCES[chosen["source"]])
    if isinstance(recalled["source"], tuple):
        recalled["source"] = tuple(depth if s == "L" else s for s in recalled["source"])
    memory = MemoryConfig(
        **recalled,
        **{name: chosen[name] for name in ("injection", "projection", "initial", "delay")},
        layers=layers_of(chosen["layers"], recalled, depth),
    )
    return ModelConfig(
        width=12,
        heads=2,
        vocab_size=VOCABULARY,
        context=16,
        window=3,
        mlp_width=20,
        memory=memory,
        **{name: chosen[name] for name in ("depth", "head_size", "kv_heads", "value_embeddings", "window_pattern")},
    )


def layers_of(which: str, recalled: dict[str, Any], depth: int) -> Any:
    """What injects: all blocks, some of them, or other ones for each source, where each has a channel."""
    if which == "all":
        return None
    if which == "per source" and recalled.get("combine") == "channels":
        every = {0: tuple(range(1, depth + 1)), 1: (depth, 1)}
        return tuple(every.get(source, tuple(range(2, depth + 1))) for source in recalled["source"])
    return {2: (2,), 3: (3, 2)}[depth]


def pairwise(choices: dict[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """A short list of choices in which every value of every entry meets every value of every other (greedy)."""
    generator = random.Random(seed)
    names = list(choices)
    pairs = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in choices[a] for y in choices[b]}

    def covered(choice: dict[str, Any]) -> set[Any]:
        return set(itertools.combinations([(name, choice[name]) for name in names], 2)) & pairs

    chosen = []
    while pairs:
        candidates = [{name: generator.choice(choices[name]) for name in names} for _ in range(200)]
        best = max(candidates, key=lambda candidate: len(covered(candidate)))
        if found := covered(best):
            pairs -= found
            chosen.append(best)
    return chosen


def label(choice: dict[str, Any]) -> str:
    return "-".join(value if isinstance(value, str) else f"{name}={value}" for name, value in choice.items())


# One that pairs leave out: projections of their own in blocks that do not start with the first.
CORNER = {"injection": "both", "projection": "layerwise", "source": "L", "layers": "some", "depth": 3}
# Sources that are read at delays of their own, and what else each configuration is.
DELAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "convolution": (
        {"source": (0, 0, 0), "delay": (1, 2, 3), "combine": "channels", "projection": "layerwise"},
        {"value_embeddings": "alternate"},
    ),
    "convolution-sum": (
        {"source": (0, 0, 0), "delay": (3, 1, 2), "combine": "sum", "injection": "residual"},
        {"window_pattern": "S"},
    ),
    "(0,L)at(1,2)channels": (
        {"source": (0, 2), "delay": (1, 2), "combine": "channels", "injection": "key_value"},
        {"window_pattern": "SL"},
    ),
    "(0,0,L)at(3,1,2)layers": (
        {
            "source": (0, 0, 3),
            "delay": (3, 1, 2),
            "combine": "channels",
            "projection": "layerwise",
            "layers": ((1, 3), (2,), (2, 3)),
        },
        {"depth": 3, "kv_heads": 1},
    ),
    "(L,L)at(1,3)channels": (
        {"source": (2, 2), "delay": (1, 3), "combine": "channels"},
        {"window_pattern": "S", "kv_heads": 1},
    ),
    "(L,1,L,0)at(3,2,1,1)sum": (
        {"source": (2, 1, 2, 0), "delay": (3, 2, 1, 1), "combine": "sum", "initial": "embedding"},
        {"value_embeddings": "all"},
    ),
}
EACH_DELAY = {
    f"delays-{name}": replace(configuration(model), memory=MemoryConfig(**memory))
    for name, (memory, model) in DELAYS.items()
}
# Every pair of values of any two choices, and the whole product of the four that say what the memory is.
PAIRWISE = {label(choice): configuration(choice) for choice in [CORNER, *pairwise(CHOICES)]}
PRODUCT_NAMES = ("injection", "projection", "source", "initial")
PRODUCT = {
    label(choice): configuration(choice)
    for values in itertools.product(*(CHOICES[name] for name in PRODUCT_NAMES))
    for choice in [dict(zip(PRODUCT_NAMES, values, strict=True))]
}
# Every number and choice other than its default.
UNUSUAL = ModelConfig(
    depth=3,
    width=20,
    heads=2,
    head_size=6,
    kv_heads=1,
    vocab_size=VOCABULARY,
    context=12,
    value_embeddings="alternate",
    window_pattern="SL",
    window=4,
    mlp_width=24,
    rope_base=37.0,
    softcap=2.5,
    skip_init=0.3,
    memory=MemoryConfig(source=(0, 2), combine="channels", delay=3, layers=(2, 3), residual_init=-0.2),
)
NONE = ModelConfig(depth=2, width=12, heads=2, vocab_size=VOCABULARY, context=16, memory=MemoryConfig(injection="none"))


def over(
    configs: dict[str, ModelConfig], step: int = 1, more: dict[str, ModelConfig] | None = None
) -> pytest.MarkDecorator:
    """Parametrise a test over every `step`-th configuration, and all of `more`."""
    import pytest  # here, as benchmarks use this file where it is not installed

    chosen = {**dict(list(configs.items())[::step]), **(more or {})}
    return pytest.mark.parametrize("config", list(chosen.values()), ids=list(chosen))


def exact_schedules(length: int) -> list[Simple]:
    """The schedules that reproduce the recurrence over `length` positions."""
    return [
        schedules.sequential(),
        schedules.interleaved(length),
        schedules.multi_refinement(length),
        schedules.strided(length, 1),
        schedules.settled(0, length, 1),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Models, tokens, comparisons
# ---------------------------------------------------------------------------------------------------------------------
@functools.cache
def random_model(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A model in which every parameter is random and matters. Shared by tests: none of them may change it."""
    model = LatentRecurrentTransformer(config).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(scaled(name, noise))
    return model.to(dtype).eval()


def scaled(name: str, noise: Tensor) -> Tensor:
    """Scales at which memory, attention and MLP all weigh about as much as the residual stream."""
    if name.endswith((".alpha", "recall.weights")):
        return 1 + 0.3 * noise
    if noise.dim() < 2 or name.endswith(TABLES):
        return noise  # β, γ, embeddings
    return 1.5 * noise / noise.shape[-1] ** 0.5


def weights_of(model: Any) -> Weights:
    return dict(model.named_parameters())


def random_tokens(batch: int = BATCH, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def documents_of(*rows: Sequence[int]) -> Tensor:
    """Document numbers (B, T) from the documents' lengths, row by row."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def unaligned() -> Tensor:
    return documents_of((1, 5, 3), (3, 2, 1, 3))


def oracle_rows(model: Any, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
    """The oracle over a batch, (B, T, D)."""
    weights, config = weights_of(model), model.config
    rows = range(len(tokens))
    return torch.stack([oracle(weights, config, tokens[b], None if documents is None else documents[b]) for b in rows])


def decode(model: Any, tokens: Tensor, state: Any, start: int = 0) -> Tensor:
    """Position by position, as a user generates: hidden (B, T - start, D)."""
    hidden = []
    for t in range(start, tokens.shape[1]):
        h, state = model(tokens[:, t : t + 1], range(t, t + 1), state)
        hidden.append(h)
    return torch.cat(hidden, dim=1)


def difference(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected; 0 where both vanish."""
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))


def assert_same(actual: Tensor, expected: Tensor, what: str = "") -> None:
    found, allowed = difference(actual.detach(), expected.detach().to(actual.dtype)), TOLERANCE[actual.dtype]
    assert found <= allowed, f"{what}: differs by {found:.3g} of its norm, allowed {allowed:.0e}"


def assert_differs(actual: Tensor, other: Tensor, what: str = "") -> None:
    found = difference(actual.detach(), other.detach())
    assert found > VISIBLE, f"{what}: differs by {found:.3g} only; the test would not notice an error"


def gradients(model: Any, hidden: Tensor) -> dict[str, Tensor]:
    """The gradient of a fixed random function of `hidden` for every parameter of the model; zeros where none flows."""
    weights = weights_of(model)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    loss = (hidden * direction.to(hidden)).sum()
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {
        name: torch.zeros_like(weight) if g is None else g
        for (name, weight), g in zip(weights.items(), found, strict=True)
    }


def gradient_differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of every parameter, on the scale of the largest: a gradient that ought to vanish has no norm."""
    scale = max(g.norm() for g in expected.values())
    return {name: float((actual[name] - g).norm() / max(g.norm(), 1e-3 * scale)) for name, g in expected.items()}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> None:
    for name, differs in gradient_differences(actual, expected).items():
        allowed = TOLERANCE[expected[name].dtype]
        assert differs <= allowed, f"{what}: the gradient of {name} differs by {differs:.3g} of its norm"
