"""Runs side by side: the same targets, paired differences with intervals, a verdict that says no more than these."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.page import pixels

import lrt.eval.compare
from lrt.cli.compare import Compare
from lrt.cli.main import main
from lrt.data.corpus import stdlib_files
from lrt.data.prepared import Prepared
from lrt.eval.compare import Comparison, Difference, compare, difference, is_longer_known, units_of
from lrt.eval.report.comparison import short_count, verdict
from lrt.eval.results import Result, read_results
from lrt.eval.runs import Run
from lrt.eval.token_scores import TokenScores, bootstrap_interval
from lrt.model.checkpoint import save
from lrt.model.config import ModelConfig
from lrt.model.transformer import LatentRecurrentTransformer

TARGETS = 300


def make_scores(documents: int, windows: int, moved: float, spread: float) -> TokenScores:
    """Random nats, and in the column `live` these plus `moved`, with noise of its own."""
    generator = np.random.default_rng(3)
    text = generator.gamma(2.0, size=TARGETS)  # the same each time: what makes tokens hard
    noise = spread * np.random.default_rng(7 if moved else 8).normal(size=TARGETS)
    place = np.arange(TARGETS) % (TARGETS // windows)
    document = np.arange(TARGETS) // (TARGETS // documents)
    ones = np.ones(TARGETS, dtype=np.int64)
    return TokenScores(document, place, place, ones, ones, 2 * ones, {"live": text + moved + noise})


def test_a_paired_interval_is_narrower_than_that_of_either_score():
    first, one = make_scores(30, 30, 0.0, 0.01), make_scores(30, 30, -0.02, 0.01)
    unit, units = units_of(first)
    apart = difference(one, first, units)
    assert unit == "documents"
    expected = (one.nats["live"].sum() - first.nats["live"].sum()) / (math.log(2) * 2 * TARGETS)
    assert apart.bpb == pytest.approx(expected, abs=1e-12)
    assert apart.relative == pytest.approx(one.nats["live"].sum() / first.nats["live"].sum() - 1, abs=1e-12)
    assert apart.low is not None
    assert apart.high is not None
    assert apart.low < apart.bpb < apart.high < 0
    assert apart.clear
    low, high = bootstrap_interval(first, "live")
    assert low is not None
    assert high is not None
    assert apart.high - apart.low < 0.1 * (high - low)


def test_few_documents_give_way_to_windows():
    unit, units = units_of(make_scores(2, 20, 0.0, 0.1))
    assert (unit, len(np.unique(units))) == ("windows", 20)
    one = make_scores(1, 1, 0.0, 0.1)
    assert difference(make_scores(1, 1, 0.1, 0.1), one, units_of(one)[1]).low is None


@pytest.mark.parametrize(
    ("apart", "said"),
    [
        (
            Difference(-0.0123, -0.02, -0.01, -0.006),
            "mine is 0.0123 bits per byte (0.6 %) better than plain, live; the 95 % interval excludes zero",
        ),
        (
            Difference(0.0123, 0.01, 0.02, 0.006),
            "mine is 0.0123 bits per byte (0.6 %) worse than plain, live; the 95 % interval excludes zero",
        ),
        (
            Difference(0.002, -0.001, 0.005, 0.001),
            "mine and plain cannot be told apart, live: +0.0020 bits per byte, 95 % interval [-0.0010, +0.0050]",
        ),
        (
            Difference(-0.5, None, None, -0.1),
            "mine is 0.5000 bits per byte (10.0 %) better than plain, live; a single window has no interval",
        ),
    ],
)
def test_the_verdict_says_what_the_interval_allows(apart: Difference, said: str):
    assert verdict("mine", apart, "plain") == said


def test_counts_are_short_and_have_a_unit():
    assert [short_count(n) for n in (None, 7, 67_716, 7_200_000, 1_230_000_000)] == [
        "",
        "7",
        "67.7 k",
        "7.2 M",
        "1.23 B",
    ]


# Of real models, untrained


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/data/text, and three checkpoints of its tokenizer: `narrow` reads shorter windows."""
    root = tmp_path_factory.mktemp("compare")
    files = [path for path in stdlib_files() if path.stat().st_size > 20_000][:3]
    for path in files:
        (root / path.name).write_bytes(path.read_text(encoding="utf-8")[:6000].encode())
    data = root / "runs" / "data" / "text"
    main(["prepare", str(data), "--text", *(str(root / path.name) for path in files), "--vocab-size", "300"])
    prepared = Prepared.open(data)
    for seed, (name, context) in enumerate({"one": 32, "two": 32, "narrow": 16}.items()):
        torch.manual_seed(seed)
        config = ModelConfig(depth=2, width=16, heads=2, vocab_size=prepared.vocab_size, context=context)
        about = {"schedule": "interleaved(2)", "data": prepared.fingerprint, "corpus": "text"}
        save(root / "runs" / name, LatentRecurrentTransformer(config), prepared.tokenizer, about)
    return root


@pytest.fixture(autouse=True)
def in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def of(*names: str) -> dict[str, Path]:
    return {name: Path("runs") / name for name in names}


def compare_here(*names: str) -> Comparison:
    return compare(of(*names), Prepared.open(Path("runs/data/text")), "val", 200, progress=False)


