"""What users register is one entry of a table, with an owner; what it computes is exact wherever it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import scoring
from support.models import VISIBLE, assert_same, difference, random_tokens
from support.prefill import PARALLEL
from support.registries import restored
from torch import Tensor, nn

import lrt
from lrt.data.records import SOURCES, Selection, suffix_of
from lrt.eval.ablations import ABLATIONS, Ablation
from lrt.experiments.state_tracking.tasks import TASKS, Task
from lrt.experiments.state_tracking.training import TrackingRun
from lrt.inference.decoders import EagerDecoder, FusedDecoder, decoder
from lrt.model.memory import INJECTIONS, KeyValue, MemoryReader, NoProjection, Residual
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.parse import Unknown, parse, parse_saved
from lrt.training.optim import Optimiser, place
from lrt.training.optim_config import OptimConfig
from lrt.utils import plugins
from lrt.utils.registry import Registry, UnknownName

HERE = Path(__file__)
LENGTH = 40
"""Enough for a prompt to be swept under PARALLEL."""


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    with restored():
        yield


class Factor(NoProjection):
    """U_k and U_v through two numbers."""

    def __init__(self, config: lrt.ModelConfig) -> None:
        super().__init__()
        self.heads = (config.num_kv_heads, config.head_dim)
        self.down = nn.Linear(config.width, 2, bias=False)
        self.up = nn.Linear(2, 2 * config.num_kv_heads * config.head_dim, bias=False)

    def forward(self, memory: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        key, value = self.up(self.down(memory)).unflatten(-1, (2, *self.heads)).unbind(-3)
        return ((key, value),)


class Factored(KeyValue):
    """Keys and values by `Factor`, and the memory on the residual stream through a matrix of its own."""

    def __init__(self, config: lrt.ModelConfig) -> None:
        super().__init__(config)
        self.down = nn.Linear(config.width, config.width, bias=False)
        self.scale = nn.Parameter(torch.ones(1))

    def residual(self, x: Tensor, memory: Tensor) -> Tensor:
        return x + self.scale * self.down(memory).sum(0)

    @classmethod
    def projection(cls, config: lrt.ModelConfig) -> NoProjection:
        return Factor(config)


class Loudest(MemoryReader):
    """Of several sources, at each position the one with the largest gate."""

    def __init__(self, config: lrt.ModelConfig) -> None:
        super().__init__(config)
        self.temper = nn.Parameter(torch.ones(1))

    def combine(self, parts: list[Tensor], like: Tensor) -> Tensor:
        stacked = torch.stack(parts)
        weights = (self.temper * stacked.mean(-1, keepdim=True)).softmax(0)
        return (weights * stacked).sum(0, keepdim=True)


def config(**memory: Any) -> lrt.ModelConfig:
    return lrt.ModelConfig(
        depth=2,
        width=16,
        heads=2,
        vocab_size=11,
        context=LENGTH,
        memory=lrt.MemoryConfig(**{"injection": "both", **memory}),
    )


def model(**memory: Any) -> LatentRecurrentTransformer:
    torch.manual_seed(0)
    made = LatentRecurrentTransformer(config(**memory)).double().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p) / max(1, p.shape[-1]) ** 0.5)
    return made


def registered(name: str) -> None:
    if name == "factored":
        lrt.register_injection("factored", Factored, optim={"down": "muon", "scale": ("adamw", "scalar_lr", 0.1)})
    else:
        lrt.register_combination("loudest", Loudest, optim={"temper": "adamw"})


MEMORIES = {"factored": {"injection": "factored"}, "loudest": {"source": (0, 1, 2), "combine": "loudest"}}
each_part = pytest.mark.parametrize("part", MEMORIES)


# Names and owners


def test_a_name_belongs_to_who_registered_it() -> None:
    registered("factored")
    owner = INJECTIONS.owner("factored")
    assert owner is not None
    assert owner.name == __name__
    assert owner.path == HERE
    assert INJECTIONS.owner("both") is None
    (record,) = plugins.describe(config(injection="factored").memory.plugin_uses())
    assert record["name"] == __name__
    assert len(record["sha256"]) == 64
    assert record["provides"] == ["injection factored"]


@pytest.mark.parametrize("name", ["none", "both"])
def test_the_librarys_names_are_taken(name: str) -> None:
    with pytest.raises(ValueError, match=rf"injection '{name}' is registered twice, by lrt and by the plugin .*test_"):
        lrt.register_injection(name, Factored)


def test_a_name_is_registered_once_and_both_owners_are_named() -> None:
    other = plugins.Plugin("other", Path("other.py"), "0" * 64)
    with plugins.loading(other):
        lrt.register_injection("factored", Factored)
    with pytest.raises(ValueError, match=r"twice, by the plugin other \(other\.py\) and by the plugin .*test_registry"):
        lrt.register_injection("factored", Residual)
    with pytest.raises(ValueError, match="registered twice"):
        lrt.register_injection("factored", Factored)
    assert INJECTIONS["factored"] is Factored


def test_the_same_definition_may_be_registered_again() -> None:
    """A module that is reloaded, a cell that is run twice."""
    registered("factored")
    registered("factored")
    with pytest.raises(ValueError, match="registered twice"):
        lrt.register_injection("factored", Residual)


def test_an_interactive_session_may_change_its_mind() -> None:
    session = plugins.Plugin("__main__", None, None)
    for kind in (Factored, Residual):
        with plugins.loading(session):
            lrt.register_injection("mine", kind)
    assert INJECTIONS["mine"] is Residual


def test_a_name_is_a_word() -> None:
    with pytest.raises(ValueError, match="injection 'low-rank' is no name; use letters"):
        lrt.register_injection("low-rank", Factored)


def test_unknown_names_are_told_the_known_ones() -> None:
    table = Registry("colour", {"red": 1})
    with pytest.raises(UnknownName, match=r"unknown colour 'blue'; choose one of red, or what a plugin registers"):
        table.find("blue")
    registered("factored")
    with pytest.raises(ValueError, match="choose one of none, residual, key_value, both, factored"):
        lrt.MemoryConfig(injection="factord")


# What is registered computes


@each_part
def test_passes_decoding_and_prefill_agree(part: str) -> None:
    registered(part)
    made, tokens = model(**MEMORIES[part]), random_tokens(3, LENGTH) % 11
    exact = lrt.refine(made, tokens, lrt.schedules.sequential()).hidden
    assert_same(lrt.refine(made, tokens, lrt.schedules.strided(LENGTH, 1)).hidden, exact)
    assert_same(lrt.refine(made, tokens, lrt.schedules.multi_refinement(LENGTH)).hidden, exact)
    way = decoder(made, made.empty_state(3, LENGTH))
    assert_same(torch.stack([way(tokens[:, t], [t] * 3) for t in range(LENGTH)], 1), exact)
    assert difference(lrt.refine(made, tokens, lrt.schedules.plain()).hidden.detach(), exact.detach()) > VISIBLE
    found = lrt.prefill(made, tokens, made.empty_state(3, LENGTH), "converged", calibration=PARALLEL)
    assert {certificate.path for certificate in found.report.rows} == {"sweeps"}
    assert difference(found.sequence, exact.detach()) < 1e-3


def test_a_users_injection_is_decoded_by_the_model_itself() -> None:
    registered("factored")
    made = model(injection="factored")
    assert type(decoder(made, made.empty_state(1, 4))) is EagerDecoder
    assert type(decoder(model(), made.empty_state(1, 4))) is FusedDecoder
    with pytest.raises(ValueError, match="no fused products are known; decode with mode='eager'"):
        FusedDecoder(made, made.empty_state(1, 4))
    for mode in ("packed", "compiled"):
        with pytest.raises(ValueError, match=r"mode='eager'|float32 on a CPU"):
            decoder(made, made.empty_state(1, 4), mode)
    best = decoder(made, made.empty_state(1, 4), "best")
    assert best.name == "eager"


@each_part
def test_an_engine_and_a_session_decode_it(part: str) -> None:
    registered(part)
    made = model(**MEMORIES[part])
    greedy = lrt.Sampling(temperature=0)
    expected = torch.cat(list(lrt.generate(made, torch.tensor([[1, 2, 3]]), 6, greedy))).tolist()
    engine = lrt.Engine(made, rows=2)
    ((completion,),) = engine.complete([lrt.Request((1, 2, 3), 6, greedy)])
    assert list(completion.tokens) == expected
    assert list(lrt.Session.start(made, [1, 2, 3], "exact").generate(6, greedy).tokens)[-6:] == expected


# How it is trained


def test_optimiser_groups_of_ones_own() -> None:
    registered("factored")
    registered("loudest")
    made = LatentRecurrentTransformer(config(injection="factored", source=(0, 2), combine="loudest"))
    names = {id(p): name for name, p in made.named_parameters()}
    rows = {names[id(p)]: row for row, parameters in place(made) for p in parameters}
    assert set(rows) == set(names.values())
    for name in ("blocks.0.injection.down.weight", "blocks.1.injection.down.weight", "projection.down.weight"):
        assert (rows[name].optimiser, rows[name].rate) == ("muon", "matrix_lr")
    assert rows["blocks.0.injection.down.weight"] != rows["blocks.0.mlp.down.weight"]
    scale = rows["blocks.1.injection.scale"]
    assert (scale.optimiser, scale.rate, scale.factor) == ("adamw", "scalar_lr", 0.1)
    assert (rows["recall.temper"].optimiser, rows["recall.temper"].rate) == ("adamw", "scalar_lr")
    Optimiser(made, 16, 64, 10, OptimConfig())


def test_a_parameter_without_a_group_is_named() -> None:
    lrt.register_injection("factored", Factored, optim={"down": "muon"})
    with pytest.raises(ValueError, match=r"blocks\.0\.injection\.scale matches no row .*optim=\{…\}"):
        place(LatentRecurrentTransformer(config(injection="factored")))


@pytest.mark.parametrize("group", ["sgd", ("adamw",), ("adamw", "speed"), ("lion", "matrix_lr")])
def test_groups_that_there_are_not(group: Any) -> None:
    lrt.register_injection("factored", Factored, optim={"down": group, "scale": "adamw"})
    with pytest.raises(ValueError, match=r"injection factored trains down by .* choose one of muon, adamw, or give"):
        place(LatentRecurrentTransformer(config(injection="factored")))


def test_a_group_of_nothing_is_named() -> None:
    lrt.register_injection("factored", Factored, optim={"down": "muon", "scale": "adamw", "sacle": "adamw"})
    with pytest.raises(ValueError, match=r"no parameter of this model matches .*sacle"):
        place(LatentRecurrentTransformer(config(injection="factored")))


# Schedules, tasks, ablations, sources


def test_a_schedule_is_read_and_its_plugin_known() -> None:
    @lrt.schedule
    def zigzag(T: int, turns: int) -> list[lrt.schedules.Pass]:
        return [lrt.schedules.Pass(0, T)] * (turns + 1)

    assert parse("stages([(0.5, plain()), (0.5, zigzag(2))])").shares()[1][1] == zigzag(2)
    assert len(zigzag(2).passes(5)) == 3


def test_an_unknown_schedule_is_kept_as_it_is_written() -> None:
    kept = parse_saved("mixture([(0.5, wave(3)), (0.5, plain())])", "pass --plugin wave.py")
    assert isinstance(kept, Unknown)
    assert repr(kept) == "mixture([(0.5, wave(3)), (0.5, plain())])"
    for run in (lambda: kept.passes(4), lambda: kept.at(0, 1, seed=0), kept.draw, kept.shares, lambda: kept.cost(3)):
        with pytest.raises(ValueError, match=r"pass --plugin wave\.py"):
            run()
    with pytest.raises(ValueError, match="cannot read the schedule"):
        parse_saved("interleaved(")
    assert parse_saved("plain()") == lrt.schedules.plain()


def test_a_task_is_trained_on() -> None:
    def echo(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(3, (rows, length), generator=generator)
        return tokens, tokens

    lrt.register_task(Task("echo", 3, 3, 1 / 3, echo))
    assert TASKS["echo"].vocabulary == 3
    assert TrackingRun("echo", config(), OptimConfig()).lengths()[-1] == 40
    with pytest.raises(ValueError, match=r"unknown task 'ecko'; choose one of parity, .*, echo"):
        TrackingRun("ecko", config(), OptimConfig())


def test_an_ablation_is_a_score_of_its_name() -> None:
    class Halved(Ablation):
        def forward(self, state: Any, positions: Any, embedding: nn.Embedding) -> Tensor:
            return self.recall(state, positions, embedding) / 2

    lrt.register_ablation("halved", Halved)
    assert "halved" in ABLATIONS
    torch.manual_seed(0)
    made = LatentRecurrentTransformer(scoring.LRT)
    torch.nn.init.normal_(made.head.weight)
    ablations = ("zero", "halved")
    found = lrt.evaluate(made, scoring.cut(), scoring.BYTES, lrt.schedules.plain(), ablations, progress=False).to_dict()
    assert {"live_bpb", "live_bpb_memory_zero", "live_bpb_memory_halved"} <= set(found)
    assert "registered" not in found
    with pytest.raises(ValueError, match=r"unknown ablations quartered; choose among zero, .*, halved, two_forwards"):
        lrt.evaluate(made, scoring.cut(), scoring.BYTES, lrt.schedules.plain(), ("quartered",), progress=False)


def test_without_its_schedule_a_model_is_scored_live() -> None:
    made = LatentRecurrentTransformer(scoring.LRT)
    unknown = parse_saved("wave(3)")
    found = lrt.evaluate(made, scoring.cut(), scoring.BYTES, unknown, ("zero",), progress=False)
    assert (found.schedule, found.parallel_bpb, found.gap) == ("wave(3)", None, None)
    assert {"live_bpb", "live_bpb_memory_zero"} <= set(found.to_dict())
    assert not {"parallel_bpb", "gap"} & set(found.to_dict())


def test_a_source_reads_files_by_their_ending(tmp_path: Path) -> None:
    lrt.register_source(".lines", lambda path: ({"text": line} for line in path.read_text().splitlines()))
    file = tmp_path / "a.lines"
    file.write_text("one\n\ntwo\n")
    assert suffix_of(file) == ".lines"
    assert suffix_of(tmp_path / "a.txt") is None
    assert suffix_of(tmp_path / "a.jsonl.gz") == ".jsonl.gz"
    source = SOURCES[".lines"](file, "a.lines", 9, Selection())
    marked = list(source.read())
    assert [piece.text for piece, _ in marked] == ["one", "two"]
    assert [piece.text for piece, _ in source.read(marked[0][1])] == ["two"]
