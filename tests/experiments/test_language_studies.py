"""Studies of language: what a cell's fields mean, sweeps and claims, tables and figures from lines alone."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from matplotlib.figure import Figure
from support.registries import restored

import lrt
from lrt.cli.main import main
from lrt.data.prepare import prepare
from lrt.data.prepared import Prepared
from lrt.eval.report.style import FAMILIES, save_figure
from lrt.eval.report.table import Table, markdown
from lrt.experiments.studies import comparisons, figures, grid, language, runner, texts, timing
from lrt.experiments.studies.kinds import KINDS
from lrt.model.size import count_parameters
from lrt.training.trainer import Diverged, Trainer
from lrt.utils import plugins

EXAMPLE = Path(lrt.__file__).parents[1] / "examples" / "low_rank_injection.py"
OPTIM = {"matrix_lr": 0.02, "embedding_lr": 0.2, "head_lr": 0.01, "scalar_lr": 0.02, "reference_batch": 2048}
FIELDS: dict[str, Any] = {
    "seed": 3,
    "family": "shared",
    "size": {"depth": 4, "width": 64, "heads": 2, "context": 32},
    "optim": OPTIM,
    "batch_size": 4,
    "horizon": "tokens=12800",
}


# --- fields ------------------------------------------------------------------------------------------------------


def test_a_cell_is_a_run():
    run = language.build_run({**FIELDS, "rate": 0.5}, 300)
    assert run.schedule == "interleaved(2)"
    assert (run.seed, run.tokens, run.model.vocab_size) == (3, 12800, 300)
    assert (run.optim.matrix_lr, run.optim.scalar_lr) == (0.01, 0.01)
    changed = language.build_run({**FIELDS, "schedule": "settled(0, 1, 1)", "model": {"memory": {"source": 2}}}, 300)
    assert changed.schedule == "settled(0, 1, 1)"
    assert changed.model.memory == dataclasses.replace(run.model.memory, source=2)


def test_horizons_are_the_transformers():
    """A ratio counts the Transformer's weights, so that all families see equal tokens."""
    fields = {**FIELDS, "horizon": "ratio=2"}
    plain = language.build_run({**fields, "family": "transformer"}, 300)
    assert language.build_run({**fields, "family": "layerwise"}, 300).tokens == plain.tokens


def test_equal_tokens_compute_and_wall_clock():
    run = language.build_run(FIELDS, 300)
    other = language.baseline_run(run, FIELDS)
    assert other.schedule == "plain()"
    assert language.match_horizon(run, other, "tokens", 2.0).tokens == other.tokens
    assert language.match_horizon(run, other, "compute", 2.0).flops == pytest.approx(other.flops, rel=0.01)
    assert language.match_horizon(run, other, "wall_clock", 2.0).tokens == other.tokens / 2
    with pytest.raises(ValueError, match="equal is 'luck'; choose one of tokens, compute, wall_clock"):
        language.match_horizon(run, other, "luck", 2.0)


@pytest.mark.parametrize("family", ["transformer", "loop 3", "ponder", "middle recurrence", "recommended"])
def test_families_are_widened_to_one_size(family: str):
    fields = {**FIELDS, "family": family, "widened_to": "layerwise"}
    largest = count_parameters(language.build_run({**FIELDS, "family": "layerwise"}, 300).model)[0]
    assert count_parameters(language.build_run(fields, 300).model)[0] == pytest.approx(largest, rel=0.005)


def test_mistakes_in_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="a language cell has no field sede"):
        language.build_run({**FIELDS, "sede": 1}, 300)
    with pytest.raises(ValueError, match="unknown family 'lstm'; choose one of transformer, token shift"):
        language.build_run({**FIELDS, "family": "lstm"}, 300)
    with pytest.raises(ValueError, match="precision is 'auto', which depends on the machine"):
        language.build_run({**FIELDS, "precision": "auto"}, 300)
    monkeypatch.setattr(texts, "TEXTS", tmp_path)
    with pytest.raises(ValueError, match="the text 'poems' is not there; prepare it with: lrt prepare"):
        texts.open_text("poems")


