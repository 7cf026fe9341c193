"""The report of some runs: self-contained, complete, and without an error in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright
from support.core_bundle import ITEMS, NAMES, make_bundle
from support.page import QUIET, Page, pixels
from support.runs import TINY

from lrt.cli.main import main
from lrt.data.corpus import stdlib_files
from lrt.eval.report.page import report
from lrt.eval.report.render import render
from lrt.eval.report.score_tables import overview_table, score_tables
from lrt.eval.report.sections import token_span
from lrt.eval.report.table import Table
from lrt.eval.results import Result, read_results
from lrt.eval.runs import Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An LRT with everything measured, and a Transformer with nothing but its training."""
    root = tmp_path_factory.mktemp("runs")
    files = [path for path in stdlib_files() if path.stat().st_size > 20_000][:3]
    for path in files:
        (root / path.name).write_bytes(path.read_text(encoding="utf-8")[:8000].encode())
    texts = [str(root / path.name) for path in files]
    data = root / "data"
    main(["prepare", str(data), "--text", *texts, "--vocab-size", "300"])
    for name, recipe in (("lrt", "d2"), ("plain", "d2-transformer")):
        main(["train", "--data", str(data), "--out", str(root / name), "--device", "cpu", recipe, *TINY])
    main(["diagnose", str(root / "lrt"), "--data", str(data), "--at-least", "150", "--device", "cpu"])
    bundle = root / "bundle"
    bundle.mkdir()
    main(["evaluate", str(root / "lrt"), "--core", str(make_bundle(bundle)), "--device", "cpu"])
    return [root / "lrt", root / "plain"]


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    main(["report", *map(str, runs), "--out", str(out)])
    return out


def test_the_report_is_whole_and_alone(page: Path, runs: list[Path]):
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 5e6
    parsed = Page(text)
    assert {"table", "svg", "section", "details"} <= parsed.tags
    assert not {"script", "iframe", "object", "embed", "base"} & parsed.tags
    assert [place for place in parsed.loaded if not place.startswith(("#", "data:"))] == []
    for title in (
        "Training",
        "Bits per byte",
        "Sweep curves",
        "How many hops",
        "The memory replaced",
        "Inside the memory",
        "CORE",
    ):
        assert f"<h2>{title}" in text, title
    assert "token by token</h2>" in text
    for said in (
        "live bits per byte, the best; ",
        "reaches ",
        "Without its memory lrt is ",
        "of the tokens likelier to lrt",
    ):
        assert said in text, said
    body = text.partition("<h2>Settings")[0]
    assert not re.findall(r"live_bpb\w*|parallel_bpb|training_flops|even_odd", body)
    found = {result.kind: result for result in read_results(runs[0] / "evaluation")}
    assert set(found) == {"bpb", "sweeps", "hops", "ablations", "memory", "text", "core"}
    assert {found["sweeps"].values["verdict"], found["hops"].values["verdict"]} <= set(parsed.cells)
    assert 'aria-label="Loss by hops"' in text
    for name, row in found["bpb"].values["columns"].items():
        assert {name, f"{row['bpb']:.4f}", f"{row['low']:.4f}"} <= set(parsed.cells)
    assert any(cell.startswith(f"{found['ablations'].values['live_bpb_two_forwards']:.4f} (") for cell in parsed.cells)
    assert set(NAMES) <= set(parsed.cells)
    assert "partial CORE (3/22)" in parsed.cells
    assert len(ITEMS) == 3
    assert "Rendered by lrt" in text
    config = json.loads((runs[1] / "checkpoint" / "config.json").read_text())
    assert config["tokenizer_sha256"] in text


