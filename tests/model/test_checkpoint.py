"""A checkpoint is whole or refused: bit-exact, never unpickled, never half overwritten."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.models import random_model

import lrt
from lrt import MemoryConfig, ModelConfig
from lrt.data.tokenizer import Tokenizer
from lrt.model.checkpoint import about, load, save
from lrt.utils.files import sha256

CONFIG = ModelConfig(
    depth=2,
    width=16,
    heads=2,
    vocab_size=300,
    context=32,
    value_embeddings="all",
    memory=MemoryConfig(source=(0, 2), combine="channels", layers=(1, 2)),
)
ABOUT = {"schedule": "interleaved(2)", "trained": {"tokens": 3}}


def trained(*texts: str) -> Tokenizer:
    return Tokenizer.train([*texts, "some text, größer 🙂"] * 3, 300)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return trained()


def model(seed: int = 0) -> Any:
    return random_model(CONFIG, torch.float32, seed)


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    path = tmp_path / "checkpoint"
    save(path, model(), tokenizer, ABOUT)
    return path


def same_weights(a: Any, b: Any) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def assert_holds(path: Path, seed: int) -> None:
    """The checkpoint is whole and has the weights of `model(seed)`."""
    assert same_weights(load(path)[0], model(seed))


def only(path: Path) -> None:
    """Nothing is left beside the checkpoint."""
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# What is saved


def test_a_checkpoint_is_bit_exact(saved: Path, tokenizer: Tokenizer):
    loaded, read = load(saved)
    assert loaded.config == CONFIG
    assert same_weights(loaded, model())
    assert not loaded.training
    assert read.sha256 == tokenizer.sha256
    text = "größer 🙂 text"
    assert read.encode(text) == tokenizer.encode(text)
    tokens = torch.tensor([[read.bos, *read.encode(text)]])
    assert torch.equal(lrt.score(loaded, tokens), lrt.score(model(), tokens))
    assert about(saved) == ABOUT
    assert lrt.load(saved).tokenizer.sha256 == read.sha256
    only(saved)


def test_a_runs_folder_stands_for_the_checkpoint_in_it(saved: Path):
    assert saved.name == "checkpoint"
    assert same_weights(load(saved.parent)[0], model())
    assert about(saved.parent) == ABOUT


def test_saving_again_what_was_loaded_gives_the_same_files(saved: Path, tmp_path: Path):
    save(tmp_path / "again", *load(saved), about(saved))
    for name in ("model.safetensors", "config.json", "tokenizer.json", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_a_checkpoint_is_safetensors_and_json(saved: Path):
    assert {p.name for p in saved.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json", "manifest.json"}
    safetensors.torch.load_file(saved / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "manifest.json"):
        json.loads((saved / name).read_text())


def called(node: ast.AST) -> str:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def keyword(node: ast.AST, name: str) -> object:
    """The constant that a call gives for keyword `name`."""
    assert isinstance(node, ast.Call)
    return next((k.value.value for k in node.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


SHARDS = "sharded_optimisers.py"


def test_nothing_in_the_library_unpickles():
    # Training's own state is a .pt file, which torch reads without unpickling if it is told so (contract, section 1).
    forbidden = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
    for file in Path(lrt.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.split(".")[0] for alias in node.names}, file
            elif isinstance(node, ast.ImportFrom) and node.module == "pickle":
                # The error that torch raises; and one class, which lets through what an index of shards is made of.
                names = {alias.name for alias in node.names}
                assert names <= {"UnpicklingError"} | ({"Unpickler"} if file.name == SHARDS else set()), file
            elif isinstance(node, ast.ClassDef) and "Unpickler" in map(ast.unparse, node.bases):
                assert "find_class" in {f.name for f in node.body if isinstance(f, ast.FunctionDef)}, file
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, file
                assert not (node.module == "torch" and "load" in {alias.name for alias in node.names}), file
            elif called(node) == "Unpickler":
                raise AssertionError(file)
            elif called(node) == "torch.load":
                assert keyword(node, "weights_only") is True, file
            elif called(node) in ("np.load", "numpy.load"):
                assert keyword(node, "allow_pickle") is False, file


def test_loading_a_model_never_reads_a_pt_file(saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.load", None)
    monkeypatch.setattr("torch.serialization.load", None)
    assert_holds(saved, 0)
    assert about(saved) == ABOUT


# Damage


def rewrite_manifest(path: Path) -> None:
    """What someone does who edits a checkpoint on purpose."""
    names = ("model.safetensors", "config.json", "tokenizer.json")
    entries = {name: {"bytes": (path / name).stat().st_size, "sha256": sha256(path / name)} for name in names}
    (path / "manifest.json").write_text(json.dumps(entries))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def cut(file: Path, drop: int = 1) -> None:
    file.write_bytes(file.read_bytes()[:-drop])


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def foreign_tokenizer(path: Path) -> None:
    trained("entirely different words").save(path / "tokenizer.json")


def without_a_tensor(path: Path) -> None:
    weights = safetensors.torch.load_file(path / "model.safetensors")
    del weights["head.weight"]
    safetensors.torch.save_file(weights, path / "model.safetensors")


def test_scalars_of_earlier_checkpoints_are_read(saved: Path):
    file = saved / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    scalars = [name for name in weights if name.endswith((".alpha", ".beta"))]
    assert scalars
    safetensors.torch.save_file({name: w.squeeze() if name in scalars else w for name, w in weights.items()}, file)
    rewrite_manifest(saved)
    assert_holds(saved, 0)


def test_a_checkpoint_that_says_nothing_of_itself_is_read(saved: Path):
    edit(saved / "config.json", lambda data: data.pop("about"))
    rewrite_manifest(saved)
    assert_holds(saved, 0)
    assert about(saved) == {}


FILES = ("model.safetensors", "config.json", "tokenizer.json", "manifest.json")
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{f"no {name}": (lambda p, name=name: (p / name).unlink(), name) for name in FILES},
    **{f"truncated {n}": (lambda p, n=n: cut(p / n, 40), rf"{n} has \d+ bytes.*truncated") for n in FILES[:-1]},
    "truncated manifest.json": (lambda p: cut(p / "manifest.json", 40), "manifest.json"),
    **{f"flipped {name}": (lambda p, name=name: flip(p / name), name) for name in FILES[:-1]},
    **{f"empty {name}": (lambda p, name=name: (p / name).write_bytes(b""), name) for name in FILES},
    "edited config": (lambda p: edit(p / "config.json", lambda c: c["model"].update(width=24)), "config.json"),
    "foreign tokenizer": (foreign_tokenizer, "tokenizer.json"),
    "future format": (lambda p: edit(p / "config.json", lambda c: c.update(format=2)), "config.json"),
    "no entry": (lambda p: edit(p / "manifest.json", lambda m: m.pop("tokenizer.json")), "tokenizer.json"),
    "odd entry": (lambda p: edit(p / "manifest.json", lambda m: m.update({"config.json": 3})), "config.json"),
    "a list": (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json"),
    "binary manifest": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe\x00"), "manifest.json"),
}
# With a manifest that agrees: what the file itself says is checked as well.
CONSISTENT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated weights": (lambda p: cut(p / "model.safetensors", 40), "model.safetensors"),
    "empty weights": (lambda p: (p / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "a tensor missing": (without_a_tensor, "model.safetensors"),
    "another width": (
        lambda p: edit(p / "config.json", lambda c: c["model"].update(width=24)),
        "model.safetensors",
    ),
    "another depth": (
        lambda p: edit(p / "config.json", lambda c: c["model"].update(depth=3)),
        "model.safetensors",
    ),
    "foreign tokenizer": (foreign_tokenizer, "tokenizer.json"),
    "broken tokenizer": (lambda p: cut(p / "tokenizer.json"), "tokenizer.json"),
    "broken config": (lambda p: cut(p / "config.json", 4), "config.json"),
    "future format": (lambda p: edit(p / "config.json", lambda c: c.update(format=2)), "config.json"),
    "no format": (lambda p: edit(p / "config.json", lambda c: c.pop("format")), "config.json"),
    "no model": (lambda p: edit(p / "config.json", lambda c: c.pop("model")), "config.json"),
    "no tokenizer hash": (lambda p: edit(p / "config.json", lambda c: c.pop("tokenizer_sha256")), "config.json"),
    "an unknown field": (
        lambda p: edit(p / "config.json", lambda c: c["model"].update(experts=8)),
        "config.json",
    ),
    "an impossible value": (
        lambda p: edit(p / "config.json", lambda c: c["model"].update(heads=3)),
        "config.json",
    ),
    "a wrong type": (
        lambda p: edit(p / "config.json", lambda c: c.update(model=[1])),
        "config.json",
    ),
    "a history that is no object": (
        lambda p: edit(p / "config.json", lambda c: c.update(about=[1])),
        "config.json",
    ),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGE.values(), ids=list(DAMAGE))
def test_damage_is_an_error_that_names_the_file(
    damage: Callable[[Path], Any], named: str, saved: Path, capfd: pytest.CaptureFixture[str]
):
    damage(saved)
    for read in (load, about):
        with pytest.raises(ValueError, match=named):
            read(saved)


@pytest.mark.parametrize(("damage", "named"), CONSISTENT.values(), ids=list(CONSISTENT))
def test_damage_with_a_manifest_that_agrees_is_an_error_that_names_the_file(
    damage: Callable[[Path], Any], named: str, saved: Path
):
    damage(saved)
    rewrite_manifest(saved)
    with pytest.raises(ValueError, match=named):
        load(saved)


def test_a_tokenizer_that_is_too_large_is_an_error(tmp_path: Path):
    path = tmp_path / "checkpoint"
    large = Tokenizer.train(["".join(f"word{i % 97} " for i in range(3000))], 310)
    assert large.vocab_size > CONFIG.vocab_size
    save(path, model(), large)
    with pytest.raises(ValueError, match=r"tokenizer\.json has 310 tokens, the model 300"):
        load(path)


def test_a_folder_of_transformers_is_named_as_such(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is a folder of transformers, not a checkpoint; `lrt finetune`"):
        load(tmp_path)


def test_what_is_no_checkpoint_says_so(tmp_path: Path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty", tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=rf"{path.name} is not a checkpoint.*manifest\.json"):
            load(path)


def test_a_folder_that_is_no_checkpoint_is_not_overwritten(tmp_path: Path, tokenizer: Tokenizer):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(ValueError, match="thesis holds something that is no checkpoint; choose another folder"):
        save(tmp_path / "thesis", model(), tokenizer)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"
    only(tmp_path / "thesis")
    (tmp_path / "file").write_text("text")
    with pytest.raises((ValueError, OSError), match="file"):
        save(tmp_path / "file", model(), tokenizer)
    assert (tmp_path / "file").read_text() == "text"


def test_saving_makes_folders_and_replaces_checkpoints(tmp_path: Path, tokenizer: Tokenizer):
    path = tmp_path / "runs" / "a" / "checkpoint"
    path.mkdir(parents=True)  # an empty folder is nobody's work
    for seed in (0, 1, 2):
        save(path, model(seed), tokenizer)
        assert_holds(path, seed)
        only(path)


def test_what_else_lies_in_the_folder_stays(saved: Path, tokenizer: Tokenizer):
    """`lrt evaluate CHECKPOINT` writes there, and a run that goes on saves its checkpoint again."""
    (saved / "evaluation" / "partial").mkdir(parents=True)
    (saved / "evaluation" / "partial" / "ledger.jsonl").write_text("hours of work")
    (saved / "training.pt").write_text("an older one's")
    save(saved, model(1), tokenizer)
    assert_holds(saved, 1)
    assert (saved / "evaluation" / "partial" / "ledger.jsonl").read_text() == "hours of work"
    assert not (saved / "training.pt").exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_mode_that_the_umask_says(tmp_path: Path, tokenizer: Tokenizer, umask: int, mode: int):
    """safetensors writes through a temporary file, which only its owner can read."""
    before = os.umask(umask)
    try:
        save(tmp_path / "a", model(), tokenizer)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "a").iterdir()} == {mode}


# Saves that fail

SAVING = """
import resource, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_checkpoint import load, model, save
path = Path({path!r})
tokenizer = load({whole!r})[1]
def attempt():
    try:
        save(path, model(1), tokenizer)
    except OSError as error:
        print("OSError:", str(error).splitlines()[0])
    else:
        print("saved")
{before}
attempt()
"""


def save_in_another_process(path: Path, whole: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """Save `model(1)` to `path` in a process of its own, after `before`; the tokenizer is that of `whole`."""
    code = SAVING.format(tests=str(Path(__file__).parent), path=str(path), whole=str(whole), before=before)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


LIMITED = """
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
attempt()
assert torch.equal(load(path)[0].head.weight, model(0).head.weight)
assert [p.name for p in path.parent.iterdir()] == [path.name]
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
"""


def test_a_write_that_fails_leaves_the_old_checkpoint(saved: Path):
    # A real limit on the size of a file: the kernel refuses to write past it. Without it the same code saves.
    assert (saved / "model.safetensors").stat().st_size > 20_000
    done = save_in_another_process(saved, saved, LIMITED)
    failed, then = done.stdout.splitlines()
    assert failed.startswith("OSError:"), done.stdout + done.stderr
    assert then == "saved", done.stdout + done.stderr
    assert_holds(saved, 1)


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk of half a megabyte, of its own."""
    folder = tmp_path_factory.mktemp("disk")
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_checkpoint(small_disk: Path, tokenizer: Tokenizer):
    path = small_disk / "checkpoint"
    save(path, model(0), tokenizer, ABOUT)
    used = sum(p.stat().st_size for p in path.iterdir())
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - used // 2))
    done = save_in_another_process(path, path)
    assert done.stdout.startswith("OSError:"), done.stdout + done.stderr
    assert_holds(path, 0)
    assert {p.name for p in small_disk.iterdir()} == {"checkpoint", "filler"}
    filler.unlink()
    save(path, model(1), tokenizer, ABOUT)  # with room again
    assert_holds(path, 1)