def test_ratios_that_an_older_version_kept_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Their runs lack the fields that are new: those mean their defaults. Anything else is another pair."""
    monkeypatch.setattr(texts, "TEXTS", tmp_path / "texts")
    monkeypatch.setattr(timing, "step_time_ratio", lambda *_: 7.0)
    monkeypatch.setattr(timing, "decode_ratio", lambda *_: 7.0)
    run = language.build_run(FIELDS, 300)
    other, data = language.baseline_run(run, FIELDS), cast("Prepared", None)
    *runs, machine = json.loads(timing.ratios_key(run, other, "cpu"))
    for saved in runs:
        del saved["precision"], saved["model"]["thoughts"], saved["model"]["memory"]["residual_init"]
    kept = {"step": 1.5, "schedule": 1.25, "decode": 1.1}
    timing.ratios_file().write_text(json.dumps({json.dumps([*runs, machine]): kept}))
    assert timing.paired_ratios(run, other, data, "cpu") == kept
    assert timing.paired_ratios(dataclasses.replace(run, seed=4, horizon="steps=9"), other, data, "cpu") == kept
    wider = dataclasses.replace(run, batch_size=8)
    assert timing.paired_ratios(wider, other, data, "cpu")["step"] == 7
    assert len(json.loads(timing.ratios_file().read_text())) == 2


# --- sweeps and claims -------------------------------------------------------------------------------------------

GRID = """
kind: language
editions:
  tiny:
    seeds: [0, 1]
    sweep: {axis: rate, by: val_live_bpb}
    axes:
      rate: {half: {rate: 0.5}, one: {rate: 1}}
      family: {a: {family: a}, b: {family: b}}
"""


class Scores:
    """A kind whose results are given."""

    def __init__(self, by_cell: dict[str, float]) -> None:
        self.by_cell, self.ran = by_cell, []

    def missing(self, cell: grid.Cell) -> str | None:
        return None

    def is_current(self, line: runner.Line) -> bool:
        return True

    def minutes(self, cell: grid.Cell, device: str) -> float:
        return 2.0

    def run(self, fields: grid.Fields, advance: Any, device: str) -> dict[str, Any]:
        name = f"{fields['family']} {fields['rate']:g}"
        self.ran.append((name, fields["seed"], device))
        advance(1, "done")
        return {"val_live_bpb": self.by_cell[name]}

    def discard(self, line: runner.Line) -> None:
        pass

    def score(self, line: runner.Line) -> str:
        return f"live {line['result']['val_live_bpb']:.4f}"

    def tables(self, lines: Any) -> list[Table]:
        return []

    def figure(self, lines: Any) -> Figure:
        raise AssertionError


@pytest.fixture
def swept(tmp_path: Path) -> grid.Study:
    (tmp_path / "mine.yaml").write_text(GRID)
    return grid.read_study(str(tmp_path / "mine.yaml"), "tiny")


def test_later_seeds_run_at_the_best_rate(swept: grid.Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    kind = Scores({"a 0.5": 2.0, "a 1": 1.0, "b 0.5": 1.0, "b 1": 2.0})
    runner.run_study(swept, kind, tmp_path / swept.results, progress=False, device="cpu:0")
    assert "6 cells to run, about 12 min in all" in capsys.readouterr().out
    assert kind.ran[:4] == [(name, 0, "cpu:0") for name in ("a 0.5", "b 0.5", "a 1", "b 1")]
    assert sorted(kind.ran[4:]) == [("a 1", 1, "cpu:0"), ("b 0.5", 1, "cpu:0")]
    assert not list(tmp_path.glob("*.claims/*"))


def test_what_another_process_runs_is_left_to_it(swept: grid.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is waited for, and taken over when it is left; later seeds whose own sweep is done do not wait for it."""
    file = tmp_path / swept.results
    others = swept.cells[0]
    kind = Scores({"a 0.5": 2.0, "a 1": 1.0, "b 0.5": 1.0, "b 1": 2.0})
    with contextlib.ExitStack() as held:
        path = held.enter_context(runner.claim(file, others))
        assert path is not None
        with runner.claim(file, others) as again:
            assert again is None
        path.write_text("elsewhere 1")  # another machine's
        waits = []

        def wait(seconds: float) -> None:
            waits.append(list(kind.ran))
            old = time.time() - 2 * runner.ABANDONED
            os.utime(path, (old, old))

        monkeypatch.setattr(runner.time, "sleep", wait)
        runner.run_study(swept, kind, file, progress=False)
    (before,) = waits
    assert [(name, seed) for name, seed, _ in before] == [("b 0.5", 0), ("a 1", 0), ("b 1", 0), ("b 0.5", 1)]
    assert [(name, seed) for name, seed, _ in kind.ran[4:]] == [("a 0.5", 0), ("a 1", 1)]