def test_a_second_comparison_scores_nothing_and_says_the_same(monkeypatch: pytest.MonkeyPatch):
    before = compare_here("one", "two")
    assert before.on.targets is not None
    assert before.on.targets >= 200
    (kept,) = [
        result for result in read_results(Path("runs/two/evaluation")) if result.settings["on"].keys() == {"text-val"}
    ]
    assert Run.read(Path("runs/two")).scored_on(kept) == before.on

    def refuse(*_: object) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(LatentRecurrentTransformer, "forward", refuse)
    again = compare_here("one", "two")
    assert again.differences == before.differences
    live = [next(s for s in run.scores if s.on == again.on).values["live_bpb"] for run in again.runs.values()]
    assert again.differences["two"].bpb == pytest.approx(live[1] - live[0], abs=1e-12)


def test_other_windows_are_other_scores():
    """A run of longer context is scored on the shorter one's windows, and its own scores stay as they are."""
    own, shared = compare_here("one", "two"), compare_here("one", "narrow")
    assert (own.on.context, shared.on.context) == (32, 16)
    texts = {score.on.context: score.values["live_bpb"] for score in Run.read(Path("runs/one")).scores}
    assert texts.keys() == {32, 16}
    assert texts[16] != texts[32]


def test_the_command_prints_every_form(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    def out(**options: Any) -> str:
        capsys.readouterr()
        Compare(tuple(of("one", "two").values()), at_least=200, device="cpu", **options).run()
        return capsys.readouterr().out

    text = out(figure=tmp_path / "figure.png")
    assert pixels(tmp_path / "figure.png")[0] > 1000
    first, *_, last = text.strip().splitlines()
    assert first.startswith("two ")
    assert "live" in first
    assert "on text, val:" in last
    data = json.loads(out(format="json"))
    assert first == data["verdicts"][0]
    assert [run["name"] for run in data["runs"]] == ["one", "two"]
    head, *rows = csv.reader(io.StringIO(out(format="csv", full=True)))
    assert head[:3] == ["run", "live BPB", "less one's"]
    assert rows[1][1] == f"{data['runs'][1]['live_bpb']:.4f}"
    assert f"two & {rows[1][1]} & " in out(format="latex")
    assert f"| two | {rows[1][1]} | " in out(format="md")
    assert not [word for word in ("live_bpb", "parallel_bpb", "memory_") if word in text + out(full=True)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runs/one"], "1 run is named; name two different ones at least"),
        (["runs/one", "runs/one/"], "1 run is named"),
        (["runs/one", "nowhere"], "nowhere is no run"),
        (["runs/one", "runs/two", "--figure", "figure.jpeg"], "figure.jpeg; give one that ends in .svg, .png, .pdf"),
        (["runs/one", "runs/two", "--split", "dev"], "dev"),
        (["runs/one", "runs/two", "--data", "runs/one"], "runs/one"),
        (
            ["runs/strange", "runs/two"],
            "trained on the text gone, which is not in runs/data; give its folder: --data FOLDER",
        ),
        (["runs/one", "runs/needy"], "this checkpoint needs the plugin wide: pass --plugin wide.py"),
        (["runs/two", "runs/other"], "another tokenizer than runs/other's; compare runs of one tokenizer"),
    ],
)
def test_wrong_input_is_one_sentence(
    words: list[str], said: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    wide = {"name": "wide", "version": "1", "sha256": "0" * 64, "provides": ["injection wide"]}
    changes = {
        "strange": {"about": {"corpus": "gone"}},
        "other": {"tokenizer_sha256": "ab"},
        "needy": {"about": {"plugins": [wide]}},
    }
    for name, change in changes.items():
        change_config(place / "runs" / "one", place / "runs" / name, change)
    monkeypatch.setattr(lrt.eval.compare, "measure_bpb", None)  # nothing is scored before all is checked
    with pytest.raises(SystemExit) as ended:
        main(["compare", *words, "--device", "cpu"])
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert errors.count("\n") == 1
    assert said in errors


def change_config(source: Path, target: Path, change: dict[str, object]) -> None:
    """A copy of a checkpoint whose config.json says something else, with a manifest that fits."""
    import hashlib
    import shutil

    shutil.copytree(source, target, dirs_exist_ok=True)
    config = target / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    manifest = json.loads((target / "manifest.json").read_text())
    content = config.read_bytes()
    manifest["config.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (target / "manifest.json").write_text(json.dumps(manifest))


def test_a_difference_of_the_same_scores_is_nothing():
    same = make_scores(20, 20, 0.0, 0.1)
    apart = difference(dataclasses.replace(same), same, units_of(same)[1])
    assert (apart.bpb, apart.low, apart.high, apart.clear) == (0, 0, 0, False)


def test_a_result_of_more_tokens_is_not_replaced(tmp_path: Path):
    known = Result("bpb", "text-val", "sha", {}, {"targets": 100})
    known.write(tmp_path)
    assert is_longer_known(dataclasses.replace(known, values={"targets": 50}), tmp_path)
    assert not is_longer_known(dataclasses.replace(known, values={"targets": 100}), tmp_path)
    assert not is_longer_known(dataclasses.replace(known, checkpoint="other", values={"targets": 50}), tmp_path)
