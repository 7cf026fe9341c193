"""The demo from a few text files to its report, at a tiny size."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.page import QUIET, TOKENS, Page, pixels

from lrt import schedules
from lrt.data.corpus import stdlib_files
from lrt.eval.report.page import report
from lrt.eval.report.score_tables import score_tables
from lrt.eval.runs import Run
from lrt.experiments import demo_report
from lrt.experiments.demo import _read_result, demo
from lrt.model import checkpoint
from lrt.training import recipes
from lrt.training.recipes import FAMILIES
from lrt.training.trainer import Trainer
from lrt.utils.provenance import hardware_line

MODELS = ("transformer", "token_shift", "lrt")
# What the demo promises of every model; more may stand beside it.
PROMISED = {"parameters", "tokens", "train_seconds", "training_flops", "parallel_bpb", "live_bpb"}
ABLATED = {"live_bpb_memory_zero", "live_bpb_memory_embedding"}
STEP = recipes.demo_recipe("lrt").batch_tokens


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    sources = [path for path in stdlib_files() if path.stat().st_size > 30_000][:3]
    for path in sources:
        (folder / path.name).write_bytes(path.read_text(encoding="utf-8")[:12_000].encode())
    return sorted(folder.iterdir())


def run(out: Path, texts: list[Path], tokens: int | None = TOKENS, seed: int = 0, prompt: str | None = None) -> Any:
    return demo(out, texts, tokens, seed, "cpu", prompt, progress=False)


@pytest.fixture(scope="module")
def made(texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "demo"
    run(out, texts)
    return out


@pytest.fixture(scope="module")
def page(made: Path) -> str:
    return (made / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def summary(made: Path) -> dict[str, Any]:
    return json.loads((made / "summary.json").read_text())


class Trained(Exception):
    """Training was asked for."""


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training raises instead."""

    def train(*_: Any) -> None:
        raise Trained

    monkeypatch.setattr("lrt.experiments.demo.train", train)


# summary.json
def test_the_summary_has_what_is_promised(summary: dict[str, Any]):
    assert {"models", "hardware", "seconds"} <= set(summary)
    assert tuple(summary["models"]) == MODELS
    for name, model in summary["models"].items():
        assert set(model) >= PROMISED, name
        assert set(model) & ABLATED == (ABLATED if name == "lrt" else set()), name
        numbers = {key: value for key, value in model.items() if key in PROMISED | ABLATED}
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in numbers.values())
    assert summary["hardware"] == hardware_line("cpu")
    assert summary["seconds"] > sum(model["train_seconds"] for model in summary["models"].values())


def test_the_models_are_compared_fairly(summary: dict[str, Any], made: Path):
    models = summary["models"]
    parameters = [model["parameters"] for model in models.values()]
    assert max(parameters) - min(parameters) <= 0.005 * min(parameters)  # contract, section 5
    assert {model["tokens"] for model in models.values()} == {math.ceil(TOKENS / STEP) * STEP}
    assert len({(model["targets"], model["bytes"], model["complete"]) for model in models.values()}) == 1
    for name, model in models.items():
        loaded, _ = checkpoint.load(made / name / "checkpoint")
        assert sum(p.numel() for p in loaded.parameters()) == model["parameters"]
    made_with = [checkpoint.about(made / name / "checkpoint")["run"] for name in MODELS]
    assert len({json.dumps({k: v for k, v in m.items() if k not in ("model", "schedule")}) for m in made_with}) == 1
    # Equal tokens, but not equal work: the passes count, the head only where there is a loss.
    passes = schedules.parse(FAMILIES["lrt"][1]).cost(256) / schedules.plain().cost(256)
    assert 1 < models["lrt"]["training_flops"] / models["transformer"]["training_flops"] < passes + 0.05


def test_the_scores_are_plausible(summary: dict[str, Any]):
    models = summary["models"]
    assert {name: model["schedule"] for name, model in models.items()} == {k: v for k, (_, v) in FAMILIES.items()}
    for name in ("transformer", "token_shift"):
        assert abs(models[name]["live_bpb"] - models[name]["parallel_bpb"]) < 1e-5
    lrt = models["lrt"]
    assert len({lrt["live_bpb"], lrt["live_bpb_memory_zero"], lrt["live_bpb_memory_embedding"]}) == 3
    untrained = math.log2(2048)
    assert all(0.5 < model["live_bpb"] < untrained for model in models.values())