def test_a_cell_that_fails_stops_no_other(swept: grid.Study, tmp_path: Path):
    kind = Scores({"a 1": 1.0, "b 0.5": 1.0, "b 1": 2.0})
    with pytest.raises(ValueError, match=r"1 cells failed, .* half/a/0: KeyError: 'a 0.5'"):
        runner.run_study(swept, kind, tmp_path / swept.results, progress=False)
    assert len(runner.read_lines(tmp_path / swept.results)) == 5
    kind.by_cell["a 0.5"] = 3.0
    assert len(runner.run_study(swept, kind, tmp_path / swept.results, progress=False)) == 6


def test_words_that_are_no_choice(swept: grid.Study, tmp_path: Path):
    with pytest.raises(ValueError, match="no cell has the choice c; choose among 0, 1, a, b, half, one"):
        runner.run_study(swept, Scores({}), tmp_path / swept.results, only=("c",), progress=False)
    (tmp_path / "bad.yaml").write_text(GRID.replace("    axes:", "    without: [[a, hlaf]]\n    axes:"))
    with pytest.raises(ValueError, match="`without` has 'hlaf', which is no choice; the choices are a, b, half, one"):
        grid.read_study(str(tmp_path / "bad.yaml"), "tiny")


def test_the_claim_of_a_dead_process_of_this_machine_is_nobodys(swept: grid.Study, tmp_path: Path):
    file = tmp_path / swept.results
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    path = runner.claim_file(file, swept.cells[0])
    path.parent.mkdir()
    gone = dead.stdout.strip()
    for owner, held in ((f"{platform.node()} {gone}", False), (f"elsewhere {gone}", True)):
        path.write_text(owner)
        assert runner.is_claimed(path) is held
    path.write_text(f"{platform.node()} {os.getpid()}")
    assert runner.is_claimed(path)


@pytest.mark.parametrize("edition", ["tiny", "small"])
@pytest.mark.parametrize("study", ["source", "injection"])
def test_source_and_injection_share_the_rivals_runs(study: str, edition: str):
    rivals = {cell.key: cell.choices[-1] for cell in grid.read_study("rivals", edition).cells}
    cells = grid.read_study(study, edition).cells
    shared = {cell.choices[-1]: rivals[cell.key] for cell in cells if cell.key in rivals}
    depth = cells[0].fields["size"]["depth"]
    alike = ["transformer", "token shift", "token shift, 2 channels"]
    own = {
        "source": {f"0 and {depth}, channels": "recommended, shared"},
        "injection": {"both, shared": "recommended, shared", "both, layerwise": "recommended"},
    }
    if study == "injection":
        alike.append("token shift, 2 channels, layerwise")
    assert shared == {**{name: name for name in alike}, **own[study]}


def test_a_swept_axis_must_be_there(tmp_path: Path):
    (tmp_path / "bad.yaml").write_text(GRID.replace("axis: rate", "axis: pace"))
    with pytest.raises(ValueError, match="sweeps over pace, which is none of its axes: rate, family"):
        grid.read_study(str(tmp_path / "bad.yaml"), "tiny")


# --- tables and figures ------------------------------------------------------------------------------------------


