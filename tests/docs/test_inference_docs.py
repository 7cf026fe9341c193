"""One promise: what docs/inference.md shows works. Its blocks run, in order, in a folder with tiny models and texts."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from lrt.cli.main import main
from lrt.data.corpus import stdlib_files
from lrt.experiments.bench.equality import PATHS
from lrt.inference.cost_model import FILE
from lrt.model.memory_config import MemoryConfig
from lrt.model.size import count_parameters

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if not kind for line in block.splitlines()]
TINY = "--model.width 16 --model.heads 2 --model.context 96 --model.mlp-width 24 --batch-size 4 --device-batch 4 "
TRAINED = TINY + "--horizon tokens=2000 --device cpu --eval.every 0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and runs/mine: what the page takes as given."""
    place = tmp_path_factory.mktemp("docs")
    texts = [path.read_text(encoding="utf-8")[:6000] for path in stdlib_files() if path.stat().st_size > 20_000][:60]
    (place / "books.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (place / "prompts.txt").write_text(texts[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        main(shlex.split("prepare runs/data/given --text books.jsonl --vocab-size 400"))
        main(shlex.split(f"train d2 --data runs/data/given --out runs/mine {TRAINED}"))
    return place


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def models_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inference_models", ROOT / "benchmarks" / "inference_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("block", [block for kind, block in BLOCKS if kind == "python"])
def test_python_blocks_run(block: str, inside: Path) -> None:
    exec(compile(block, "docs/inference.md", "exec"), {})


def test_calibrate(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [command for command in COMMANDS if command.startswith("lrt calibrate")]
    assert len(commands) == 2
    for command in commands:
        main(shlex.split(command)[1:])
        assert "fast" in capsys.readouterr().out
        assert (inside / "runs" / "mine" / "checkpoint" / FILE).is_file()


@pytest.mark.slow
def test_measuring(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page's commands; the training in between is done with tiny models by the same names."""
    prepare, script, *measure = [command for command in COMMANDS if not command.startswith("lrt calibrate")]
    main(shlex.split(prepare)[1:])
    assert script == "python benchmarks/inference_models.py --data runs/data/books --out runs/inference"
    for recipe, name in (("d2", "lrt"), ("d2-transformer", "transformer")):
        main(shlex.split(f"train {recipe} --data runs/data/books --out runs/inference/{name} {TRAINED}"))
    capsys.readouterr()
    assert [shlex.split(command)[:3] for command in measure] == [
        ["lrt", "bench", "inference"],
        ["lrt", "bench", "equality"],
    ]
    # Not decoding, which is compiled for minutes.
    main([*shlex.split(measure[0])[1:], "--device", "cpu", "--only", "prefill", "equality"])
    found = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in found["rows"]]
    for beginning in re.findall(r"^\| prefill … (.*?) \|", PAGE, re.MULTILINE):
        assert any(name.startswith("prefill of 96 tokens") and beginning in name for name in names), beginning
    differing = [row for row in found["rows"] if row["name"].endswith("tokens that differ")]
    assert len(differing) == len(PATHS)
    assert all(row["holds"] and row["value"] == 0 for row in differing)
    assert found["hardware"]["threads"] >= 1
    assert (inside / "runs" / "inference" / "lrt" / "checkpoint" / FILE).is_file()
    main([*shlex.split(measure[1])[1:], "--device", "cpu"])
    assert "tokens that differ" in " ".join(capsys.readouterr().out.split())


def test_mistakes(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, said in (
        ("bench inference runs/nowhere", "runs/nowhere/lrt is not a checkpoint"),
        ("bench inference runs/mine --only speed", "unknown section speed; choose of"),
        ("calibrate runs/nowhere", "is not a checkpoint"),
    ):
        with pytest.raises(SystemExit):
            main(shlex.split(command))
        assert said in capsys.readouterr().err


def test_the_pair_is_matched() -> None:
    runs = models_script().runs(4096, 300_000)
    sizes = [count_parameters(run.model)[0] for run in runs.values()]
    assert abs(sizes[0] - sizes[1]) <= 0.005 * sizes[0]
    assert [run.tokens for run in runs.values()] == [302_080, 302_080]
    assert runs["lrt"].model.memory == MemoryConfig()
    assert runs["transformer"].model.memory.injection == "none"
    assert {run.model.context for run in runs.values()} == {1280}


def test_prompts_that_are_alike_or_missing(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["sample", "runs/mine", "--prompt", "It", "It", "--max-new-tokens", "3"])
    _, first, second = capsys.readouterr().out.split("--- prompt ")
    assert first.partition("\n")[2] == second.partition("\n")[2]
    with pytest.raises(SystemExit):
        main(["sample", "runs/mine", "--prompt"])
    assert "names no text" in capsys.readouterr().err