def test_an_error_while_writing_leaves_the_old_checkpoint(
    saved: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    for name in ("safetensors.torch.save_file", "lrt.model.checkpoint.sha256", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                save(saved, model(1), tokenizer)
        assert_holds(saved, 0)
        only(saved)


def test_a_save_that_fails_between_its_renames_is_recovered(
    saved: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    rename, calls = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("the second rename fails")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="the second rename fails"):
            save(saved, model(1), tokenizer)
    assert len(calls) == 2
    assert_holds(saved, 0)
    assert about(saved) == ABOUT
    only(saved)


KILLED = """
renames = []
def dying(self, target, rename=Path.rename):
    renames.append(target)
    if len(renames) == {at}:
        __import__("os").kill(__import__("os").getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = dying
"""


@pytest.mark.parametrize("at", [1, 2], ids=["before-the-first-rename", "between-the-renames"])
def test_a_process_killed_while_saving_leaves_the_old_checkpoint(at: int, saved: Path, tokenizer: Tokenizer):
    done = save_in_another_process(saved, saved, KILLED.format(at=at))
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert saved.exists() == (at == 1)
    assert_holds(saved, 0)
    save(saved, model(2), tokenizer)  # and the next save cleans up
    assert_holds(saved, 2)
    only(saved)


def test_a_new_save_after_one_that_was_killed_needs_no_load_between(saved: Path, tokenizer: Tokenizer):
    saved.rename(saved.with_name(f".{saved.name}.previous"))
    save(saved, model(2), tokenizer)
    assert_holds(saved, 2)
    only(saved)