def line(
    family: str, seed: int, live: float, rate: str = "one", text: str = "code", val: float | None = None, **more: Any
) -> runner.Line:
    scores = {
        "parameters": 1000,
        "parameters_without_tables": 700,
        "forwards": 1,
        "flops_per_generated_token": 2e6,
        "step_ratio": 1.0 + len(family) / 10,
        "schedule_ratio": 1.2,
        "decode_ratio": 1.1,
        "training_flops": 3e9 if family == "transformer" else 6e9,
        "tokens": 5000,
        "val_live_bpb": live + 0.01 if val is None else val,
        "test": {"live_bpb": live, "parallel_bpb": live},
        **more,
    }
    factor = {"half": 0.5, "one": 1, "double": 2}[rate]
    return {
        "seed": seed,
        "choices": {"text": text, "rate": rate, "family": family},
        "fields": {"rate": factor},
        "result": scores,
    }


def test_differences_are_paired_by_seed_with_a_t_interval():
    """By hand: differences -0.1, -0.2, -0.3 of a mean of 2; their deviation 0.1, t(2) = 4.3027, so ± 0.2484."""
    plain = [line("transformer", s, 2.0 + 0.1 * s - 0.1) for s in range(3)]
    shared = [line("shared", s, 2.0 + 0.1 * s - 0.1 - 0.1 * (s + 1)) for s in range(3)]
    assert str(comparisons.paired_difference(shared, plain)) == "-10.0 % ± 12.4"
    assert str(comparisons.paired_difference(shared[:2], plain)) == "-7.7 % (2 seeds)"
    assert comparisons.paired_difference(shared, [line("transformer", 7, 2.0)]) is None
    assert comparisons.t_half_width([-0.1, -0.2, -0.3]) == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)


def test_a_table_shows_each_family_at_its_best_rate():
    lines = [
        *(line("transformer", s, 2.0 + s / 100) for s in range(3)),
        line("transformer", 0, 2.5, "half"),
        *(line("shared", s, 1.8 + s / 100, "double", val=1.7) for s in range(3)),
        line("shared", 0, 1.7, "one", val=1.9),  # better on test, which decides nothing
        line("shared", 0, 2.1, "one", text="books"),
        line("transformer", 0, 2.3, "one", text="books"),
    ]
    shown = markdown(comparisons.comparison_tables(lines))
    code, books = shown.split("### books")
    assert "### code" in code
    assert "| transformer | 1 (0.5, 1, edge) | 3 | 1,000 | 700 | 1 | 1.00 | 1.00 |" in code
    assert "| shared | 2 (1, 2, edge) | 3 | 1,000 | 700 | 1 | 1.00 | 2.00 |" in code
    assert "**1.8100** | -10.0 % ± 0.0 |" in code
    assert "-8.7 % (1 seed)" in books
    assert "0.767" not in shown
    assert "0.767" in markdown(comparisons.comparison_tables(lines, comparisons.PUBLISHED))
    assert "memory zero" not in shown  # nothing of the kind was measured


def test_a_diverged_run_is_counted_not_hidden():
    lost = line("shared", 0, 9.9)
    sizes = ("parameters", "parameters_without_tables", "forwards", "flops_per_generated_token")
    lost["result"] = {k: lost["result"][k] for k in sizes} | {"diverged": "the loss at step 3 is nan"}
    shown = markdown(comparisons.comparison_tables([line("transformer", 0, 2.0), lost]))
    assert "| shared | 1 (1) | 0, 1 diverged |" in shown
    first = {**lost, "seed": 0, "choices": {**lost["choices"], "family": "transformer"}}
    shown = markdown(comparisons.comparison_tables([first, line("transformer", 1, 2.0), lost, line("shared", 1, 1.9)]))
    assert "| shared | 1 (1) | 1, 1 diverged | 1,000 | 700 | 1 | 1.00 | 2.00 |" in shown


