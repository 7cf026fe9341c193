"""A file of a user's own from `lrt train` to `lrt study`, in real processes; and what is said where it is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.registries import restored
from support.runs import TINY

import lrt
from lrt.cli.main import main
from lrt.model import checkpoint

ROOT = Path(lrt.__file__).parents[1]
EXAMPLE = ROOT / "examples" / "low_rank_injection.py"
TEXT = "def recall(token):\n    return memory[token - 1]  # what the token before it knew\n\n" * 120

ECHO = """
import torch
import lrt
from lrt.experiments.state_tracking.tasks import Task

def echo(rows, length, generator):
    tokens = torch.randint(3, (rows, length), generator=generator)
    return tokens, tokens

lrt.register_task(Task("echo", 3, 3, 1 / 3, echo))
"""
WAVE = """
import lrt

__version__ = "2.5"

@lrt.schedule
def wave(T, turns):
    return [lrt.schedules.Pass(0, T)] * (turns + 1)
"""
STUDY = """
kind: tracking
editions:
  tiny:
    seeds: [0]
    base:
      model: {depth: 2, width: 16, heads: 2, context: 16, window_pattern: S, window: 4, memory: {injection: low_rank}}
      optim: {matrix_lr: 0.02}
      steps: 2
      rows: 2
      longest: 4
      tests: [8]
      sequences: 4
    axes:
      task: {echo: {task: echo}}
      model: {narrow: {}, wide: {model: {width: 32}}}
"""


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    with restored():
        yield


def start(*words: str | Path, cwd: Path, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python …` in a process of its own, which ends with `status`."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=variables, timeout=600
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared text, in `data`."""
    folder = tmp_path_factory.mktemp("plugins")
    for n in range(3):
        (folder / f"{n}.txt").write_text(TEXT)
    main(
        [
            "prepare",
            str(folder / "data"),
            "--text",
            *(str(folder / f"{n}.txt") for n in range(3)),
            "--vocab-size",
            "280",
        ]
    )
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run of the example, trained as its docstring says."""
    words = ["--data", "data", "--out", "run", "--device", "cpu", "--model.memory.injection", "low_rank", *TINY]
    start("-m", "lrt", "--plugin", EXAMPLE, "train", "d2", *words, cwd=folder)
    return folder / "run"


@pytest.fixture(scope="module")
def waved(folder: Path) -> Path:
    """A run whose schedule is a plugin's."""
    (folder / "waving.py").write_text(WAVE)
    words = ["--data", str(folder / "data"), "--out", str(folder / "waved"), "--device", "cpu", *TINY]
    with restored():
        main(["--plugin", str(folder / "waving.py"), "train", "d2", "--schedule", "wave(2)", *words])
    return folder / "waved"


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line on standard error of a command that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    told = capsys.readouterr()
    assert caught.value.code == 2
    assert told.err.startswith("lrt: ")
    assert told.err.count("\n") == 1, told.err
    return told.err


# The example, in real processes


def test_a_checkpoint_names_its_plugin(run: Path) -> None:
    (record,) = checkpoint.about(run)["plugins"]
    digest = lrt.utils.files.sha256(EXAMPLE)  # type: ignore[attr-defined]
    assert record == {
        "name": "low_rank_injection", "version": "1", "sha256": digest, "provides": ["injection low_rank"]
    }  # fmt: skip


def test_evaluate_with_the_plugin(run: Path, folder: Path) -> None:
    done = start(
        "-m", "lrt", f"--plugin={EXAMPLE}", "evaluate", run, "--data", "data", "--at-least", "300", "--json", cwd=folder
    )  # fmt: skip
    assert json.loads(done.stdout)["live_bpb"] > 0
    assert "warning" not in done.stderr


