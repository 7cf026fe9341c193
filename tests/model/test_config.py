"""A configuration is checked when it is made, survives JSON, and counts its parameters exactly."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from support.limits import refuses_absurd_numbers

from lrt import MemoryConfig, ModelConfig
from lrt.model.config import MODEL_LIMITS
from lrt.model.memory_config import MEMORY_LIMITS
from lrt.model.size import count_parameters
from lrt.training.config import RunConfig
from lrt.training.recipes import (
    DESCRIPTIONS,
    FAMILIES,
    LADDER,
    RECIPES,
    SIZES,
    demo_models,
    demo_recipe,
    match_parameters,
)

# Contract, section 5: how far apart the totals of compared models may lie.
MATCHED = 0.005


def made(model: dict[str, Any], memory: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**{"depth": 4, "width": 32, "heads": 4, **model}, memory=MemoryConfig(**memory))


# (fields of the model, fields of the memory, what the message must name: the value, the limit or the fix)
MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "injection": ({}, {"injection": "keyvalue"}, ("injection", "'keyvalue'", "none, residual, key_value, both")),
    "projection": ({}, {"projection": "tied"}, ("projection", "'tied'", "shared, layerwise")),
    "combine": ({}, {"combine": "mean"}, ("combine", "'mean'", "sum, channels")),
    "initial": ({}, {"initial": "ones"}, ("initial", "'ones'", "zeros, embedding")),
    "value_embeddings": ({"value_embeddings": "some"}, {}, ("value_embeddings", "'some'", "none, alternate, all")),
    "source above the depth": ({}, {"source": 5}, ("memory.source 5", "0 (the embedding) to 4")),
    "source below 0": ({}, {"source": -1}, ("memory.source -1", "0 (the embedding) to 4")),
    "one source of several": ({}, {"source": (0, 9)}, ("memory.source 9", "0 (the embedding) to 4")),
    "source is a name": ({}, {"source": "last"}, ("memory.source", "0 (the embedding) to 4")),
    "source is a fraction": ({}, {"source": 1.5}, ("memory.source 1.5", "0 (the embedding) to 4")),
    "source names in a tuple": ({}, {"source": (0, "L")}, ("memory.source 'L'", "0 (the embedding) to 4")),
    "sources twice": ({}, {"source": (0, 2, 0)}, ("(0, 2, 0)", "twice", "each layer once")),
    "channels twice": ({}, {"source": (0, 2, 2), "combine": "channels"}, ("(0, 2, 2)", "twice", "each layer once")),
    "no source": ({}, {"source": ()}, ("memory.source is empty", "injection='none'")),
    "layer 0": ({}, {"layers": (0, 1)}, ("memory.layers", "block 0", "1 to 4")),
    "layer above the depth": ({}, {"layers": (5,)}, ("memory.layers", "block 5", "1 to 4")),
    "layers twice": ({}, {"layers": (2, 2)}, ("memory.layers", "(2, 2)", "once")),
    "no layers": ({}, {"layers": ()}, ("memory.layers", "at least one", "injection='none'")),
    "layers is a number": ({}, {"layers": 3}, ("memory.layers", "3")),
    "layers for too few sources": (
        {},
        {"layers": ((1, 2),), "source": (0, 2), "combine": "channels"},
        ("1 sources", "2"),
    ),
    "layers per source in a sum": (
        {},
        {"layers": ((1,), (2,)), "source": (0, 2)},
        ("memory.layers", "'sum'", "channels"),
    ),
    "no layers of a source": (
        {},
        {"layers": ((1,), ()), "source": (0, 2), "combine": "channels"},
        ("memory.layers", "at least one"),
    ),
    "a sum that starts neutral": (
        {},
        {"state_start": "neutral", "source": (0, 2)},
        ("state_start", "'sum'", "channels"),
    ),
    "another start": ({}, {"state_start": "cold"}, ("state_start", "cold", "neutral")),
    "a layer is a fraction": ({}, {"layers": (1.5,)}, ("memory.layers", "1.5")),
    "delay 0": ({}, {"delay": 0}, ("memory.delay is 0", "at least 1")),
    "a delay of 0 among several": (
        {},
        {"source": (0, 2), "delay": (1, 0)},
        ("memory.delay is (1, 0)", "at least 1", "a tuple of such"),
    ),
    "too few delays": (
        {},
        {"source": (0, 0, 2), "delay": (1, 2)},
        ("memory.delay (1, 2) has 2 numbers", "(0, 0, 2)", "one for each"),
    ),
    "delays of one source": ({}, {"delay": (1, 2)}, ("memory.delay (1, 2)", "None", "give one number")),
    "no delays": ({}, {"source": (0, 2), "delay": ()}, ("memory.delay () has 0 numbers",)),
    "a layer twice at one delay": (
        {},
        {"source": (2, 0, 2), "delay": (1, 2, 1), "combine": "channels"},
        ("(2, 0, 2)", "twice", "(1, 2, 1)", "another delay"),
    ),
    "the embedding twice at one delay in a sum": (
        {},
        {"source": (0, 0), "delay": (2, 2)},
        ("twice", "(2, 2)", "another delay"),
    ),
    "one delay of the context": (
        {"context": 8},
        {"source": (0, 2), "delay": (1, 8)},
        ("memory.delay is (1, 8)", "context (8)"),
    ),
    "delay is a fraction": ({}, {"delay": 1.5}, ("memory.delay is 1.5", "at least 1")),
    "delay of the context": ({"context": 8}, {"delay": 8}, ("memory.delay is 8", "context (8)")),
    "kv_heads": ({"kv_heads": 3}, {}, ("kv_heads is 3", "divide heads (4)")),
    "kv_heads above heads": ({"kv_heads": 8}, {}, ("kv_heads is 8", "divide heads (4)")),
    "no kv_heads": ({"kv_heads": 0}, {}, ("kv_heads is 0", "divide heads (4)")),
    "odd head size": ({"head_size": 7}, {}, ("head size is 7", "even")),
    "odd width over heads": ({"width": 12}, {}, ("head size is 3", "even")),
    "no head size": ({"head_size": 0}, {}, ("head size is 0",)),
    "width over heads": ({"width": 30}, {}, ("width 30", "heads 4", "head_size")),
    "no width": ({"width": 0}, {}, ("width is 0", "at least 1")),
    "depth is a fraction": ({"depth": 2.5}, {}, ("depth is 2.5", "at least 1")),
    "window pattern": ({"window_pattern": "LM"}, {}, ("window_pattern is 'LM'", "L (full)", "S (sliding)")),
    "no window pattern": ({"window_pattern": ""}, {}, ("window_pattern is ''", "'SSSL'")),
    "window 0": ({"window": 0}, {}, ("window is 0", "at least 1")),
    "no MLP": ({"mlp_width": 0}, {}, ("MLP", "0 wide", "mlp_width")),
    "softcap 0": ({"softcap": 0.0}, {}, ("softcap is 0",)),
}


@pytest.mark.parametrize(("model", "memory", "named"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_bad_field_is_an_error_that_names_value_limit_and_fix(
    model: dict[str, Any], memory: dict[str, Any], named: tuple[str, ...]
):
    with pytest.raises(ValueError, match=re.escape(named[0])) as caught:
        made(model, memory)
    for part in named:
        assert part in str(caught.value)


def test_a_run_checks_its_schedule_and_batch():
    for fields, named in (
        ({"schedule": "interleaved(0)"}, ("subsets is 0", "at least 1")),
        ({"batch_size": 0}, ("batch_size is 0", "at least 1")),
        ({"horizon": "tokens=0"}, ("horizon is 'tokens=0'", "ratio=10")),
        ({"horizon": "epochs=1"}, ("horizon is 'epochs=1'", "steps=…")),
        ({"precision": "float16"}, ("unknown precision 'float16'", "bfloat16")),
        ({"batch_size": 6, "device_batch": 4}, ("device_batch is 4", "divide the 6 rows")),
    ):
        with pytest.raises(ValueError, match=re.escape(named[0])) as caught:
            RunConfig(**fields)
        assert named[1] in str(caught.value)


def test_numbers_of_a_model_and_its_memory_have_limits():
    refuses_absurd_numbers(ModelConfig, MODEL_LIMITS)
    refuses_absurd_numbers(MemoryConfig, MEMORY_LIMITS, elsewhere=("source", "layers"))
    products: tuple[dict[str, Any], ...] = (
        {"depth": 200, "loops": 200},
        {"width": 2**20, "mlp_ratio": 1000.0, "heads": 2**10},
    )
    for fields in products:
        with pytest.raises(ValueError, match=r"at most|change"):
            ModelConfig(**fields)
    for memory in ({"source": True}, {"source": (0, True)}, {"layers": (True,)}):
        with pytest.raises(ValueError, match="True"):
            made({}, memory)


def test_a_scale_may_start_at_0():
    assert ModelConfig.from_dict({"skip_init": 0, "memory": {"residual_init": -4}}).skip_init == 0


FULL = ModelConfig(
    depth=3,
    width=48,
    heads=4,
    kv_heads=2,
    head_size=6,
    vocab_size=99,
    context=17,
    value_embeddings="alternate",
    window_pattern="SSL",
    window=5,
    mlp_width=77,
    rope_base=500.0,
    loops=2,
    softcap=20.0,
    skip_init=0.2,
    memory=MemoryConfig(
        injection="key_value",
        projection="layerwise",
        source=(0, 3),
        combine="channels",
        initial="embedding",
        delay=(2, 1),
        layers=((1, 3), (3,)),
        state_start="neutral",
        residual_init=0.3,
    ),
)


@pytest.mark.parametrize("config", [ModelConfig(), FULL, *(make().model for make in RECIPES.values())])
def test_a_configuration_survives_json(config: ModelConfig):
    back = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)  # tuples are tuples again
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_the_round_trip_leaves_its_argument_alone():
    data = FULL.to_dict()
    ModelConfig.from_dict(data)
    assert data == FULL.to_dict()


def test_every_field_of_the_example_differs_from_its_default():
    # Otherwise the round trip could lose a field unseen.
    defaults = ModelConfig().to_dict()
    flat, plain = ({**d, **d["memory"]} for d in (FULL.to_dict(), defaults))
    same = [
        name for name, value in flat.items() if value == plain[name] and name not in ("memory", "mlp_ratio", "thoughts")
    ]
    assert same == []


def test_thoughts_survive_json():  # they go with neither windows nor a memory, which the example above has
    config = ModelConfig(thoughts=2, memory=MemoryConfig(injection="none"))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_fields_are_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"ModelConfig has no field dept; it has context, depth, "):
        ModelConfig.from_dict({"dept": 3})
    with pytest.raises(ValueError, match=r"MemoryConfig has no field gates, sauce; it has combine, "):
        ModelConfig.from_dict({"memory": {"sauce": 3, "gates": 1}})


def test_sources_and_layers_are_numbered_as_in_the_paper():
    memory = MemoryConfig()
    assert memory.sources(5) == (5,)  # None is the last layer
    assert memory.injected_layers(5) == (1, 2, 3, 4, 5)
    assert memory.channels(5) == 1
    several = MemoryConfig(source=(3, 0), layers=(4, 2))
    assert several.sources(5) == (3, 0)  # the order of channels and weights is the user's
    assert several.stored_sources(5) == (3,)  # layer 0 follows from the token
    assert several.injected_layers(5) == (2, 4)
    assert several.channels(5) == 1
    assert replace(several, combine="channels").channels(5) == 2
    assert MemoryConfig(source=0).stored_sources(5) == ()
    none = MemoryConfig(injection="none", source=(0, 2))
    assert (none.sources(5), none.stored_sources(5), none.channels(5), none.injected_layers(5)) == ((), (), 0, ())


def test_each_source_has_a_delay():
    assert (MemoryConfig(delay=2).delays(5), MemoryConfig(delay=2).longest_delay) == ((2,), 2)
    assert MemoryConfig(source=(0, 3), delay=2).delays(5) == (2, 2)
    several = MemoryConfig(source=(3, 0, 3), delay=[1, 2, 4], combine="channels")  # type: ignore[arg-type] # of JSON
    assert several.delay == (1, 2, 4)
    assert (several.sources(5), several.delays(5), several.longest_delay) == ((3, 0, 3), (1, 2, 4), 4)
    assert several.stored_sources(5) == (3,)  # one vector, read from two places
    assert several.channels(5) == 3
    assert replace(several, injection="none").delays(5) == ()
    assert MemoryConfig(source=(0, 0), delay=(2, 2), combine="channels").delays(5) == (2, 2)  # as with one delay
    assert ModelConfig(depth=5, window_pattern="S", window=3, memory=several).lookback == 4


def test_a_block_sees_the_delays_of_the_sources_that_it_injects():
    memory = MemoryConfig(source=(3, 0, 3), delay=(1, 2, 4), combine="channels", layers=((1,), (1, 2), (2,)))
    config = ModelConfig(depth=3, memory=memory)
    of_blocks = [config.of_block(layer) for layer in (1, 2)]
    assert [(block.sources, block.delays) for block in of_blocks] == [((3, 0), (1, 2)), ((0, 3), (2, 4))]
    assert replace(config, memory=replace(memory, source=(3, 0, 0), delay=2)).of_block(1).memory.delay == 2


def test_windows_reach_and_value_embeddings_by_layer():
    config = ModelConfig(depth=5, window_pattern="SSL", window=7, context=20, value_embeddings="alternate")
    assert config.windows == (7, 7, None, 7, 7)
    assert not config.unlimited_context
    assert [layer for layer in range(1, 6) if config.has_value_embedding(layer)] == [1, 3, 5]
    assert [layer for layer in range(1, 5) if replace(config, depth=4).has_value_embedding(layer)] == [2, 4]
    sliding = replace(config, window_pattern="S")
    assert sliding.unlimited_context
    assert sliding.lookback == 6  # the window, without the position itself
    assert replace(sliding, memory=MemoryConfig(delay=9)).lookback == 9
    assert replace(config, depth=2).unlimited_context  # the L of the pattern is never reached
    assert replace(config, window=None).sliding_window == 10


def test_the_one_dial():
    config = ModelConfig.from_depth(20)
    assert (config.depth, config.width, config.heads, config.head_dim) == (20, 1280, 10, 128)
    assert ModelConfig.from_depth(12, context=64).context == 64
    assert (ModelConfig.from_depth(2).width, ModelConfig.from_depth(2).heads) == (128, 2)
    assert ModelConfig.from_depth(3, width=96).heads == 3
    with pytest.raises(ValueError, match="width 12 fits no head size"):
        ModelConfig.from_depth(2, width=12)


# Parameters


def by_hand(config: ModelConfig) -> int:
    """The number of parameters, from the specification; `injection` none or both, one source."""
    L, D, V = config.depth, config.width, config.vocab_size
    G, K, M = config.num_kv_heads, config.head_dim, config.mlp_dim
    attention = 2 * config.heads * K * D + 2 * G * K * D  # query and out; key and value
    total = 2 * V * D + L * (attention + 2 * D * M + 2)  # embedding and head; α and β per block
    tables = {"none": 0, "alternate": (L + 1) // 2, "all": L}[config.value_embeddings]
    total += tables * (V * G * K + D * G)
    if config.memory.injection == "both":
        sets = L if config.memory.projection == "layerwise" else 1
        total += sets * 2 * G * K * D + L * (2 * G * D + 1)  # U_k, U_v; a local and a memory gate per head, γ
    return total


def paper(**memory: Any) -> ModelConfig:
    return ModelConfig.from_depth(
        20, vocab_size=32768, value_embeddings="all", context=2048, memory=MemoryConfig(**memory)
    )


def test_the_memory_adds_few_parameters():
    none, shared, layerwise = (
        paper(injection="none"),
        paper(injection="both", projection="shared"),
        paper(injection="both", projection="layerwise"),
    )
    totals = [count_parameters(config)[0] for config in (none, shared, layerwise)]
    assert totals == [by_hand(config) for config in (none, shared, layerwise)]
    base = totals[0]
    assert 0 < totals[1] - base <= 0.0035 * base
    assert 0.045 * base <= totals[2] - base <= 0.055 * base
    assert totals == sorted(totals)


@pytest.mark.parametrize("value_embeddings", ["none", "alternate", "all"])
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_parameters_are_counted_exactly(value_embeddings: Any, kv_heads: int | None):
    config = ModelConfig(
        depth=3, width=24, heads=2, kv_heads=kv_heads, head_size=10, vocab_size=50, value_embeddings=value_embeddings
    )
    total, dense = count_parameters(config)
    assert total == by_hand(config)
    tables = {"none": 0, "alternate": 2, "all": 3}[value_embeddings] * 50 * config.num_kv_heads * 10
    assert dense == total - 2 * 50 * 24 - tables


@pytest.mark.parametrize("target", [1.03, 1.4, 3.0])
def test_matched_widens_the_mlp_and_nothing_else(target: float):
    config = ModelConfig(vocab_size=512, memory=MemoryConfig(injection="none"))
    wanted = int(target * count_parameters(config)[0])
    matched = match_parameters(config, wanted)
    assert matched.mlp_dim > config.mlp_dim
    assert replace(matched, mlp_width=None) == config
    assert abs(count_parameters(matched)[0] - wanted) <= MATCHED * wanted


def test_matched_says_where_it_cannot():
    config = ModelConfig(vocab_size=512)
    with pytest.raises(ValueError, match=r"within 0\.5 % of 1000"):
        match_parameters(config, 1000)  # below the model without any MLP
    with pytest.raises(ValueError, match=r"within 0\.5 % of 20000"):
        match_parameters(ModelConfig(depth=1, width=1024, heads=8, vocab_size=2), 20000)


@pytest.mark.parametrize("vocab_size", [400, 2048, 32768])
def test_the_models_of_the_demo_are_comparable(vocab_size: int):
    models = demo_models(vocab_size)
    assert set(models) == set(FAMILIES) == {"transformer", "token_shift", "lrt"}
    totals = [count_parameters(model)[0] for model in models.values()]
    assert max(totals) - min(totals) <= MATCHED * min(totals)
    for name, model in models.items():
        assert model.memory == FAMILIES[name][0]
        # Equal in everything but the memory and the MLP.
        assert replace(model, memory=MemoryConfig(), mlp_width=None) == ModelConfig(vocab_size=vocab_size)
    assert models["transformer"].memory.sources(4) == ()
    assert models["token_shift"].memory.sources(4) == (0,)
    assert models["lrt"].memory.stored_sources(4) == (4,)


def test_what_is_said_of_the_recipes_is_counted():
    assert set(DESCRIPTIONS) == set(RECIPES)
    for layers in LADDER:
        run = RECIPES[f"d{layers}"]()
        parameters, tokens = count_parameters(run.model)[0] / 1e6, run.tokens / 1e6
        size = f"{short(parameters)} M parameters, {short(tokens)} M tokens, {run.flops:.1e} FLOPs"
        assert SIZES[layers] == size.replace("e+", "e")


def short(millions: float) -> str:
    return f"{millions:.1f}" if millions < 10 else f"{millions:,.0f}"


def test_the_runs_of_the_demo_are_comparable():
    runs = {family: demo_recipe(family, 512, 10_000, seed=3) for family in FAMILIES}
    shared = {replace(run, model=ModelConfig(), schedule="plain()") for run in runs.values()}
    assert len(shared) == 1
    with pytest.raises(ValueError, match="unknown family 'rnn'; choose one of transformer, token_shift, lrt"):
        demo_recipe("rnn")
