"""Train in one call: the recipe, the text and the changes that are asked for, or an answer where they make no sense."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

import lrt
from lrt.data.prepared import Prepared
from lrt.training.config import EvalConfig, RunConfig
from lrt.training.recipes import RECIPES
from lrt.training.start import find_recipe, prepare_data, run_folder, text_folder, with_changes

MODEL = {"width": 16, "heads": 2, "context": 32, "mlp_width": 24}
TINY: dict[str, Any] = {"model": MODEL, "batch_size": 4, "device_batch": 4, "horizon": "steps=3", "device": "cpu"}
UNSCORED: dict[str, Any] = {"evaluation": EvalConfig(every=0), "progress": False}


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of text, in the folder where things are written."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "squares.txt").write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(400)))
    return folder


def test_a_name_and_a_text_give_a_run(text: Path):
    run = lrt.train("d2", "texts/", optim={"matrix_lr": 0.01}, seed=5, **TINY, **UNSCORED)
    assert run.folder == Path("runs/d2")
    settings = RunConfig.from_dict(run.record.about["run"])
    recipe = RECIPES["d2"]()
    assert settings.model == dataclasses.replace(recipe.model, vocab_size=run.data.vocab_size, **MODEL)
    assert settings.optim == dataclasses.replace(recipe.optim, matrix_lr=0.01)
    assert (settings.seed, settings.steps, settings.schedule) == (5, 3, recipe.schedule)
    assert run.data.path == text_folder(text).relative_to(Path())
    # The same call is that run, already done; with the text gone it could not be made again.
    written = (run.folder / "checkpoint" / "manifest.json").stat().st_mtime_ns
    again = lrt.train("d2", run.data, optim={"matrix_lr": 0.01}, seed=5, **TINY, **UNSCORED)
    assert (again.folder / "checkpoint" / "manifest.json").stat().st_mtime_ns == written


def test_it_begins_with_another_runs_weights(text: Path):
    plain = lrt.train("d2-transformer", text, "runs/plain", **TINY, **UNSCORED)
    run = lrt.train("d2", plain.data, init="runs/plain", **{**TINY, "horizon": "steps=1"}, **UNSCORED)
    assert run.record.about["run"]["init"] is not None
    lrt.train("d2", plain.data, "runs/other", **{**TINY, "horizon": "steps=1"}, **UNSCORED)
    assert lrt.Run("runs/other").record.about["run"]["init"] is None


def test_texts_of_one_name_are_prepared_apart(text: Path):
    other = text.parent / "more" / "texts"
    shutil.copytree(text, other)
    (other / "squares.txt").write_text((text / "squares.txt").read_text() * 2)
    first, second = prepare_data("texts", False), prepare_data(other, False)
    assert first.path != second.path
    assert first.fingerprint != second.fingerprint
    before = (first.path / "manifest.json").stat().st_mtime_ns
    assert prepare_data("texts/squares.txt", False).path not in (first.path, second.path)
    assert prepare_data(text, False).fingerprint == first.fingerprint
    assert (first.path / "manifest.json").stat().st_mtime_ns == before  # nothing was done again
    assert prepare_data(first.path, False).path == first.path
    assert prepare_data(first) is first


def test_changes_reach_nested_fields_and_nothing_else():
    recipe = RECIPES["d2"]()
    changed = with_changes(recipe, {"model": {"memory": {"source": 0}}, "seed": 4})
    memory = dataclasses.replace(recipe.model.memory, source=0)
    assert changed == dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, memory=memory), seed=4)
    whole = lrt.ModelConfig(depth=1)
    assert with_changes(recipe, {"model": whole}).model == whole
    assert with_changes(recipe, {}) == recipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "d2-transfomer"}, "unknown recipe 'd2-transfomer'; did you mean d2-transformer"),
        ({"recipe": "xyz"}, "unknown recipe 'xyz'; choose one of demo-transformer, "),
        ({"recipe": RunConfig()}, r"give out='runs/NAME'"),
        ({"horizn": "steps=3"}, "train has no field horizn; it has batch_size, "),
        ({"horizon": 3}, "train.horizon is 3; it has to be str"),
        ({"horizon": {"steps": 3}}, "train.horizon is {'steps': 3}; it has to be str"),
        ({"precision": {"x": 1}}, "unknown precision {'x': 1}"),
        ({"seed": -1}, "seed is -1; it must be"),
        ({"optim": {"lr": 0.1}}, "train.optim has no field lr; it has clip, "),
        ({"model": {"memory": {"source": 9}}}, "memory.source 9 is no layer of this model"),
        ({"model": {"vocab_size": 300}}, "train.model.vocab_size is 300; leave it out"),
        ({"data": "nowhere"}, "there is no file .*nowhere"),
        ({"device": "quantum"}, "device 'quantum' cannot be used here"),
    ],
)
def test_mistakes_are_answered_before_anything_is_written(
    arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        lrt.train(**{"recipe": "d2", "progress": False, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_what_is_given_is_taken():
    assert find_recipe("d4") == RECIPES["d4"]()
    assert run_folder("d4", None) == Path("runs/d4")
    assert run_folder(RunConfig(), "runs/mine") == Path("runs/mine")


def test_the_call_of_version_0_1_trains_as_it_did(text: Path):
    """RunConfig, data and folder by position, as before; what comes back is the run now."""
    data: Prepared = prepare_data(text, False)
    config = RunConfig(lrt.ModelConfig(depth=1, width=16, heads=2, vocab_size=data.vocab_size, context=32),
                       batch_size=4, horizon="steps=2")  # fmt: skip
    run = lrt.train(config, data, text.parent / "mine", "cpu", progress=False, evaluation=EvalConfig(every=0))
    assert RunConfig.from_dict(run.record.about["run"]) == config