def test_another_hash_is_said(run: Path, folder: Path) -> None:
    (folder / "changed").mkdir()
    changed = folder / "changed" / EXAMPLE.name
    changed.write_text(EXAMPLE.read_text().replace('__version__ = "1"', '__version__ = "1.1"'))
    done = start("-m", "lrt", "--plugin", changed, "sample", run, "--max-new-tokens", "2", cwd=folder)
    (warning,) = (line for line in done.stderr.splitlines() if line.startswith("warning"))
    shas = [lrt.utils.files.sha256(file)[:12] for file in (EXAMPLE, changed)]  # type: ignore[attr-defined]
    for said in ("low_rank_injection, version 1, sha256", "low_rank_injection, version 1.1, sha256", *shas):
        assert said in warning


@pytest.mark.parametrize("verb", ["evaluate", "sample", "export", "diagnose"])
def test_without_its_plugin_a_checkpoint_says_what_it_needs(
    verb: str, run: Path, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rest = {
        "export": [tmp_path / "out"],
        "evaluate": ["--data", folder / "data"],
        "diagnose": ["--data", folder / "data"],
    }
    line = refused(capsys, verb, run, *rest.get(verb, []))
    assert "this checkpoint needs the plugin low_rank_injection: pass --plugin low_rank_injection.py" in line
    assert "version 1, sha256" in line


def test_nothing_is_loaded_by_itself(run: Path, folder: Path) -> None:
    """Not even a file of the right name beside the checkpoint, or where the command is run."""
    for place in (run, folder):
        shutil.copy(EXAMPLE, place)
    done = start("-m", "lrt", "sample", run, "--max-new-tokens", "2", cwd=folder, status=2)
    assert "this checkpoint needs the plugin" in done.stderr
    for place in (run, folder):
        (place / EXAMPLE.name).unlink()


BY_IMPORT = """
import sys, torch
import low_rank_injection
import lrt
model, tokenizer = lrt.load(sys.argv[1])
ids = torch.tensor([[tokenizer.bos, *tokenizer.encode("def recall")]])
print([int(token) for token in lrt.generate(model, ids, 8, lrt.Sampling(temperature=0))])
"""
ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lrt", "low_rank_injection"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer("def recall", return_tensors="pt")
out = model.generate(**ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
print(out[0, ids["input_ids"].shape[1]:].tolist())
"""


@pytest.mark.slow
def test_an_exported_folder_has_the_plugin_in_it(run: Path, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    start("-m", "lrt", "--plugin", EXAMPLE, "export", run, "exported", cwd=folder)
    assert (folder / "exported" / "plugin_low_rank_injection.py").is_file()
    card = " ".join((folder / "exported" / "README.md").read_text().split())
    assert "Part of it is the author's own and no part of lrt: the plugin `low_rank_injection`" in card
    native = start("-c", BY_IMPORT, run, cwd=folder, PYTHONPATH=os.pathsep.join([str(ROOT), str(EXAMPLE.parent)]))
    alone = start("-c", ALONE, folder / "exported", cwd=tmp_path, PYTHONPATH="", HF_MODULES_CACHE=str(tmp_path))
    assert alone.stdout.splitlines()[-1] == native.stdout.splitlines()[-1]


@pytest.mark.slow
def test_a_folder_without_code_asks_for_the_plugin(run: Path, folder: Path) -> None:
    pytest.importorskip("transformers")
    main(["--plugin", str(EXAMPLE), "export", str(run), str(folder / "bare"), "--no-remote-code"])
    assert "import low_rank_injection" in (folder / "bare" / "README.md").read_text()
    program = "import lrt.hf, transformers, sys; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = start("-c", program, folder / "bare", cwd=folder, status=1)
    assert "needs the plugin low_rank_injection: pass --plugin low_rank_injection.py, or import it first" in done.stderr
    both = os.pathsep.join([str(ROOT), str(EXAMPLE.parent)])
    start("-c", f"import low_rank_injection; {program}", folder / "bare", cwd=folder, PYTHONPATH=both)


@pytest.mark.slow
def test_a_studys_workers_inherit_the_plugins(folder: Path) -> None:
    (folder / "echo.py").write_text(ECHO)
    (folder / "mine.yaml").write_text(STUDY)
    files = ("--plugin", EXAMPLE, "--plugin", "echo.py")
    start("-m", "lrt", *files, "study", "mine.yaml", "--results", "results", "--devices", "cpu", "cpu", cwd=folder)
    lines = [json.loads(line) for line in (folder / "results" / "mine.tiny.jsonl").read_text().splitlines()]
    assert sorted(line["choices"]["model"] for line in lines) == ["narrow", "wide"]
    for line in lines:
        assert {record["name"]: record["provides"] for record in line["plugins"]} == {
            "low_rank_injection": ["injection low_rank"], "echo": ["task echo"]
        }  # fmt: skip
    done = start("-m", "lrt", "study", "mine.yaml", "--results", "fresh", cwd=folder, status=2)
    assert "unknown injection 'low_rank'" in done.stderr or "unknown task 'echo'" in done.stderr


# A schedule of one's own


def test_without_its_schedule_a_model_is_scored_live(
    waved: Path, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main(
        ["evaluate", str(waved), "--data", str(folder / "data"), "--at-least", "300", "--json", "--out", str(tmp_path)]
    )
    told = capsys.readouterr()
    scores = json.loads(told.out)
    assert scores["schedule"] == "wave(2)"
    assert "live_bpb" in scores
    assert not {"parallel_bpb", "gap"} & set(scores)
    assert "this checkpoint needs the plugin waving: pass --plugin waving.py" in told.err
    assert "The score under wave(2) is left out" in told.err
    main(["evaluate", str(waved), "--data", str(folder / "data"), "--at-least", "300", "--out", str(tmp_path)])
    model, _ = lrt.load(waved)
    assert model.config.memory.injection == "both"
    main(["sample", str(waved), "--max-new-tokens", "2"])
    assert "parallel BPB" in with_plugin(
        capsys, folder, "evaluate", waved, "--data", folder / "data", "--at-least", "300"
    )


def with_plugin(capsys: pytest.CaptureFixture[str], folder: Path, *words: str | Path) -> str:
    """What a command prints that is given waving.py."""
    capsys.readouterr()
    with restored():
        main(["--plugin", str(folder / "waving.py"), *map(str, words), "--out", str(folder / "evaluation")])
    return capsys.readouterr().out


def test_a_run_is_not_resumed_without_its_schedule(
    waved: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "d2", "--data", folder / "data", "--device", "cpu", *TINY, "--out", folder / "resumed"]
    line = refused(capsys, *words, "--schedule", "plain()", "--resume", waved / "checkpoint")
    assert "this checkpoint needs the plugin waving: pass --plugin waving.py" in line
    assert "version 2.5, sha256" in line
    assert "it registers schedule wave" in line
    with pytest.raises(SystemExit):  # what is wrong with a recipe's own fields is said in a box
        main([*map(str, words), "--schedule", "wave(2)"])
    assert "unknown schedule 'wave'" in " ".join(capsys.readouterr().err.split())


def test_an_export_keeps_a_schedule_that_is_not_loaded(waved: Path, folder: Path) -> None:
    pytest.importorskip("transformers")
    main(["export", str(waved), str(folder / "waved-out")])
    assert json.loads((folder / "waved-out" / "config.json").read_text())["schedule"] == "wave(2)"
    assert not list((folder / "waved-out").glob("plugin_*"))
    with restored():
        main(["--plugin", str(folder / "waving.py"), "export", str(waved), str(folder / "waved-out")])
    assert (folder / "waved-out" / "plugin_waving.py").is_file()


# Files that are none


def test_two_plugins_of_one_name_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other_injection.py"
    other.write_text(EXAMPLE.read_text())
    line = refused(capsys, "--plugin", EXAMPLE, "--plugin", other, "report", "nothing")
    for said in (
        "injection 'low_rank' is registered twice",
        "low_rank_injection.py",
        "other_injection.py",
        "rename one",
    ):
        assert said in line
    same = tmp_path / EXAMPLE.name
    same.write_text(EXAMPLE.read_text() + "\n# changed\n")
    line = refused(capsys, "--plugin", EXAMPLE, "--plugin", same, "report", "nothing")
    assert f"two plugins are called 'low_rank_injection': {EXAMPLE} and {same}; rename one" in line


def test_a_plugin_may_be_named_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing" in refused(capsys, "--plugin", EXAMPLE, "--plugin", EXAMPLE, "evaluate", "nothing")


BAD = {
    "empty.py": ("x = 1\n", "it registers nothing"),
    "broken.py": ("import lrt\nlrt.no_such_name\n", "AttributeError: module 'lrt' has no attribute 'no_such_name'"),
    "syntax.py": ("def\n", "SyntaxError"),
    "leaves.py": ("raise SystemExit(0)\n", "SystemExit"),
    "numpy.py": ("x = 1\n", "Python has another module numpy"),
    "two-words.py": ("x = 1\n", "call the file for example low_rank.py"),
    "notes.txt": ("x = 1\n", "call the file for example low_rank.py"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, said = BAD[name]
    (tmp_path / name).write_text(text)
    line = refused(capsys, "--plugin", tmp_path / name, "report", "nothing")
    assert said in line
    assert name in line


def test_no_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"there is no file {tmp_path / 'gone.py'}" in refused(
        capsys, "--plugin", tmp_path / "gone.py", "train", "d2"
    )
    assert "--plugin names no file" in refused(capsys, "--plugin")


def test_help_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "--plugin FILE.py VERB" in " ".join(capsys.readouterr().out.replace("│", " ").split())


# Installed packages, and data


def install(site: Path, name: str, source: str) -> None:
    """A package with an entry point, as pip would leave it in `site`."""
    (site / f"{name}.py").write_text(source)
    info = site / f"{name}-3.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 3.1\n")
    (info / "entry_points.txt").write_text(f"[lrt.plugins]\n{name} = {name}\n")


INSTALLED = """
import lrt
from lrt.utils import plugins
config = lrt.MemoryConfig(injection="soft")  # nobody imported it
print(plugins.describe(config.plugin_uses()))
"""


def test_installed_packages_register_by_entry_points(tmp_path: Path) -> None:
    source = 'import lrt\nfrom lrt.model.memory import Residual\n\nclass Soft(Residual):\n    """γ m."""\n\n'
    install(tmp_path, "soft_injection", source + 'lrt.register_injection("soft", Soft)\n')
    install(tmp_path, "broken_plugin", "raise RuntimeError('not today')\n")
    done = start("-c", INSTALLED, cwd=tmp_path, PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]))
    (record,) = eval(done.stdout)
    assert (record["name"], record["version"]) == ("soft_injection", "3.1")
    assert record["sha256"] == lrt.utils.files.sha256(tmp_path / "soft_injection.py")  # type: ignore[attr-defined]
    assert "warning: the plugin broken_plugin cannot be loaded, and is left out: not today" in done.stderr


CSV = """
import csv
import lrt

def rows(path):
    with path.open(newline="") as file:
        yield from csv.DictReader(file)

lrt.register_source(".csv", rows)
"""


def test_a_source_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "table.py").write_text(CSV)
    rows = "".join(f'"{n}: the token before it knew {n * n}, and said so, in many words"\n' for n in range(200))
    (tmp_path / "texts.csv").write_text("said\n" + rows)
    words = ["prepare", str(tmp_path / "data"), "--text", str(tmp_path / "texts.csv"), "--field", "said"]
    with restored():
        main(["--plugin", str(tmp_path / "table.py"), *words, "--vocab-size", "280"])
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert sum(split["documents"] for split in manifest["splits"].values()) == 200
    assert manifest["arguments"]["plugins"][0]["provides"] == ["source .csv"]