def test_figures_are_drawn(tmp_path: Path):
    lines = [line(name, s, value + s / 50) for name, value in (("transformer", 2.0), ("shared", 1.8)) for s in (0, 1)]
    for number, draw in enumerate((figures.frontier_figure, figures.source_figure)):
        save_figure(lambda draw=draw: draw(lines), tmp_path / f"{number}.svg")
        text = (tmp_path / f"{number}.svg").read_text()
        assert "shared" in text
        save_figure(lambda draw=draw: draw(lines), tmp_path / "again.svg")
        assert (tmp_path / "again.svg").read_text() == text
    assert (tmp_path / "0.svg").read_text().count("<path") >= 10


def test_the_rivals_figure_has_a_panel_per_text_and_a_mark_per_equal_thing():
    lines = [
        {**line(name, s, bpb + s / 50), "choices": {"text": text, "equal": equal, "rate": "one", "family": name}}
        for text in ("code", "books")
        for equal in ("tokens", "wall-clock")
        for name, bpb in (("transformer", 2.0), ("token shift", 1.9), ("shared", 1.8))
        for s in range(3)
    ]
    figure = figures.differences_figure(lines)
    code, books = figure.axes
    assert (code.get_title(), books.get_title()) == ("code", "books")
    assert [label.get_text() for label in code.get_yticklabels()] == ["token shift", "shared"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["equal tokens", "equal wall-clock"]
    dots = [(line.get_xdata()[0], line.get_color()) for line in code.lines if line.get_marker() == "o"]
    assert [place for place, _ in dots] == pytest.approx([-10 / 2.02, -20 / 2.02])
    assert [colour for _, colour in dots] == [FAMILIES["token shift"], FAMILIES["lrt"]]
    assert len(figures.differences_figure([]).axes) == 1


def test_only_the_frontier_and_the_transformer_have_names():
    """`loop 2` is slower and worse than `shared`; `ponder` is slower and better; the Transformer is the reference."""
    scores = {"transformer": (1.0, 2.0), "shared": (0.9, 1.8), "loop 2": (1.5, 1.9), "ponder": (2.0, 1.7)}
    lines = [line(name, s, bpb + s / 50, step_ratio=time) for name, (time, bpb) in scores.items() for s in range(3)]
    (panel,) = figures.frontier_figure(lines).axes
    assert {text.get_text() for text in panel.texts} == {"transformer", "shared", "ponder"}
    points = [figures.Point(name, time, score, 0.0) for name, (time, score) in scores.items()]
    assert [point.name for point in figures.frontier(points)] == ["shared", "ponder"]


def test_names_beside_a_panel_lie_on_nothing():
    places = figures.spread([0.1, 0.11, 0.12, 0.5, 0.99, 1.0], 0.06)
    assert all(b - a >= 0.06 - 1e-12 for a, b in itertools.pairwise(places))
    assert places[0] == 0.1
    assert places[3] == 0.5
    assert max(places) <= 1.0


def test_in_the_overview_everything_is_held_against_the_strongest_control():
    names = [*comparisons.BASELINES, "shared"]
    lines = [{**line(name, s, 2.0), "choices": {"rate": "one", "family": name}} for name in names for s in range(3)]
    (table,) = comparisons.overview_tables(lines)
    assert table.head[-3:] == [f"vs {name}" for name in (names[0], names[1], names[3])]
    (without,) = comparisons.overview_tables([cell for cell in lines if cell["choices"]["family"] != names[3]])
    assert without.head[-3:] == [f"vs {name}" for name in names[:3]]


def scaling_lines(sizes: int) -> Iterator[runner.Line]:
    """`shared` spends twice the FLOPs per token and 1.6 times the time, and each FLOP is worth 1.5."""
    for i in range(sizes):
        for family, gain in (("transformer", 1.0), ("shared", 1.5)):
            flops = 1e13 * 2**i * (1 if family == "transformer" else 2)
            loss = 0.7 + 0.5 * (gain * flops / 1e14) ** -0.2 + 0.001 * (-1) ** i
            yield line(family, 0, loss, text=f"size {i}", training_flops=flops)


def test_scaling_gives_a_multiplier_with_its_interval(tmp_path: Path):
    lines = list(scaling_lines(9))
    table = comparisons.scaling_table(lines)
    row = next(r for r in table.body if r[:2] == ["shared", "9"])
    for axis, expected in (("× at equal tokens", 3.0), ("× at equal FLOPs", 1.5), ("× at equal time", 3.0 / 1.6)):
        entry = row[table.head.index(axis)]
        value, low, high = (float(x) for x in entry.replace("[", "").replace("]", "").replace(",", "").split())
        assert low <= value <= high
        assert value == pytest.approx(expected, rel=0.1)
    itself = next(r for r in table.body if r[:2] == ["transformer", "9"])
    assert itself[4:6] == ["1 [1, 1]"] * 2
    save_figure(lambda: figures.scaling_figure(lines), tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").stat().st_size > 1000


def test_without_eight_sizes_there_is_no_multiplier():
    assert "8 sizes are needed" in comparisons.scaling_table(list(scaling_lines(7))).markdown()


@pytest.mark.slow
def test_laws_are_compared_over_the_sizes_that_both_have():
    whole = list(scaling_lines(10))
    lacking = [cell for cell in whole if (cell["choices"]["family"], cell["choices"]["text"]) != ("shared", "size 9")]
    fewer = list(scaling_lines(9))
    row = {name: comparisons.scaling_table(lines).body[1] for name, lines in (("lacking", lacking), ("fewer", fewer))}
    assert row["lacking"] == row["fewer"]
    one, other = (comparisons.sizes_by_family(lacking)[family] for family in ("transformer", "shared"))
    assert [size.group for size in other] == [size.group for size in one][:9]


def test_at_equal_wall_clock_the_transformer_is_that_of_equal_tokens():
    lines = [
        {**cell, "choices": {"equal": equal, "rate": "one", "family": cell["choices"]["family"]}}
        for equal, cell in (
            *(("tokens", line("transformer", s, 2.0)) for s in range(3)),
            *(("tokens", line("shared", s, 1.8)) for s in range(3)),
            *(("wall-clock", line("shared", s, 1.9)) for s in range(3)),
        )
    ]
    tables = comparisons.overview_tables(lines)
    assert [table.title for table in tables] == ["equal tokens", "equal wall-clock"]
    assert "| shared | 1 | 2.00 | 1.60 | 1.10 | 1.8000 | -10.0 % ± 0.0 |" in tables[0].markdown()
    assert "| shared | 1 | 2.00 | 1.60 | 1.10 | 1.9000 | -5.0 % ± 0.0 |" in tables[1].markdown()
    tokens, clock = comparisons.comparison_tables(lines)
    assert (tokens.title, clock.title) == ("tokens", "wall-clock")
    assert "| -5.0 % ± 0.0 |" in clock.markdown()
    assert "| -10.0 % ± 0.0 |" in tokens.markdown()


def test_a_report_of_studies(tmp_path: Path):
    """From the lines alone: of a study that comes with the library, and of one whose file is elsewhere."""
    lines = [
        line(name, s, value + s / 50)
        | {"study": "mine", "edition": "tiny", "kind": "language", "cell": f"{name}/{s}", "key": f"{name} {s}"}
        for name, value in (("transformer", 2.0), ("shared", 1.8))
        for s in (0, 1)
    ]
    file = tmp_path / "mine.tiny.jsonl"
    file.write_text("".join(json.dumps(cell) + "\n" for cell in (*lines, lines[0])))
    main(["report", str(file), "results/state-tracking.tiny.jsonl", "--out", str(tmp_path / "r.html")])
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 2
    assert "4 cells are done." in page
    assert "<td>-10.0 % (2 seeds)</td>" in page
    assert "S5 by swaps" in page
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "nothing.jsonl"), "--out", str(tmp_path / "r.html")])


