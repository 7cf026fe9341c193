"""What was measured before counts: every committed result line is still one that its study would come to.

For each line of results/*.jsonl its cell is built from the shipped YAML. Key and resolved configuration must be equal,
defaults filled in on both sides: a field that an old line lacks means that field's default. So a changed recipe, or a
changed default of a configuration, fails here; it needs a new field, or the runs anew.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lrt.experiments import rivals
from lrt.experiments.state_tracking.tasks import TASKS
from lrt.experiments.state_tracking.training import TrackingRun
from lrt.experiments.studies import grid, language, runner, state_data, texts
from lrt.experiments.studies.kinds import find_kind
from lrt.experiments.studies.state_tracking import TESTS, tracking_run
from lrt.model.config import ModelConfig
from lrt.model.memory_config import MemoryConfig
from lrt.model.size import count_parameters
from lrt.schedules.flops import training_flops
from lrt.schedules.parse import parse
from lrt.training.config import RunConfig
from lrt.training.optim_config import OptimConfig

RESULTS = Path(__file__).resolve().parents[2] / "results"
LANGUAGE = [
    "injection.tiny",
    "onset.longer",
    "onset.tiny",
    "onset.variants",
    "rivals.tiny",
    "scaling.tiny",
    "schedule.tiny",
    "source.tiny",
]
TRACKING = ["state-tracking.small", "state-tracking.stream", "state-tracking.tiny"]
STATE_DATA = ["state-data.deeper", "state-data.four_heads", "state-data.tiny"]

# Lines of language keep their whole RunConfig. Lines of state tracking keep the cell's fields alone; what those leave
# out meant this when they were written. A field that a configuration gets later is not listed: its default serves.
MODEL: dict[str, Any] = {
    "kv_heads": None, "head_size": None, "value_embeddings": "none", "window_pattern": "L", "window": None,
    "mlp_ratio": 4.0, "mlp_width": None, "rope_base": 10000.0, "softcap": 15.0, "skip_init": 0.1, "loops": 1,
    "thoughts": 0,
    "memory": {
        "injection": "both", "projection": "shared", "source": None, "combine": "sum", "initial": "zeros", "delay": 1,
        "layers": None, "residual_init": 0.1,
    },
}  # fmt: skip
OPTIM: dict[str, Any] = {
    "weight_decay": 0.0, "warmdown": 0.5, "momentum": (0.85, 0.95), "momentum_steps": 300, "reference_batch": 524288,
    "clip": None,
}  # fmt: skip
TRACKED: dict[str, Any] = {
    "schedule": "sequential()", "steps": 1000, "rows": 64, "shortest": 2, "longest": 40, "by": 2, "mastered": 0.3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Lines are compared by their fingerprints among each other, not with what may be prepared on this machine."""
    monkeypatch.setattr(texts, "TEXTS", tmp_path)


def read(name: str) -> tuple[grid.Study, list[runner.Line]]:
    """A study as it is shipped now, and the lines of results/NAME.jsonl."""
    return grid.read_study(*name.split(".")), runner.read_lines(RESULTS / f"{name}.jsonl")


def current_pairs(name: str) -> list[tuple[grid.Cell, runner.Line]]:
    """The lines with the key of their cell, each with that cell."""
    study, lines = read(name)
    cells = {(cell.name, cell.key): cell for cell in study.cells}
    pairs = [(cells.get((line["cell"], line["key"])), line) for line in lines]
    return [(cell, line) for cell, line in pairs if cell is not None]


def as_json(config: RunConfig | TrackingRun) -> dict[str, Any]:
    """Plain data as a line holds it: lists for tuples."""
    return json.loads(json.dumps(config.to_dict()))


def expected_language_run(cell: grid.Cell, line: runner.Line) -> RunConfig:
    """The run that a cell comes to, its horizon by the line's own ratio of step times."""
    fields = cell.fields
    run = language.build_run(fields, line["result"]["run"]["model"]["vocab_size"])
    baseline = language.baseline_run(run, fields)
    return language.match_horizon(run, baseline, fields.get("equal", "tokens"), line["result"]["step_ratio"])


def test_these_are_the_committed_files():
    names = sorted(LANGUAGE + STATE_DATA + TRACKING)
    assert sorted(path.name for path in RESULTS.glob("*.jsonl")) == [f"{name}.jsonl" for name in names]


@pytest.mark.parametrize("name", LANGUAGE + STATE_DATA + TRACKING)
def test_every_line_is_of_a_cell_of_its_study(name: str):
    """With the key of the cell's fields; or a later line of that cell has it, which replaces this one."""
    study, lines = read(name)
    kind, cells = find_kind(study.kind), {cell.name: cell for cell in study.cells}
    newest = {line["cell"]: line for line in lines}
    assert lines
    for line in lines:
        assert line["cell"] in cells, f"{study.name} has no cell {line['cell']} any more"
        cell = cells[line["cell"]]
        assert newest[cell.name]["key"] == cell.key, f"{cell.name} has other fields now: {cell.fields}"
        if line["key"] == cell.key:
            label = runner.label(study, cell)
            assert {"kind": study.kind, **{key: line[key] for key in label if key in line}} == label  # first: no kind
        assert kind.is_current(line), cell.name
    assert len(runner.study_lines(study, runner.current_lines(kind, RESULTS / study.results))) == len(newest)


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_line_of_language_has_the_run_and_the_costs_of_its_cell(name: str):
    for cell, line in current_pairs(name):
        measured = line["result"]
        run = expected_language_run(cell, line)
        assert as_json(RunConfig.from_dict(measured["run"])) == as_json(run), cell.name
        costs = language.count_costs(run)
        assert {key: measured[key] for key in costs} == costs, cell.name
        if "diverged" not in measured:
            assert measured["tokens"] == run.tokens, cell.name


