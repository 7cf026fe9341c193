"""One promise: what users made with version 0.1.0 still loads, goes on and counts.

`fixtures/v0.1.0` was written by that version: prepared data, a run that was stopped after 10 of 16 steps, the same run
finished, with its measurements and its calibration, a session, and an exported folder without code of its own.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from lrt import MemoryConfig, ModelConfig, Sampling, load, score
from lrt.data.prepared import Prepared
from lrt.eval.report.page import report
from lrt.inference import cost_model
from lrt.inference.session import Session
from lrt.model import checkpoint
from lrt.model.fingerprint import HASHED_ALWAYS, MEMORY_HASHED_ALWAYS, fingerprint
from lrt.training.config import RunConfig
from lrt.training.loop import train
from lrt.training.trainer import Trainer

OLD = Path(__file__).parent / "fixtures" / "v0.1.0"
EXPECTED = json.loads((OLD / "expected.json").read_text())
CLOSE = 1e-4
"""Between machines sums are added up in other orders."""


@pytest.fixture
def data() -> Prepared:
    return Prepared.open(OLD / "data")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run that was stopped, to go on with."""
    return Path(shutil.copytree(OLD / "run", tmp_path / "run"))


def settings() -> RunConfig:
    return RunConfig.from_dict(checkpoint.about(OLD / "run")["run"])


def test_a_checkpoint_loads_and_scores_the_same():
    model, _ = load(OLD / "finished")
    assert score(model, torch.tensor([EXPECTED["prompt"]]))[0].tolist() == pytest.approx(EXPECTED["nats"], abs=CLOSE)


def test_a_snapshot_is_restored_bit_for_bit(data: Prepared, run: Path, tmp_path: Path):
    snapshot = run / "snapshots" / "step-00000010"
    restored = Trainer(settings(), data, "cpu")
    restored.restore(snapshot)
    restored.save(tmp_path / "again", checkpoint.about(snapshot))
    before, after = (torch.load(folder / "training.pt", weights_only=True) for folder in (snapshot, tmp_path / "again"))
    runs = [RunConfig.from_dict(json.loads(training.pop("run"))) for training in (before, after)]
    assert runs[0] == runs[1]  # a field that the old one lacks has its default
    assert flat(before) == flat(after)
    before, after = (load(folder)[0].state_dict() for folder in (snapshot, tmp_path / "again"))
    assert flat(before) == flat(after)


def flat(tree: object) -> object:
    """Nested containers with lists in place of tensors, which == compares to the last bit."""
    if isinstance(tree, torch.Tensor):
        return tree.tolist()
    if isinstance(tree, dict):
        return {key: flat(value) for key, value in tree.items()}
    return [flat(value) for value in tree] if isinstance(tree, list | tuple) else tree


def test_a_stopped_run_goes_on_to_the_end_that_it_had(data: Prepared, run: Path):
    model, _ = train(settings(), data, run, progress=False)
    lines, before = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                     for folder in (run, OLD / "finished"))  # fmt: skip
    assert [line["schedule"] for line in lines] == [line["schedule"] for line in before]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in before], abs=CLOSE)
    finished = load(OLD / "finished")[0].state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, finished[name], rtol=0, atol=CLOSE)


def test_a_session_goes_on():
    model, _ = load(OLD / "finished")
    session = Session.load(OLD / "session", model)
    assert list(session.tokens) == EXPECTED["session"]
    assert list(session.generate(6, Sampling(0.8)).tokens) == EXPECTED["continued"]


def test_an_exported_folder_without_code_loads_beside_lrt():
    program = (
        "import json, sys, torch, lrt.hf\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = torch.tensor([json.loads(sys.argv[2])])\n"
        "print(float(model(ids, labels=ids).loss))\n"
    )
    arguments = [str(OLD / "exported"), json.dumps(EXPECTED["prompt"])]
    process = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    nats = EXPECTED["nats"]
    assert float(process.stdout) == pytest.approx(sum(nats) / len(nats), abs=CLOSE)


def test_fingerprints_stay_as_they_were():
    """Sessions and calibrations name one. Later fields are hashed only where they are not at their default."""
    model, _ = load(OLD / "finished")
    recorded = json.loads((OLD / "session" / "session.json").read_text())["model"]
    assert recorded == "d7ce7483e579e01896dadf80aa42c215519190ca5daa941293eb5a9e67e7b87f"
    assert fingerprint(model) == recorded
    fields = json.loads((OLD / "finished" / "checkpoint" / "config.json").read_text())["model"]
    assert set(fields) == HASHED_ALWAYS
    assert set(fields["memory"]) == MEMORY_HASHED_ALWAYS
    memory = LaterMemory(**dataclasses.asdict(model.config.memory))
    later = LaterConfig(**{**dataclasses.asdict(model.config), "memory": memory})
    model.config = later
    assert fingerprint(model) == recorded
    for changed in (replace(later, rope_scale=2.0), replace(later, memory=replace(memory, decay=0.5))):
        model.config = changed
        assert fingerprint(model) != recorded


@dataclass(frozen=True)
class LaterMemory(MemoryConfig):
    """As a later version may have it: one more field."""

    decay: float = 0.0


@dataclass(frozen=True)
class LaterConfig(ModelConfig):
    """Likewise."""

    memory: MemoryConfig = field(default_factory=LaterMemory)
    rope_scale: float | None = None


def test_measurements_and_calibration_count(tmp_path: Path):
    model, _ = load(OLD / "finished")
    (measured,) = json.loads((OLD / "finished" / "checkpoint" / "calibration.json").read_text())["entries"]
    assert measured["model"] == fingerprint(model)  # else the calibration would be passed over
    assert cost_model.read_calibration(OLD / "finished" / "checkpoint", model).plans
    report(tmp_path / "report.html", [OLD / "finished"])
    page = (tmp_path / "report.html").read_text()
    scores = json.loads((OLD / "finished" / "evaluation" / "bpb-data-val.json").read_text())["values"]
    assert f"{scores['columns']['live']['bpb']:.4f}" in page
