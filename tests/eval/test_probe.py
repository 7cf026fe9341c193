"""One promise: a probe reads what a vector holds, and nothing that it does not hold."""

from __future__ import annotations

import json
import typing
from pathlib import Path

import pytest
import torch
from support.server import saved

from lrt import MemoryConfig
from lrt.cli.evaluate import Diagnose
from lrt.cli.main import main
from lrt.eval.probe import FILE, HIDDEN, fit_probe, majority_share, read_probe, readable_vectors, trace_texts
from lrt.eval.results import read_results
from lrt.eval.scoring import score
from lrt.eval.text_states import STATE_KINDS
from lrt.experiments.state_data.probing import BENCHMARKS, ProbeSettings, draw_texts
from lrt.model.checkpoint import load

COUNT, VARIABLES, WIDTH = 5, 3, 24


def mixed(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(N, D): the values, one-hot, mixed by a random matrix: a state that is there, and on no axis of its own."""
    hot = torch.nn.functional.one_hot(values, COUNT).flatten(1).float()
    return hot @ torch.randn(hot.shape[1], WIDTH, generator=generator) * 3 + 7


def test_a_state_that_is_held_is_read_and_noise_gives_chance():
    generator = torch.Generator().manual_seed(0)
    chances = torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1])
    values = torch.multinomial(chances, 9000 * VARIABLES, replacement=True, generator=generator).view(-1, VARIABLES)
    vectors, train = mixed(values, generator), slice(6000)
    probe = fit_probe(vectors[train], values[train], COUNT)
    assert (probe.read(vectors[6000:]) == values[6000:]).all()
    noise = torch.randn(9000, WIDTH, generator=generator)
    right = fit_probe(noise[train], values[train], COUNT).read(noise[6000:]) == values[6000:]
    chance = majority_share(values[train], values[6000:], COUNT)
    torch.testing.assert_close(chance, torch.full((VARIABLES,), 0.6), atol=0.03, rtol=0)
    torch.testing.assert_close(right.float().mean(0), chance, atol=0.02, rtol=0)


def test_what_is_read_is_what_live_decoding_keeps(tmp_path: Path):
    model, words = load(saved(tmp_path / "lrt", memory=MemoryConfig(source=1)))
    tokens = torch.tensor([[words.bos, *words.encode("the end of it all")]])
    vectors = readable_vectors(model, tokens)
    assert list(vectors) == ["token embedding", "memory of layer 1", HIDDEN]
    assert {v.shape for v in vectors.values()} == {(1, tokens.shape[1], 16)}
    logits = model.logits(vectors[HIDDEN])[:, :-1].log_softmax(-1)
    nats = -logits.gather(2, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(nats, score(model, tokens), atol=1e-4, rtol=1e-4)
    plain, _ = load(saved(tmp_path / "plain", memory=MemoryConfig(injection="none")))
    assert list(readable_vectors(plain, tokens)) == ["token embedding", HIDDEN]


@pytest.mark.parametrize("kind", ["repl", "log", "chess"])
def test_texts_that_are_drawn_have_a_state_after_every_token(kind: str, tmp_path: Path):
    _, words = load(saved(tmp_path / "lrt"))
    texts = draw_texts(BENCHMARKS[kind], "train", 300, 0)  # pyright: ignore[reportArgumentType]
    assert texts != draw_texts(BENCHMARKS[kind], "test", 300, 0)  # pyright: ignore[reportArgumentType]
    traces = trace_texts(texts, kind, words, 60)
    assert traces.tokens.shape == (3, 60)
    assert traces.known.all()
    assert len(traces.values.flatten(0, 1).unique(dim=0)) > 5


def test_the_command_keeps_scores_and_the_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = saved(tmp_path / "lrt", memory=MemoryConfig(source=(1, 2), combine="channels"))
    command = ["diagnose", str(folder), "--probe", "repl", "--at-least", "200", "--device", "cpu"]
    main(command)
    printed = capsys.readouterr().out
    assert "of lrt a linear probe reads" in printed
    assert "chance is" in printed
    main([*command, "--format", "json"])
    (measured,) = json.loads(capsys.readouterr().out)
    values = measured["values"]
    assert list(values["accuracy"]) == ["token embedding", "memory of layer 1", "memory of layer 2"]
    assert set(values["variables"]) == {*"abcde", *(f"m[{key}]" for key in range(4))}
    for row in (values, *values["variables"].values()):
        assert 0 <= row["chance"] <= 1
        assert all(0 <= part <= 1 for part in row["accuracy"].values())
    assert values["accuracy"][values["source"]] == max(values["accuracy"][f"memory of layer {n}"] for n in (1, 2))
    main([*command, "--format", "md"])
    assert "| all variables |" in capsys.readouterr().out
    assert [result.kind for result in read_results(folder / "evaluation")] == ["probe"]
    model, _ = load(folder)
    probe = read_probe(folder, model)
    assert probe is not None
    assert (probe.kind, probe.source, probe.accuracy) == ("repl", values["source"], values["accuracy"][probe.source])
    with torch.no_grad():
        model.embedding.weight[0] += 1
    assert read_probe(folder, model) is None  # of other weights
    (folder / FILE).write_bytes(b"no probe")
    with pytest.raises(ValueError, match="is no probe"):
        read_probe(folder, model)


def test_what_can_be_asked_for_is_what_can_be_drawn_and_followed():
    offered = typing.get_type_hints(Diagnose)["probe"]
    names = {name for part in typing.get_args(offered) for name in typing.get_args(part)}
    assert names == set(BENCHMARKS) == set(STATE_KINDS)


def test_a_probe_needs_a_number_of_words():
    with pytest.raises(ValueError, match="a probe needs 1 or more"):
        ProbeSettings("repl", held_out=0)


def test_the_report_shows_it(tmp_path: Path):
    folder = saved(tmp_path / "lrt")
    main(["diagnose", str(folder), "--probe", "log", "--at-least", "200", "--device", "cpu"])
    main(["report", str(folder), "--out", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "of lrt a linear probe reads" in page
    assert "the whole state at once" in page
