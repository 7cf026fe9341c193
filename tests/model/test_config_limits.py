"""The limits of every field of a model: the limit itself is taken, the next number beyond it is a ValueError."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lrt import MemoryConfig, ModelConfig

CONFIG = ModelConfig(depth=3, width=24, heads=4, vocab_size=9, context=8)
LIMITS: dict[str, tuple[list[Any], list[Any]]] = {
    # field: what is taken, what is refused
    "depth": ([1], [0, -1, 1.5]),
    "width": ([8], [0, 2, 26]),  # four heads of an even size
    "heads": ([1, 12], [0, 5]),
    "vocab_size": ([1], [0]),
    "context": ([2], [0]),
    "loops": ([1, 2], [0, 1.0]),
    "kv_heads": ([1, 2, 4], [0, -1, 3, 5, 8]),
    "head_size": ([2, 4], [0, 1, 3, -2]),
    "window": ([1, 8], [0]),
    "window_pattern": (["S", "L", "SSL"], ["", "X", "SX"]),
    "mlp_width": ([1], [0]),
    "mlp_ratio": ([0.05], [0.04, 0.0]),  # of a width of 24: one, none
    "softcap": ([1e-3], [0.0, -1.0]),
    "value_embeddings": (["none", "alternate", "all"], ["some"]),
    "thoughts": ([0], [-1, 0.5, 1]),  # not with a memory
}
MEMORY_LIMITS: dict[str, tuple[list[Any], list[Any]]] = {
    "delay": ([1, 7], [0, 8, 1.0]),
    "source": ([0, 3, None, (0,), (0, 3), (0, 1, 2, 3), [0, 3]], [-1, 4, (), (1, 1), (3, 4), 1.0]),
    "layers": ([(1,), (3,), (1, 2, 3), (3, 1), [2, 3], None], [(), (0,), (4,), (1, 1), 1, "1", (1.0,)]),
    "injection": (["none", "residual", "key_value", "both"], ["other"]),
    "projection": (["shared", "layerwise"], ["other"]),
    "initial": (["zeros", "embedding"], ["other"]),
    "combine": (["sum", "channels"], ["other"]),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_models_field_is_taken_up_to_its_limit(name: str):
    taken, refused = LIMITS[name]
    for number in taken:
        assert getattr(dataclasses.replace(CONFIG, **{name: number}), name) == number
    for number in refused:
        with pytest.raises(ValueError, match=name.partition("_")[0]):
            dataclasses.replace(CONFIG, **{name: number})


@pytest.mark.parametrize("name", MEMORY_LIMITS)
def test_a_memorys_field_is_taken_up_to_its_limit(name: str):
    taken, refused = MEMORY_LIMITS[name]
    for number in taken:
        config = dataclasses.replace(CONFIG, memory=MemoryConfig(**{name: number}))
        assert getattr(config.memory, name) == (tuple(number) if isinstance(number, list) else number)
    for number in refused:
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(CONFIG, memory=MemoryConfig(**{name: number}))


def test_a_source_may_come_twice_only_as_the_control_of_channels():
    assert MemoryConfig(source=(0, 0), combine="channels").channels(3) == 2
    assert MemoryConfig(source=(2, 2), combine="channels", delay=(1, 3)).channels(3) == 2
    assert MemoryConfig(source=(0, 2, 0), delay=(1, 1, 2)).channels(3) == 1
    for memory in (
        {"source": (0, 0), "combine": "sum"},
        {"source": (2, 2), "combine": "channels"},
        {"source": (2, 2), "combine": "channels", "delay": (2, 2)},
    ):
        with pytest.raises(ValueError, match="twice"):
            MemoryConfig(**memory)


@pytest.mark.parametrize("delay", [(1, 7), (7, 1), [2, 2]])
def test_the_delays_of_sources_are_taken_up_to_their_limit(delay: Any):
    config = dataclasses.replace(CONFIG, memory=MemoryConfig(source=(0, 3), delay=delay))
    assert (config.memory.delay, config.delays) == (tuple(delay), tuple(delay))
    for refused in ((0, 1), (1, 8), (1, 1.0), (True, 1), (1,), (1, 1, 1), ((1, 1), 1), "11"):
        with pytest.raises(ValueError, match="delay"):
            dataclasses.replace(CONFIG, memory=MemoryConfig(source=(0, 3), delay=refused))  # type: ignore[arg-type]


def test_thoughts_stand_alone():
    none = MemoryConfig(injection="none")
    assert dataclasses.replace(CONFIG, memory=none, thoughts=2).positions_per_token == 3
    for other in ({"window_pattern": "SL", "memory": none}, {"memory": MemoryConfig(injection="residual")}):
        with pytest.raises(ValueError, match="thoughts"):
            dataclasses.replace(CONFIG, thoughts=2, **other)


def test_what_follows_from_the_fields():
    config = dataclasses.replace(
        CONFIG, window_pattern="SSL", loops=2, memory=MemoryConfig(source=(0, 3), layers=(3, 1))
    )
    assert (config.num_kv_heads, config.head_dim, config.mlp_dim, config.sliding_window) == (4, 6, 96, 4)
    assert dataclasses.replace(CONFIG, kv_heads=2, head_size=10, mlp_width=7, window=3).num_kv_heads == 2
    assert dataclasses.replace(CONFIG, mlp_ratio=2.55).mlp_dim == 61
    assert config.windows == (4, 4, None) * 2
    assert (config.sources, config.stored_sources, config.injected_layers) == ((0, 3), (3,), (1, 3))
    assert (config.kv_layers, config.positions_per_token, config.forwards, config.lookback) == (6, 1, 2, 3)
    assert (config.is_recurrent, config.unlimited_context) == (True, False)
    assert dataclasses.replace(config, window_pattern="S", memory=MemoryConfig(delay=5)).lookback == 5
    assert not dataclasses.replace(CONFIG, memory=MemoryConfig(source=0)).is_recurrent
    assert dataclasses.replace(CONFIG, window_pattern="SSSL").unlimited_context  # the L stands behind the last layer
    embedded = dataclasses.replace(CONFIG, value_embeddings="alternate")
    assert [embedded.has_value_embedding(layer) for layer in (1, 2, 3)] == [True, False, True]


def test_the_size_dial():
    for depth, heads, head_size in ((1, 2, 32), (2, 2, 64), (3, 3, 64), (4, 2, 128), (12, 6, 128)):
        config = ModelConfig.from_depth(depth, vocab_size=9)
        assert (config.depth, config.width, config.heads, config.head_dim) == (depth, 64 * depth, heads, head_size)
    assert ModelConfig.from_depth(2, width=96).heads == 3
    with pytest.raises(ValueError, match="width 6 fits no head size"):
        ModelConfig.from_depth(2, width=6)


def test_defaults_are_what_a_file_without_the_field_means():
    assert dataclasses.asdict(ModelConfig()) == {
        "depth": 4,
        "width": 128,
        "heads": 2,
        "kv_heads": None,
        "head_size": None,
        "vocab_size": 2048,
        "context": 256,
        "value_embeddings": "none",
        "window_pattern": "L",
        "window": None,
        "mlp_ratio": 4.0,
        "mlp_width": None,
        "rope_base": 10000.0,
        "softcap": 15.0,
        "skip_init": 0.1,
        "memory": {
            "injection": "both",
            "projection": "shared",
            "source": None,
            "combine": "sum",
            "initial": "zeros",
            "delay": 1,
            "layers": None,
            "state_start": "active",
            "residual_init": 0.1,
        },
        "loops": 1,
        "thoughts": 0,
    }