def test_what_is_not_there_is_left_out(runs: list[Path], tmp_path: Path):
    report(tmp_path / "plain.html", [runs[1]])
    text = (tmp_path / "plain.html").read_text(encoding="utf-8")
    assert "<h2>Training" in text
    assert not any(f"<h2>{title}" in text for title in ("Sweep", "How many hops", "CORE", "Inside", "The memory"))
    own = json.loads((runs[1] / "checkpoint" / "config.json").read_text())["about"]["scores"]
    assert f"<td>{own['live_bpb']:.4f}</td>" in text  # the only score that there is
    for run in ("a/run", "b/run"):  # two of one name, with results alone
        Result("bpb", "x-val", "ab", {}, values()).write(tmp_path / run / "evaluation")
    report(tmp_path / "two.html", [tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert str(tmp_path / "a" / "run") in (tmp_path / "two.html").read_text()
    with pytest.raises(ValueError, match=r"nowhere is no run: it has no metrics\.jsonl"):
        report(tmp_path / "x.html", [tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no run is given"):
        report(tmp_path / "x.html", [])


def values() -> dict[str, Any]:
    row = {"bpb": 1.5, "low": 1.25, "high": 1.75}
    cut = [{"from": 0, "to": None, "targets": 3, "bpb": {"live": 1.5, "off": 1.75}}]
    cuts = dict.fromkeys(("by_place_in_window", "by_position_in_document", "by_document_length"), cut)
    return {"columns": {"live": row, "off": row}, "differences": {"off - live": row}, **cuts}


def test_a_single_document_and_rounding_are_shown_as_what_they_are(tmp_path: Path):
    known = values()
    known["columns"]["live"] = {"bpb": 1.5, "low": None, "high": None}
    Result("bpb", "x-val", "ab", {}, known).write(tmp_path / "run" / "evaluation")
    alike = {"pieces": ["a", "b"], "live": [1.0, 2.0], "off": [1.0, 2.0001]}
    Result("text", "x-val", "ab", {}, alike).write(tmp_path / "run" / "evaluation")
    report(tmp_path / "report.html", [tmp_path / "run"])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>1.5000</td><td>–</td><td>–</td>" in text
    assert "token by token</h2>" not in text  # nothing recurs there


def test_what_does_not_recur_is_told_instead_of_drawn(tmp_path: Path):
    """A figure of rounding errors, on an axis of 1e-9, looks like a finding."""
    point = {"refinements": 0, "bpb": 1.5, "distance": 0.0, "largest": 0.0, "change": 0.0}
    after = {**point, "refinements": 1, "bpb": 1.5 + 1e-9}
    known = {"curves": {"1": [point, after]}, "contraction": {"1": 0.0}, "live_bpb": 1.5, "even_odd": 1e-9}
    Result("sweeps", "x-val", "ab", {}, known | {"verdict": "stable"}).write(tmp_path / "run" / "evaluation")
    still = {"points": [{"hops": 0, "nats": 2.0, "gap": 0.0, "error": None}], "live": 2.0, "verdict": "nothing recurs"}
    Result("hops", "x-val", "ab", {}, still).write(tmp_path / "run" / "evaluation")
    alike = values()
    alike["differences"]["off - live"] = {"bpb": -1e-9, "low": -1e-9, "high": 0.0}
    Result("bpb", "x-val", "ab", {}, alike).write(tmp_path / "run" / "evaluation")
    report(tmp_path / "report.html", [tmp_path / "run"])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "every refinement gives 1.5000 bits per byte" in text
    assert "<td>2.0000</td><td>+0.0000</td><td>nothing recurs</td>" in text
    assert "<svg" not in text
    assert "-0.0000" not in text
    assert "Nothing recurs in run." in text


def test_blocks_are_shown_over_training(runs: list[Path], page: Path):
    """A run's metrics log has γ, gates and shares by block from each of its live evaluations; snapshots add theirs."""
    lines = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    known = [line["memory_layers"] for line in lines if "memory_layers" in line]
    assert len(known) >= 5
    assert {"gamma", "gates", "residual_ratio", "key_ratio", "value_ratio"} <= set(known[0][0])
    text = page.read_text(encoding="utf-8")
    for name in ("γ of lrt", "mean memory gate of lrt", "memory over local values, RMS of lrt"):
        assert f'aria-label="{name}"' in text
    assert "of plain" not in text  # it has no memory
    plain = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    assert not any("memory_layers" in line for line in plain)


def run_on(folder: Path, about: dict[str, Any], live: dict[str, tuple[float, int]]) -> Path:
    """A run's folder with a checkpoint that says this of itself, and with live scores, targets by corpus."""
    (folder / "checkpoint").mkdir(parents=True)
    config = {"model": {"context": 32, "depth": 2, "width": 16, "heads": 2, "vocab_size": 300}, "about": about}
    (folder / "checkpoint" / "config.json").write_text(json.dumps(config))
    for name, (bpb, targets) in live.items():
        corpus, _, split = name.rpartition("-")
        scores = {
            "live_bpb": bpb,
            "parallel_bpb": bpb,
            "gap": 0.0,
            "targets": targets,
            "bytes": 9,
            "schedule": "plain()",
        }
        on = {name: {"data": f"fingerprint-{corpus}", "split": split, "context": 32}}
        values = {**scores, "corpora": {name: scores}}
        Result("scores", name, "ab", {"on": on}, values).write(folder / "evaluation")
    return folder


def cells_under(table: Table, title: str) -> dict[str, str]:
    """A column by the first one."""
    head, *body = table.cells()
    return {row[0]: row[head.index(title)] for row in body}


def test_scores_of_other_texts_splits_or_windows_stand_in_columns_of_their_own(tmp_path: Path):
    """`best` is the best on the hard text; beside scores of an easy one it would be the last."""
    runs = {
        "best": {"hard-val": (2.0, 100)},
        "worse": {"hard-val": (2.5, 100), "easy-val": (1.0, 100)},
        "other": {"hard-test": (1.5, 100), "easy-val": (1.25, 100)},
        "fewer": {"hard-val": (1.75, 50)},
    }
    read = [Run.read(run_on(tmp_path / name, {}, live)) for name, live in runs.items()]
    tables = {table.title.partition(": ")[2]: table.cells()[1:] for table in score_tables(read).values()}
    ranked = {title: [(row[0], row[1]) for row in rows] for title, rows in tables.items()}
    assert ranked == {
        "hard, val: 100 tokens in windows of 32": [("best", "2.0000"), ("worse", "2.5000")],
        "easy, val: 100 tokens in windows of 32": [("worse", "1.0000"), ("other", "1.2500")],
        "hard, test: 100 tokens in windows of 32": [("other", "1.5000")],
        "hard, val: 50 tokens in windows of 32": [("fewer", "1.7500")],
    }
    overview = overview_table(read)
    assert cells_under(overview, "live BPB (A)") == {"best": "2.0000", "worse": "2.5000", "other": "", "fewer": ""}
    assert cells_under(overview, "live BPB (B)") == {"best": "", "worse": "1.0000", "other": "1.2500", "fewer": ""}
    report(tmp_path / "report.html", [tmp_path / name for name in runs])
    page = (tmp_path / "report.html").read_text()
    assert all(f"<th>live BPB ({letter})</th>" in page for letter in "ABCD")
    report(tmp_path / "report.html", [tmp_path / "best"])
    assert "<th>live BPB</th>" in (tmp_path / "report.html").read_text()
    assert "hard, val: 100 tokens in windows of 32" in (tmp_path / "report.html").read_text()


def test_a_score_of_the_checkpoint_says_what_it_is_of(tmp_path: Path):
    """The same text under its fingerprint is one text; one that an older version did not count is another."""
    scores = {"live_bpb": 2.25, "parallel_bpb": 2.0, "gap": 0.25}
    about = {"data": "fingerprint-hard", "schedule": "plain()", "scores": scores | {"targets": 100}}
    new = Run.read(run_on(tmp_path / "new", about, {"hard-val": (2.5, 100)}))
    (score,) = new.scores
    assert score.values["live_bpb"] == 2.5  # measured later
    alone = Run.read(run_on(tmp_path / "alone", about, {}))
    assert len(score_tables([new, alone])) == 1
    old = Run.read(run_on(tmp_path / "old", {**about, "scores": scores}, {}))
    nameless = [Run.read(run_on(tmp_path / name, {"scores": scores}, {})) for name in ("x", "y")]
    titles = [table.title for table in score_tables([new, old, *nameless]).values()]
    assert titles[1] == "B: hard, val: an unknown number of tokens in windows of 32"
    assert titles[2:] == [
        f"{m}: unknown data of {n}, val: an unknown number of tokens in windows of 32"
        for m, n in zip("CD", "xy", strict=True)
    ]


def test_results_of_other_weights_are_left_out_and_named(tmp_path: Path):
    folder = run_on(tmp_path / "again", {}, {"hard-val": (2.0, 100)})
    (folder / "checkpoint" / "manifest.json").write_text(json.dumps({"model.safetensors": {"sha256": "cd"}}))
    run = Run.read(folder)
    assert run.scores == []
    report(tmp_path / "report.html", [folder])
    text = (tmp_path / "report.html").read_text()
    assert "again: scores of hard-val left out: measured of other weights than its checkpoint&#39;s" in text
    (folder / "checkpoint" / "manifest.json").write_text(json.dumps({"model.safetensors": {"sha256": "ab"}}))
    assert len(Run.read(folder).scores) == 1


def test_what_is_measured_notes_what_it_was_measured_on(runs: list[Path]):
    """Of a real run: the checkpoint's own score and those of `lrt diagnose`, each with its windows."""
    run = Run.read(runs[0])
    assert {score.on.name for score in run.scores} == {"data"}
    own = run.about["scores"]
    assert own["targets"] > 150
    measured = [score.on.targets for score in run.scores]
    assert own["targets"] in measured
    assert len(measured) == 2
    assert {(score.on.data, score.on.split, score.on.context) for score in run.scores} == {
        (run.about["data"], "val", 32)
    }


def test_tokens_are_escaped_and_coloured_by_their_gain():
    tokens = [token_span("<b>", 1.0, 3.0), token_span("x", 2.0, 1.0), token_span("y", 1.0, 1.0)]
    better, worse, same = render("tokens", name="a & b", tokens=tokens).split("<span")[1:]
    assert better == ' style="background:rgba(46,160,67,0.70)" title="1.00 bits, +2.00">&lt;b&gt;</span>'
    assert "218,54,51" in worse
    assert "style" not in same


def test_a_result_says_what_code_made_it(tmp_path: Path):
    made = Result("bpb", "x-val", "ab", {}, values())
    assert made.code == replace(made, kind="core").code != ""


@pytest.mark.slow
def test_on_a_phone_only_boxes_scroll_sideways(page: Path):
    """At 390 pixels; tables and figures scroll by themselves, and a table's first column stays."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not on the PATH")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 390, "height": 844})
        shown.goto(page.as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth") == 390
        box = shown.locator(".scroll").first
        assert box.evaluate("box => box.scrollWidth > box.clientWidth")
        name = box.locator("tbody td").first
        before = name.bounding_box()
        box.evaluate("box => box.scrollLeft = 200")
        assert name.bounding_box() == before
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1000), ("dark", 1000), ("light", 500)])
def test_the_report_renders_without_an_error(page: Path, tmp_path: Path, scheme: str, width: int):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not on the PATH")
    picture = tmp_path / "report.png"
    command = [
        chromium,
        *("--headless", "--no-sandbox", "--disable-gpu", *QUIET),
        f"--user-data-dir={tmp_path / 'profile'}",
        *("--enable-logging=stderr", "--v=0", f"--window-size={width},3000"),
        *(["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []),
        f"--screenshot={picture}",
        page.as_uri(),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    size = pixels(picture)
    assert size[:2] == (width, 3000)
    assert sum(byte != 0 for byte in size[2]) > 0.01 * len(size[2])


CONFIG: dict[str, Any] = {"model": {"depth": 1}, "about": {}}


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ([], "holds no JSON object"),
        ({"a": {"b": 1}}, "KeyError"),
        (CONFIG | {"model": {"depth": "x"}}, "depth"),
        (CONFIG | {"about": [1]}, "about is "),
        (CONFIG | {"about": {"scores": [1]}}, "about.scores is "),
        (CONFIG | {"about": {"scores": {"live_bpb": "x"}}}, "about.scores.live_bpb is 'x'"),
        (CONFIG | {"about": {"trained": 3}}, "about.trained is 3"),
        (CONFIG | {"about": {"data": [1]}}, "about.data is [1]"),
    ],
)
def test_an_odd_config_is_one_line_that_names_it(
    written: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(written))
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")])
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert errors.count("\n") == 1
    assert "checkpoint/config.json" in errors
    assert said in errors


def test_half_a_line_of_the_metrics_log_is_left_out(
    runs: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """What SIGKILL leaves."""
    shutil.copytree(runs[1], tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    whole = Run.read(tmp_path / "run").metrics
    log.write_bytes(log.read_bytes() + b'{"step": 9, "schedule": "inter')
    assert Run.read(tmp_path / "run").metrics == whole
    assert f"metrics.jsonl: line {len(whole) + 1} is damaged and left out" in "".join(
        capsys.readouterr().err.split("\n")
    )
    report(tmp_path / "report.html", [tmp_path / "run"])
    manifest = tmp_path / "run" / "checkpoint" / "manifest.json"
    manifest.write_text("[]")
    with pytest.raises(ValueError, match=r"manifest\.json holds no JSON object"):
        Run.read(tmp_path / "run")