def test_every_family_keeps_its_metrics_log(made: Path, summary: dict[str, Any]):
    for name, model in summary["models"].items():
        lines = [json.loads(line) for line in (made / name / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["tokens"] == model["tokens"]
        assert lines[-1]["flops"] == model["training_flops"]
        assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_report_needs_nothing_but_itself(page: str):
    parsed = Page(page)
    assert {"table", "svg", "pre"} <= parsed.tags
    assert not {"script", "iframe", "object", "embed", "base"} & parsed.tags
    assert [place for place in parsed.loaded if not place.startswith(("#", "data:"))] == []
    assert re.findall(r"@import|url\((?!#|\"?data:|'?#)[^)]*", page) == []


def test_the_report_has_the_numbers_of_the_summary(page: str, summary: dict[str, Any]):
    cells = Page(page).cells
    for model in summary["models"].values():
        assert f"{model['parameters']:,}" in cells
        assert f"{model['tokens']:,}" in cells
        for key in ("parallel_bpb", "live_bpb", *ABLATED & set(model)):
            assert f"{model[key]:.4f}" in cells, key
    assert summary["hardware"] in page
    assert json.dumps(summary["models"]["lrt"]["live_bpb"]) in page  # the whole summary is in it


def test_lrt_report_shows_the_scores_of_the_demo(made: Path, summary: dict[str, Any], page: str, tmp_path: Path):
    (table,) = score_tables([Run.read(made / name) for name in MODELS]).values()
    assert {row[0]: row[1] for row in table.body} == {n: f"{m['live_bpb']:.4f}" for n, m in summary["models"].items()}
    lrt = summary["models"]["lrt"]
    assert table.title == summary["scored_on"] == f"data, test: {lrt['targets']:,} tokens in windows of 256"
    assert f"{lrt['live_bpb_memory_zero']:.4f}" in {cell for row in table.body for cell in row}
    assert summary["scored_on"] in page
    report(tmp_path / "report.html", [made / name for name in MODELS])
    assert f"{lrt['live_bpb']:.4f}" in Page((tmp_path / "report.html").read_text()).cells


def test_the_sample_is_text_and_escaped(tmp_path: Path, summary: dict[str, Any], made: Path):
    logs = {name: made / name / "metrics.jsonl" for name in MODELS}
    demo_report.write_report(tmp_path / "report.html", summary, logs, "<script>alert(1)</script> & größer 🙂")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; größer 🙂" in page
    assert "script" not in Page(page).tags


# Again
def test_a_second_call_keeps_what_was_trained(
    made: Path, texts: list[Path], summary: dict[str, Any], no_training: None, capsys: pytest.CaptureFixture[str]
):
    again = run(made, texts)
    assert again["models"] == summary["models"]
    assert capsys.readouterr().out.count("kept from an earlier call") == 3
    # The time it took counts, whenever it was spent.
    assert again["seconds"] > sum(model["train_seconds"] for model in summary["models"].values())
    assert json.loads((made / "summary.json").read_text()) == again


def test_the_sample_is_printed_and_starts_with_the_prompt(
    made: Path, texts: list[Path], no_training: None, capsys: pytest.CaptureFixture[str]
):
    run(made, texts, prompt="def größer(")
    assert "\ndef größer(" in capsys.readouterr().out
    assert "<pre>def größer(" in (made / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("changed", [{"seed": 1}, {"tokens": 2 * TOKENS}], ids=str)
def test_changed_settings_train_again(
    made: Path, texts: list[Path], tmp_path: Path, changed: dict[str, Any], no_training: None
):
    shutil.copytree(made, tmp_path / "copy")
    with pytest.raises(Trained):
        run(tmp_path / "copy", texts, **changed)


def test_changed_text_trains_again(made: Path, texts: list[Path], tmp_path: Path, no_training: None):
    shutil.copytree(made, tmp_path / "copy")
    changed = tmp_path / texts[0].name
    changed.write_text(texts[0].read_text() + "one = more + line\n" * 40)
    with pytest.raises(Trained):
        run(tmp_path / "copy", [changed, *texts[1:]])


@pytest.mark.parametrize("damage", ["checkpoint/manifest.json", "result.json", "metrics.jsonl"])
def test_a_family_without_its_files_is_trained_again(
    made: Path, texts: list[Path], tmp_path: Path, damage: str, no_training: None
):
    shutil.copytree(made, tmp_path / "copy")
    (tmp_path / "copy" / "lrt" / damage).unlink()
    with pytest.raises(Trained):
        run(tmp_path / "copy", texts)


@pytest.mark.parametrize("text", ["[1]", "3", '{"key": '])
def test_a_result_that_is_none_passes_for_nothing(text: str, tmp_path: Path):
    (tmp_path / "result.json").write_text(text)
    assert _read_result(tmp_path / "result.json") == {}


def test_a_family_that_was_trained_but_not_scored_is_not_trained_again(
    made: Path, texts: list[Path], tmp_path: Path, summary: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """What a kill between its checkpoint and its result leaves."""
    shutil.copytree(made, tmp_path / "copy")
    (tmp_path / "copy" / "lrt" / "result.json").unlink()

    def step(self: Trainer) -> None:
        raise Trained

    monkeypatch.setattr(Trainer, "step", step)
    again = run(tmp_path / "copy", texts)
    assert again["models"]["lrt"]["live_bpb"] == summary["models"]["lrt"]["live_bpb"]
    assert not (tmp_path / "copy" / "lrt" / "checkpoint.old").exists()


def test_other_settings_keep_the_weights_of_the_former(
    made: Path, texts: list[Path], tmp_path: Path, no_training: None
):
    shutil.copytree(made, tmp_path / "copy")
    with pytest.raises(Trained):
        run(tmp_path / "copy", texts, seed=1)
    (old,) = (tmp_path / "copy").glob("*/checkpoint.old")
    assert (old / "model.safetensors").is_file()
    assert (old.parent / "result.json.old").is_file()


def test_a_result_cut_off_while_it_was_written_is_made_again(
    made: Path, texts: list[Path], tmp_path: Path, no_training: None
):
    shutil.copytree(made, tmp_path / "copy")
    file = tmp_path / "copy" / "lrt" / "result.json"
    file.write_text(file.read_text()[:50])
    with pytest.raises(Trained):
        run(tmp_path / "copy", texts)


def test_a_prompt_that_does_not_fit_is_found_before_training(texts: list[Path], tmp_path: Path, no_training: None):
    with pytest.raises(ValueError, match="context of 256"):
        run(tmp_path / "demo", texts, prompt="word " * 400)


def test_without_a_horizon_a_short_text_is_read_a_few_times(
    texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []

    def train(run: Any, *_: Any) -> None:
        asked.append(run.horizon)
        raise Trained

    monkeypatch.setattr("lrt.experiments.demo.train", train)
    with pytest.raises(Trained):
        run(tmp_path / "demo", texts, tokens=None)
    manifest = json.loads((tmp_path / "demo" / "data" / "manifest.json").read_text())
    assert asked == [f"tokens={8 * manifest['splits']['train']['tokens']}"]
    assert 8 * manifest["splits"]["train"]["tokens"] < recipes.DEMO_TOKENS


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_renders_without_an_error(made: Path, tmp_path: Path, scheme: str):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not on the PATH")
    picture = tmp_path / "report.png"
    command = [
        chromium,
        *("--headless", "--no-sandbox", "--disable-gpu", *QUIET),
        f"--user-data-dir={tmp_path / 'profile'}",
        *("--enable-logging=stderr", "--v=0", "--window-size=900,1600"),
        *(["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []),
        f"--screenshot={picture}",
        (made / "report.html").as_uri(),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    width, height, body = pixels(picture)
    assert (width, height) == (900, 1600)
    # Blank rows are zeros once filtered; the table, the bars, the curves and the text are not.
    assert sum(byte != 0 for byte in body) > 0.01 * len(body)