@pytest.mark.parametrize("name", TRACKING)
def test_a_line_of_state_tracking_means_what_it_meant(name: str):
    for cell, line in current_pairs(name):
        fields, measured = line["fields"], line["result"]
        run = tracking_run(cell.fields)
        model = {**grid.merge_fields(MODEL, fields["model"]), "vocab_size": TASKS[fields["task"]].vocabulary}
        rest = {key: value for key, value in fields.items() if key not in {"model", "optim", *TESTS}}
        written = TrackingRun(
            model=ModelConfig.from_dict(model),
            optim=OptimConfig(**{**OPTIM, **fields["optim"]}),
            **{**TRACKED, **rest},
        )
        assert as_json(written) == as_json(run), cell.name
        assert measured["parameters"] == count_parameters(run.model)[0], cell.name
        assert measured["chance"] == TASKS[run.task].chance, cell.name
        if "diverged" not in measured:
            per_token = training_flops(run.model, parse(run.schedule), run.longest)
            assert measured["training_flops"] == pytest.approx(measured["tokens"] * per_token), cell.name


@pytest.mark.parametrize("name", STATE_DATA)
def test_a_line_of_state_data_has_the_steps_and_the_costs_of_its_cell(name: str):
    for cell, line in current_pairs(name):
        fields, measured = cell.fields, line["result"]
        run = state_data.build_run(fields)
        ratio = fields.get("step_ratio", measured["step_ratio"])
        assert measured["step_ratio"] == ratio, cell.name
        in_time = fields["equal"] == "wall_clock"
        assert measured["steps"] == (round(run.steps / ratio) if in_time else run.steps), cell.name
        assert measured["parameters"] == count_parameters(run.model)[0], cell.name
        assert measured["tokens"] == measured["steps"] * run.rows * run.longest, cell.name
        assert measured["training_flops"] == pytest.approx(measured["tokens"] * state_data.flops(run)), cell.name


def test_studies_name_one_text_by_one_fingerprint_and_share_runs():
    """A line that says `from` has the result of that line, key and all."""
    lines = {name: read(name)[1] for name in LANGUAGE}
    by_source = {(name, line["cell"]): line for name in LANGUAGE for line in lines[name]}
    fingerprints: dict[str, set[str]] = {}
    for line in by_source.values():
        fingerprints.setdefault(line["fields"]["text"], set()).add(line["result"]["data"])
        if "from" in line:
            source, _, cell = line["from"].partition(" ")
            assert line["key"] == by_source[source, cell]["key"]
            assert line["result"] == by_source[source, cell]["result"]
    assert all(len(known) == 1 for known in fingerprints.values())


# --- that all this can fail ----------------------------------------------------------------------------------------


@pytest.fixture
def fresh_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`is_current` asks again, whatever it has answered before."""
    monkeypatch.setattr(language, "matches_fields", language.matches_fields.__wrapped__)


def change_default(monkeypatch: pytest.MonkeyPatch, config: type, name: str, value: Any) -> None:
    """Another default of a field, as if it were written so in the class."""
    names = [field.name for field in dataclasses.fields(config)]
    defaults = list(config.__init__.__defaults__ or ())
    assert len(defaults) == len(names), "every field has one"
    defaults[names.index(name)] = value
    monkeypatch.setattr(config.__init__, "__defaults__", tuple(defaults))


CHANGES = [
    (ModelConfig, "softcap", 30.0),
    (ModelConfig, "rope_base", 500000.0),
    (MemoryConfig, "initial", "embedding"),
    (OptimConfig, "momentum", (0.9, 0.95)),
]


@pytest.mark.usefixtures("fresh_runs")
@pytest.mark.parametrize(("config", "name", "value"), CHANGES)
def test_a_changed_default_is_noticed(monkeypatch: pytest.MonkeyPatch, config: type, name: str, value: Any):
    change_default(monkeypatch, config, name, value)
    study, lines = read("injection.tiny")
    assert not all(find_kind(study.kind).is_current(line) for line in lines)
    with pytest.raises(AssertionError):
        test_a_line_of_language_has_the_run_and_the_costs_of_its_cell("injection.tiny")
    with pytest.raises(AssertionError):
        test_a_line_of_state_tracking_means_what_it_meant("state-tracking.tiny")


@pytest.mark.usefixtures("fresh_runs")
def test_a_changed_recipe_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rivals, "recommended_memory", lambda layers: MemoryConfig(source=layers))
    study, lines = read("rivals.tiny")
    current = {line["choices"]["family"]: find_kind(study.kind).is_current(line) for line in lines}
    assert [family for family, same in current.items() if not same] == ["recommended, shared", "recommended"]


@pytest.mark.usefixtures("fresh_runs")
def test_a_field_that_a_line_lacks_means_its_default():
    """As of lines written before the field was there."""
    study, (line, *_) = read("rivals.tiny")
    run = line["result"]["run"]
    model = {key: value for key, value in run["model"].items() if key not in ("thoughts", "skip_init")}
    model["memory"] = {key: value for key, value in model["memory"].items() if key != "residual_init"}
    older = {**{key: value for key, value in run.items() if key != "precision"}, "model": model}
    kind = find_kind(study.kind)
    assert kind.is_current({**line, "result": {**line["result"], "run": older}})
    assert not kind.is_current({**line, "result": {**line["result"], "run": {**older, "precision": "bfloat16"}}})