# --- from the command line ---------------------------------------------------------------------------------------


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small text of that name."""
    monkeypatch.setattr(texts, "TEXTS", tmp_path / "texts")
    sentences = " ".join(
        f"{a} {b} sat on the {c}." for a in ["the", "my", "your"] for b in ["cat", "dog"] for c in ["mat", "log"]
    )
    (tmp_path / "story.txt").write_text((sentences + "\n") * 40)
    prepare(tmp_path / "texts" / "story", [tmp_path / "story.txt"], 280, progress=False, workers=0)


@pytest.mark.usefixtures("story")
def test_a_text_that_is_prepared_again_is_read_again(tmp_path: Path):
    before = texts.open_text("story")
    assert texts.open_text("story") is before
    (tmp_path / "story.txt").write_text("another story, of other words\n" * 200)
    prepare(tmp_path / "texts" / "story", [tmp_path / "story.txt"], 280, progress=False, workers=0)
    assert texts.open_text("story").fingerprint != before.fingerprint


def test_a_line_is_stale_when_the_plugin_of_its_model_was_edited(tmp_path: Path):
    """A plugin that its run does not need decides nothing."""
    with restored():
        for name in ("low_rank_injection", "other"):
            source = EXAMPLE.read_text().replace('"low_rank"', f'"low_rank{name[:5]}"')
            (tmp_path / f"{name}.py").write_text(source)
            plugins.load_file(tmp_path / f"{name}.py")
        fields = {**FIELDS, "model": {"memory": {"injection": "low_ranklow_r"}}}
        run = language.build_run(fields, 300).to_dict()
        records = plugins.describe(list(plugins.REGISTERED.items()))
        line = {"fields": {**fields, "text": "elsewhere"}, "plugins": records, "result": {"data": "", "run": run}}
        assert language.Language().is_current(line)
        for name, current in (("other", True), ("low_rank_injection", False)):
            older = [
                {**record, "sha256": "of another file"} if record["name"] == name else record for record in records
            ]
            assert language.Language().is_current({**line, "plugins": older}) is current


SMALL: dict[str, Any] = {
    "text": "story",
    "size": {"depth": 2, "width": 16, "heads": 2, "context": 16},
    "optim": OPTIM,
    "batch_size": 2,
    "horizon": "tokens=160",
    "targets": 60,
    "settling": 30,
    "widened_to": "layerwise",
}


@pytest.mark.usefixtures("story")
def test_a_long_cell_goes_on_where_it_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fields = {**SMALL, "seed": 0, "family": "recommended", "copying": 1}
    kind, steps = language.Language(), []

    def advance(amount: float, text: str = "") -> None:
        steps.append(text)
        if text.startswith("step 3 ") and len(steps) < 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(language, "KEEP_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        kind.run(fields, advance, "cpu")
    assert len(list((tmp_path / "unfinished").iterdir())) == 1
    monkeypatch.setattr(language, "KEEP_EVERY", 3600.0)
    gone_on = kind.run(fields, advance, "cpu")
    assert [step for step, *_ in gone_on["copying"]] == [1, 2, 3, 4, 5]  # those before it was stopped, too
    assert steps[4] == "goes on after step 2"
    assert steps[5].startswith("step 3 of 5")
    assert len(list((tmp_path / "unfinished").iterdir())) == 1  # until its line is on the disk
    kind.discard({"result": json.loads(json.dumps(gone_on))})
    assert not list((tmp_path / "unfinished").iterdir())
    whole = kind.run(fields, advance, "cpu")
    times = {"train_seconds": 0}
    assert {**gone_on, **times} == {**whole, **times}


@pytest.mark.usefixtures("story")
def test_the_loss_of_a_cell_that_went_on_is_that_of_all_its_last_steps(monkeypatch: pytest.MonkeyPatch):
    fields = {**SMALL, "seed": 0, "family": "transformer", "horizon": "steps=40", "settling": 0}
    run = language.build_run(fields, texts.open_text("story").vocab_size)

    def train(stop_at: str = "never") -> float:
        def advance(amount: float, text: str = "") -> None:
            if text.startswith(stop_at):
                raise KeyboardInterrupt

        return language.train_cell(run, texts.open_text("story"), "cpu", advance)[1].loss

    monkeypatch.setattr(language, "KEEP_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train("step 40 ")  # the snapshot is of step 39; the loss is the mean of two steps
    gone_on = train()
    data = texts.open_text("story")
    shutil.rmtree(language.snapshot_folder(run.to_dict(), data.fingerprint))
    assert train() == gone_on


@pytest.mark.usefixtures("story")
def test_a_cell_that_diverges_keeps_no_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, seen = Trainer.step, []

    def step(self: Trainer) -> dict[str, float]:
        if self.progress.step == 3:
            seen.extend((tmp_path / "unfinished").iterdir())
            raise Diverged("at step 3 the loss is nan", 2)
        return whole(self)

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(language, "KEEP_EVERY", 0.0)
    scores = language.Language().run({**SMALL, "seed": 0, "family": "transformer"}, lambda *_: None, "cpu")
    assert scores["diverged"] == "at step 3 the loss is nan"
    assert len(seen) == 1
    language.Language().discard({"result": scores})
    assert not list((tmp_path / "unfinished").iterdir())


@pytest.mark.usefixtures("story")
def test_a_study_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.yaml").write_text(f"""
kind: language
editions:
  tiny:
    seeds: [0]
    base: {json.dumps(SMALL)}
    axes:
      family:
        transformer: {{family: transformer}}
        ponder: {{family: ponder}}
        recommended: {{family: recommended, equal: compute}}
        in time: {{family: recommended, equal: wall_clock}}
        absent: {{family: recommended, text: poems}}
