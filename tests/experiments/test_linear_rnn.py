"""The anchor outside, benchmarks/linear_rnn.py: its parallel form against decoding, and how it is trained."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrt.experiments.state_data import measure
from lrt.experiments.state_data.measure import as_task
from lrt.experiments.state_data.repl import REPL
from lrt.experiments.state_tracking.training import TrackingRun, train_on_rows, train_tracking
from lrt.experiments.studies import state_data
from lrt.model.config import ModelConfig
from lrt.model.memory_config import MemoryConfig
from lrt.training.optim import Optimiser, ParameterRow, place
from lrt.training.optim_config import OptimConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
INSTALLED = all(importlib.util.find_spec(name) for name in ("fla", "triton", "einops"))
needs_library = pytest.mark.skipif(not INSTALLED, reason="the extra linear-rnn (fla-core, Triton) is not installed")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """benchmarks/linear_rnn.py."""
    before = [*sys.path]
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("linear_rnn")
    sys.path[:] = before


def transformer(**changes: Any) -> ModelConfig:
    fields = {"depth": 2, "width": 16, "heads": 2, "context": 256, "mlp_width": 40, **changes}
    return ModelConfig(vocab_size=len(REPL.words), memory=MemoryConfig(injection="none"), **fields)


def tracking_run(**changes: Any) -> TrackingRun:
    fields = {"schedule": "plain()", "steps": 3, "rows": 4, "shortest": 16, "longest": 16, **changes}
    return TrackingRun(as_task(REPL), transformer(), OptimConfig(reference_batch=64), **fields)


def random_model(script: ModuleType) -> Any:
    """One whose blocks all do something: outputs begin at zero else."""
    torch.manual_seed(0)
    model = script.build_model(tracking_run())
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model


def delta_rule_by_hand(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """What one head reads, q, k, v (T, K), beta (T,): S (values, keys) is multiplied by I - β k kᵀ, as in the paper."""
    state, read = q.new_zeros(v.shape[1], k.shape[1]), []
    for now in range(len(q)):
        kept = torch.eye(k.shape[1], dtype=q.dtype) - beta[now] * torch.outer(k[now], k[now])
        state = state @ kept + beta[now] * torch.outer(v[now], k[now])
        read.append(state @ q[now] / math.sqrt(k.shape[1]))
    return torch.stack(read)


def mix_by_hand(mixer: Any, x: Tensor) -> Tensor:
    """DeltaNet over a row x (T, D), place by place and head by head."""
    weight, heads, size = mixer.convolution.weight[:, 0], mixer.heads, x.shape[1] // mixer.heads
    projected = torch.cat([x @ linear.weight.T for linear in (mixer.query, mixer.key, mixer.value)], 1)
    convolved = torch.zeros_like(projected)
    for at in range(len(x)):
        for back in range(min(4, at + 1)):
            convolved[at] += weight[:, 3 - back] * projected[at - back]
    convolved = convolved / (1 + (-convolved).exp())
    q, k, v = (part.reshape(len(x), heads, size) for part in convolved.split(x.shape[1], 1))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    beta = 2 / (1 + (-(x @ mixer.beta.weight.T)).exp())
    read = torch.stack([delta_rule_by_hand(q[:, h], k[:, h], v[:, h], beta[:, h]) for h in range(heads)], 1)
    scale = (read.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return (read / scale * mixer.output_norm.weight).flatten(1) @ mixer.out.weight.T


@needs_library
@pytest.mark.parametrize("length", [1, 5, 32, 75])
def test_parallel_form_is_the_rule_by_hand(script: ModuleType, length: int):
    mixer = random_model(script).blocks[0].mixer.double()
    x = torch.randn(3, length, 16, dtype=torch.float64)
    expected = torch.stack([mix_by_hand(mixer, row) for row in x])
    assert (mixer(x) - expected).abs().max() < 1e-10 * expected.abs().max().clamp(min=1)


@needs_library
def test_eigenvalues_reach_below_zero(script: ModuleType):
    """β grows to 2, so that a key's value is turned to its negative, and is not only forgotten."""
    mixer = script.DeltaNet(16, 2).double()
    nn.init.constant_(mixer.beta.weight, 1.0)
    _, k, _, beta, _ = mixer.inputs(torch.full((1, 8, 16), 2.0, dtype=torch.float64), torch.zeros(1, 3, 48).double())
    assert beta.min() > 1.999
    state = torch.eye(8).double() - beta[0, 0, -1] * torch.outer(k[0, 0, -1], k[0, 0, -1])
    assert torch.linalg.eigvalsh(state).min() < -0.98


@needs_library
def test_decoding_with_a_carried_state_is_the_parallel_form(script: ModuleType):
    """In float32, as the library's recurrence is; in one piece, in pieces, and token by token."""
    model, tokens = random_model(script), REPL.sample(3, 150, torch.Generator().manual_seed(1)).tokens
    with torch.no_grad():
        parallel = model(tokens)
        for pieces in ([150], [40, 1, 3, 106], [1] * 150):
            carries, parts = model.empty_carries(tokens), []
            for part in tokens.split(pieces, 1):
                logits, carries = model.go_on(part, carries)
                parts.append(logits)
            assert (torch.cat(parts, 1) - parallel).abs().max() < 1e-4 * parallel.abs().max()


@needs_library
def test_no_token_sees_what_follows(script: ModuleType):
    model = random_model(script).double()
    tokens = REPL.sample(2, 70, torch.Generator().manual_seed(2)).tokens
    changed = tokens.clone()
    changed[:, 41:] = (changed[:, 41:] + 1) % len(REPL.words)
    before, after = model(tokens), model(changed)
    assert (before - after)[:, :41].abs().max() < 1e-12
    assert (before - after)[:, 41:].abs().min(1).values.max() > 0


@needs_library
def test_scores_are_those_of_decoding(script: ModuleType):
    model, rows = random_model(script), REPL.sample(5, 40, torch.Generator().manual_seed(3))
    scores = script.score_rows(model, rows, batch=2)
    carries = model.empty_carries(rows.tokens)
    for at in range(39):
        with torch.no_grad():
            logits, carries = model.go_on(rows.tokens[:, at : at + 1], carries)
        following = rows.tokens[:, at + 1]
        nats = -logits[:, 0].log_softmax(-1).gather(1, following[:, None])[:, 0]
        there = at + 1 < rows.lengths
        assert (scores.nats[:, at + 1] - nats)[there].abs().max() < 1e-4
        assert scores.right[there, at + 1].equal((logits[:, 0].argmax(-1) == following)[there])
    assert script.decoding_difference(model, scores) < 1e-4
    scores.nats[1, 7] += 0.5
    assert script.decoding_difference(model, scores) == pytest.approx(0.5, abs=1e-3)


def test_it_has_the_parameters_of_the_transformer(script: ModuleType):
    fields = script.fields_of(script.Arguments(Path("unused")), 3)
    run = state_data.build_run(fields)
    model = script.build_model(run)
    wanted = script.count_parameters(run.model)[0]
    unit = 2 * run.model.width * run.model.depth  # one more unit in every MLP
    assert abs(script.count(model) - wanted) <= unit / 2
    assert wanted == 135_812
    assert fields["seed"] == run.seed == 3


def test_every_parameter_has_its_optimiser(script: ModuleType):
    model = script.build_model(tracking_run())
    names = {p: name for name, p in model.named_parameters()}
    placed = {names[p]: row for row, parameters in place(model, script.ROWS) for p in parameters}
    assert placed.keys() == set(names.values())
    matrices = {name for name, row in placed.items() if row.optimiser == "muon"}
    expected = {"query", "key", "value", "beta", "out", "up", "down"}
    assert {name.split(".")[-2] for name in matrices} == expected
    assert placed["embedding.weight"].rate == "embedding_lr"
    assert placed["head.weight"].rate == "head_lr"
    assert {row.rate for name, row in placed.items() if "norm" in name or "convolution" in name} == {"scalar_lr"}