""")
    arguments = ["study", str(tmp_path / "mine.yaml"), "--results", str(tmp_path)]
    main(arguments)
    out = capsys.readouterr().out
    assert "4 cells to run" in out
    assert "1 cells are left out: the text 'poems' is not there; prepare it with: lrt prepare" in out
    lines = {r["choices"]["family"]: r for r in runner.read_lines(tmp_path / "mine.tiny.jsonl")}
    plain, ponder, recommended = (lines[name]["result"] for name in ("transformer", "ponder", "recommended"))
    assert plain["tokens"] == ponder["tokens"] == 160
    assert recommended["training_flops"] == pytest.approx(plain["training_flops"], rel=0.2)  # whole steps
    assert ponder["forwards"] == 2
    in_time = lines["in time"]["result"]
    assert in_time["tokens"] == pytest.approx(160 / in_time["step_ratio"], abs=32)  # whole steps
    assert abs(plain["test"]["gap"]) < 1e-6
    assert "live_bpb_memory_zero" in recommended["test"]
    assert "verdict" in recommended
    assert plain["step_ratio"] == 1
    assert ponder["step_ratio"] > 1.2
    done, kind = runner.read_lines(tmp_path / "mine.tiny.jsonl")[-1], KINDS["language"]
    assert kind.is_current(done)
    assert not kind.is_current({**done, "result": {**done["result"], "data": "another text"}})
    older = {**done["result"]["run"], "schedule": "multi_refinement(2)"}  # what the recipe said then
    assert not kind.is_current({**done, "result": {**done["result"], "run": older}})
    kept = json.dumps(lines)
    assert "sat on the" not in kept
    assert (tmp_path / "mine.tiny.svg").is_file()
    main([*arguments, "--show"])
    assert "| ponder | 1 (1) | 1 |" in capsys.readouterr().out
    kept = json.loads((tmp_path / "ratios.json").read_text())
    assert sorted(set(measured) for measured in kept.values()) == [{"step", "schedule", "decode"}] * 2
    os.utime(tmp_path / "ratios.json", (1, 1))
    (tmp_path / "mine.tiny.jsonl").unlink()
    main([*arguments, "--only", "ponder"])
    assert (tmp_path / "ratios.json").stat().st_mtime == 1  # not measured again: horizons stay what they were
    again = runner.read_lines(tmp_path / "mine.tiny.jsonl")[0]["result"]
    assert again["step_ratio"] == ponder["step_ratio"]
    assert again["test"] == ponder["test"]
    assert statistics.fmean(r["seconds"] for r in lines.values()) < 60
    assert set(KINDS) == {"tracking", "state-data", "language", "rivals", "sources", "scaling", "fair", "copying"}