def test_rows_of_another_module_come_before_the_table():
    model = nn.Module()
    model.up, model.other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    up = ParameterRow(r"^up\.weight$", "adamw", "head_lr")
    with pytest.raises(ValueError, match="other"):
        place(model, [up])
    rows = [up, ParameterRow(r"^other\.weight$", "muon", "matrix_lr")]
    assert {row.pattern: parameters for row, parameters in place(model, rows)} == {
        row.pattern: [layer.weight] for row, layer in zip(rows, (model.up, model.other), strict=True)
    }


def test_any_module_is_trained_on_the_rows_of_the_run():
    """The data of the Transformer's run, in its order; rows grow by what the module's loss is."""
    run = tracking_run(steps=24, shortest=16, longest=24, by=8)
    seen: dict[str, list[Tensor]] = {"table": [], "transformer": []}

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(len(REPL.words), 16)
            self.layers = nn.ModuleDict({"up": nn.Linear(16, 16, bias=False)})

    def loss_of(step: int, tokens: Tensor, classes: Tensor) -> tuple[Tensor, float]:
        seen["table"].append(tokens)
        return table.layers["up"](table.embedding(tokens)).square().mean(), 0.1 if step >= 12 else 900.0

    torch.manual_seed(0)
    table = Table()
    trained = train_on_rows(run, table, Optimiser(table, 16, 64, run.steps, run.optim), loss_of)
    assert trained.model is table
    assert trained.grown == {16: 0, 24: 22}
    assert [tokens.shape[1] for tokens in seen["table"]] == 22 * [16] + 2 * [24]
    sample = run.source.sample

    def watched(rows: int, length: int, generator: torch.Generator) -> Any:
        examples = sample(rows, length, generator)
        seen["transformer"].append(examples.tokens)
        return examples

    watching = dataclasses.replace(run.source, sampler=watched)
    train_tracking(dataclasses.replace(run, task=watching, steps=22, longest=16))
    assert all(a.equal(b) for a, b in zip(seen["table"][:22], seen["transformer"], strict=True))


@needs_library
def test_a_seed_is_a_line_that_is_not_run_again(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = {
        "seed": 0, "benchmark": "repl", "family": "transformer", "steps": 4, "rows": 4, "shortest": 24, "longest": 24,
        "size": {"depth": 2, "width": 16, "heads": 2, "context": 64, "window_pattern": "S", "window": 16},
        "optim": {"matrix_lr": 0.02, "embedding_lr": 0.05, "head_lr": 0.01, "scalar_lr": 0.02}, "tests": [32, 64],
        "sequences": 8, "widened_to": "token shift, 2 channels, layerwise",
    }  # fmt: skip
    monkeypatch.setattr(script, "fields_of", lambda arguments, seed: {**small, "seed": seed})
    out = tmp_path / "lines" / "linear.jsonl"
    script.main(script.Arguments(out, (0, 1)))
    first = out.read_text()
    lines = [json.loads(line) for line in first.splitlines()]
    assert [line["fields"]["seed"] for line in lines] == [0, 1]
    for line in lines:
        assert set(line["tests"]) == {"32", "64"}
        assert line["decoding_difference"] < 1e-4
        rows = measure.held_out_rows(REPL, "test", 8, 32, line["fields"]["seed"])
        assert line["tests"]["32"]["all"]["tokens"] == int(rows.counted.sum())
        assert line["tests"]["32"]["answers"]["tokens"] == int((rows.asked >= 0).sum())
        assert line["tokens"] == 4 * 4 * 24
        assert line["step_ratio"] > 0
    script.main(script.Arguments(out, (1, 0)))
    assert out.read_text() == first


@pytest.mark.skipif(INSTALLED, reason="the extra linear-rnn is installed")
def test_without_the_library_it_says_what_to_install(script: ModuleType, tmp_path: Path):
    with pytest.raises(script.MissingExtraError, match=r"latent-recurrent-transformer\[linear-rnn\]"):
        script.main(script.Arguments(tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_steps_and_benchmark_replace_the_editions(script: ModuleType):
    fields = script.fields_of(script.Arguments(Path("unused"), steps=7, benchmark="log"), 0)
    plain = script.fields_of(script.Arguments(Path("unused")), 0)
    assert fields == {**plain, "steps": 7, "benchmark": "log"}
    assert (plain["family"], plain["steps"]) == ("transformer", 4000)
