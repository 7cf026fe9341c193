"""Wrong input of every kind, for every flag of every verb: one line, an exit status, no traceback, no work before it.

Flags are read from the dataclasses of the verbs, as tyro does it, so that a new verb or flag is tried without a line
here. What cannot be known from its type (which text is a name, which path is written) is in the tables below.
"""

from __future__ import annotations

import dataclasses
import io
import json
import lzma
import os
import pickle
import resource
import time
import types
import typing
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pytest
import safetensors
import tokenizers
import torch
import tyro
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lrt.cli import verbs
from lrt.cli.main import main
from lrt.data.corpus import stdlib_files
from lrt.data.prepared import Prepared
from lrt.experiments.studies import grid
from lrt.model.checkpoint import save
from lrt.model.config import ModelConfig
from lrt.model.transformer import LatentRecurrentTransformer

# The walk over what tyro makes flags of


@dataclass(frozen=True)
class Flag:
    """A field of a verb, as it is written on the command line."""

    command: tuple[str, ...]
    """The verb and its subcommand."""
    words: tuple[str, ...]
    """What stands before its value: the option, and choices that come first (`--match parameters`)."""
    field: str
    kinds: frozenset[type]
    """Types of its leaves: int, float, Path, str, …; those of a Literal are none."""
    required: bool
    count: int
    """How many values it takes at least."""

    @property
    def name(self) -> str:
        return " ".join((*self.command, *self.words, self.field if not self.words else ""))


def subcommands(hint: Any) -> dict[str, type]:
    """Name -> dataclass of a union of subcommands; of several of one class (recipes) the first."""
    named: dict[type, str] = {}
    for option in typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ():
        kind, *marks = typing.get_args(option) if typing.get_origin(option) is typing.Annotated else (option,)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            own = typing.cast(type, kind)
            named.setdefault(
                own, next((mark.name for mark in marks if getattr(mark, "name", None)), own.__name__.lower())
            )
    return {name: kind for kind, name in named.items()}


def unwrap(hint: Any) -> Any:
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    return hint


def leaves(hint: Any) -> Iterator[Any]:
    hint = unwrap(hint)
    if isinstance(hint, type) and typing.get_origin(hint) is None:
        yield hint
    elif typing.get_origin(hint) is not Literal:
        for part in typing.get_args(hint):
            yield from leaves(part)


def choices_before(hint: Any) -> tuple[str, ...]:
    """The first choice of a Literal that stands in a tuple before another value."""
    hint = unwrap(hint)
    if typing.get_origin(hint) is Literal:
        return (typing.get_args(hint)[0],)
    if typing.get_origin(hint) is not tuple:
        return ()
    parts = [part for part in typing.get_args(hint) if part is not ...]
    return tuple(word for part in parts[: max(1, len(parts) - 1)] for word in choices_before(part)) if parts else ()


def values_of(hint: Any) -> int:
    """How many numbers a pair or the like has; 1 for all else."""
    parts = typing.get_args(unwrap(hint)) if typing.get_origin(unwrap(hint)) is tuple else ()
    return len(parts) if parts and ... not in parts and set(parts) <= {int, float} else 1


def flags(command: tuple[str, ...], kind: type, prefix: str = "--") -> Iterator[Flag]:
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        nested = unwrap(hint)
        if below := subcommands(nested):
            for name, option in below.items():
                yield from flags((*command, name), option)
        elif dataclasses.is_dataclass(nested):
            yield from flags(command, typing.cast(type, nested), f"{prefix}{field.name.replace('_', '-')}.")
        else:
            positional = "Positional" in repr(hint) or "_PositionalMarker" in repr(hint)
            option = () if positional else (f"{prefix}{field.name.replace('_', '-')}",)
            before = choices_before(hint) if {Path, int, float} & set(leaves(hint)) else ()
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            yield Flag(command, (*option, *before), field.name, frozenset(leaves(hint)), required, values_of(hint))


FLAGS = [flag for name in verbs.PLACES for flag in flags((name,), verbs.load(name))]


# Right input for everything that is not under test


class WorkBegan(BaseException):
    """Raised where the work of a verb begins: all that can be known to be wrong has to be refused before."""


BEGINNINGS = (
    "lrt.model.transformer.LatentRecurrentTransformer.forward",
    "lrt.data.tokenizer.Tokenizer.train",
    "lrt.training.loop.run_steps",
    "lrt.experiments.bench.train.alternate",
    "lrt.experiments.bench.steps.alternate",
    "lrt.experiments.bench.attention.alternate",
    "lrt.experiments.doctor.time_product",
    "lrt.serve.server.create_server",
    "lrt.integrations.lm_eval.run_tasks",
    "lrt.integrations.retrofit.folder.AutoModelForCausalLM.from_pretrained",
    "lrt.integrations.finetune.controls.make_trainer",
    "lrt.integrations.finetune.finetune.make_trainer",
)
"""What no wrong flag may reach: a pass of a model, a tokenizer's training, timed rounds, a port that is listened on."""
OUTPUTS = {"out", "results", "figure"}
"""Fields that name what is written."""
FILES = {"figure": "figure.svg"}
"""Those that have to have an ending."""
FREE_TEXT = {
    "prompt", "names", "host", "field", "split_by", "split_until", "dataset", "dataset_config", "dataset_split",
    "dataset_revision", "tasks",
}  # fmt: skip
"""Fields of any text, or of names that only a server on the network knows."""
STUDY = """kind: tracking
editions:
  tiny: {seeds: [0], base: {model: {depth: 1}, optim: {matrix_lr: 1e-3}}, axes: {task: {parity: {task: parity}}}}
"""


def save_llama(folder: Path) -> None:
    """A pretrained decoder and its tokenizer, as transformers saves them."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **size)).save_pretrained(folder)
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(16)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0").save_pretrained(folder)


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A prepared text, a checkpoint of its tokenizer, a study and a text, by the field that takes them."""
    folder = tmp_path_factory.mktemp("right")
    text = folder / "text.txt"
    source = next(path for path in stdlib_files() if path.stat().st_size > 30_000)
    text.write_text(source.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    main(["prepare", str(folder / "data"), "--text", str(text), "--vocab-size", "300"])
    tokenizer = Prepared.open(folder / "data").tokenizer
    torch.manual_seed(0)
    config = ModelConfig(depth=2, width=16, heads=2, vocab_size=tokenizer.vocab_size, context=64)
    for name in ("checkpoint", "pair/lrt", "pair/transformer"):
        save(folder / name, LatentRecurrentTransformer(config), tokenizer, {"schedule": "interleaved(2)"})
    (folder / "study.yaml").write_text(STUDY)
    save_llama(folder / "llama")
    (folder / "chat.jsonl").write_text('{"text": "a state"}\n' * 4)
    right = {
        "folder": "llama",
        "chat": "chat.jsonl",
        "data": "data",
        "text": "text.txt",
        "study": "study.yaml",
        "tokenizer": "data/tokenizer.json",
        "other_run": "pair/lrt",
    }
    return {name: folder / file for name, file in right.items()} | dict.fromkeys(
        ("checkpoint", "checkpoints", "runs", "source", "model"), folder / "checkpoint"
    )


def command_line(flag: Flag, content: str, places: dict[str, Path], tmp_path: Path) -> list[str]:
    """The flag with this content, in a command all of whose other flags are right."""
    words = [*flag.command]
    second = [str(places["other_run"])] if flag.command == ("compare",) else []  # it takes two
    for other in FLAGS:
        # Flags of a verb serve its subcommands too.
        if other.command != flag.command[: len(other.command)] or other.field == flag.field:
            continue
        option = [word for word in other.words if word.startswith("--")]
        if other.field in OUTPUTS:
            words += [*option, str(tmp_path / FILES.get(other.field, other.field))]
        elif other.field == "device":
            words += [*option, "cpu"]
        elif other.required or other.field in ("data", "text"):
            words += [*option, str(places[other.field]), *(second if other.field == "runs" else ())]
    if flag.field in ("tasks_include", "tasks_shots"):
        words += ["--tasks", "arc_easy"]
    if flag.field == "tasks_limit":
        words += ["--core", str(places["data"])]
    if flag.words:
        # A recipe, where the flag is of the verb above it.
        own = len(flag.command)
        longer = (f.command for f in FLAGS if len(f.command) > own and f.command[:own] == flag.command)
        below = next(longer, flag.command)[own:]
        return [*words, *below, *flag.words, *[content] * flag.count]
    after = len(flag.command)
    first = next((f for f in FLAGS if f.command == flag.command and not f.words), flag)
    at = after if first.field == flag.field else after + 1  # positional ones stand in order
    return [*words[:at], content, *(second if flag.field == "runs" else ()), *words[at:]]


Answer = tuple[int | str, str]


@pytest.fixture
def answer(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Flag, str], Answer]:
    """Exit status and standard error of a command; "began" or "done" as the status where nothing was refused."""
    import lrt.experiments.bench.attention
    import lrt.experiments.bench.train
    import lrt.experiments.demo
    import lrt.serve.server  # noqa: F401

    def begin(*arguments: object, **options: object) -> None:
        raise WorkBegan

    for beginning in BEGINNINGS:
        monkeypatch.setattr(beginning, begin)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("a turn\n"))

    def run(flag: Flag, content: str) -> Answer:
        capsys.readouterr()
        begun = time.process_time()
        try:
            main(command_line(flag, content, places, tmp_path))
            status: int | str = "done"
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except WorkBegan:
            status = "began"
        assert time.process_time() - begun < SECONDS
        return status, capsys.readouterr().err

    return run


SECONDS = 5.0
"""Of CPU time, after which an answer is late."""


def refused(answered: Answer) -> bool:
    """Whether a command was answered as a mistake: one line of ours, or tyro's usage and frame."""
    status, errors = answered
    own = [line for line in errors.splitlines() if line.startswith("lrt: ")]
    return status == 2 and "Traceback" not in errors and (len(own) == 1 or "see lrt" in errors)


# Numbers

NO_NUMBER = ("nan", "inf", "-inf", "-1", "1e400", "9" * 5000, "")


NUMBERS = [flag for flag in FLAGS if {int, float} & flag.kinds]


@pytest.mark.slow
@pytest.mark.parametrize("flag", NUMBERS, ids=lambda flag: flag.name)
def test_what_is_no_number_for_a_flag_is_refused(flag: Flag, answer: Callable[[Flag, str], Answer]):
    for content in NO_NUMBER:
        if content == "-1" and flag.field in NEGATIVE:
            continue
        answered = answer(flag, content)
        assert refused(answered), (content, answered)


FAST = [flag for flag in NUMBERS if flag.command[0] in {"train", "sample", "prepare"}]
"""A part of the walk that takes seconds, so that a new flag of theirs without limits is seen at once."""


@pytest.mark.parametrize("flag", FAST, ids=lambda flag: flag.name)
def test_nan_and_numbers_below_zero_are_refused(flag: Flag, answer: Callable[[Flag, str], Answer]):
    for content in ("nan", "-1")[: 1 if flag.field in NEGATIVE else 2]:
        assert refused(answered := answer(flag, content)), (content, answered)


NEGATIVE = {"skip_init", "residual_init"}
"""Weights at first, which may be negative."""


@pytest.fixture
def little_memory() -> Iterator[None]:
    """4 GB more than the process has: what a huge number asks for fails at once, and does not take the machine's."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 1 << 30
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.slow
@pytest.mark.parametrize("flag", NUMBERS, ids=lambda flag: flag.name)
def test_zero_and_huge_numbers_are_refused_or_serve(flag: Flag, answer: Callable[[Flag, str], Answer]):
    """Zero and 10^12 are right for some flags: then the work begins, which it does at once."""
    for content in ("0", "1000000000000", str(10**30)):
        answered = answer(flag, content)
        assert answered[0] in ("began", "done") or refused(answered), (content, answered)


# Names


@pytest.mark.parametrize(
    "flag", [f for f in FLAGS if str in f.kinds and f.field not in FREE_TEXT], ids=lambda f: f.name
)
def test_unknown_names_are_refused(flag: Flag, answer: Callable[[Flag, str], Answer]):
    assert refused(answered := answer(flag, "no-such-name")), answered


# Files


def wrong_files(folder: Path) -> dict[str, Path]:
    """Kind -> a path that is wrong for whatever is read."""
    (folder / "empty").write_bytes(b"")
    (folder / "junk").write_bytes(bytes(range(256)) * 40)
    (folder / "junk.jsonl").write_bytes(bytes(range(256)) * 40)
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "folder").mkdir()
    manifests = {"half": '{"model.safetensors": {"byt', "list": "[]", "deep": "[" * 100_000, "other": '{"a": {"b": 1}}'}
    for name, manifest in manifests.items():
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text(manifest)
        (folder / name / "config.json").write_text(manifest)
    (folder / "loop").symlink_to(folder / "loop")
    return {path.name: path for path in sorted(folder.iterdir())} | {
        "missing": folder / "missing",
        "below a file": folder / "junk" / "below",
        "a name too long": folder / ("n" * 5000),
    }


NOT_WRONG = {
    # Text of any kind, and folders of it; a record is refused when it is read (tests/data).
    "text": {"deep.json", "junk.jsonl", "deep", "half", "list", "other"},
    "token_file": {"deep.json"},
    "models_dir": {"folder"},  # to which checkpoints may come, beside the one that is named
    "tasks_include": {"deep", "folder", "half", "list", "other"},  # folders, which lm-eval looks through
}
"""Field -> kinds that are right for it."""
INPUTS = [f for f in FLAGS if Path in f.kinds and f.field not in OUTPUTS] + [f for f in FLAGS if f.field == "study"]


@pytest.mark.parametrize("flag", INPUTS, ids=lambda flag: flag.name)
def test_wrong_files_are_refused(flag: Flag, tmp_path: Path, answer: Callable[[Flag, str], Answer]):
    (tmp_path / "wrong").mkdir()
    for kind, path in wrong_files(tmp_path / "wrong").items():
        if kind in NOT_WRONG.get(flag.field, ()):
            continue
        answered = answer(flag, str(path))
        assert refused(answered), (kind, answered)


@pytest.mark.parametrize("flag", [f for f in FLAGS if f.field in OUTPUTS], ids=lambda flag: flag.name)
def test_a_place_that_cannot_be_written_is_refused_at_the_start(
    flag: Flag, tmp_path: Path, answer: Callable[[Flag, str], Answer]
):
    (tmp_path / "file").touch()
    assert refused(answered := answer(flag, str(tmp_path / "file" / "below"))), answered


@pytest.mark.parametrize("flag", [f for f in FLAGS if f.field in OUTPUTS], ids=lambda flag: flag.name)
def test_a_folder_that_is_not_ones_to_write_is_refused_at_the_start(
    flag: Flag, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Callable[[Flag, str], Answer]
):
    """What `os.access` says of it is replaced: for root every folder is to be written."""
    locked, access = tmp_path / "locked", os.access
    locked.mkdir()
    monkeypatch.setattr("os.access", lambda path, mode, **how: Path(path) != locked and access(path, mode, **how))
    answered = answer(flag, str(locked / "below"))
    assert refused(answered), answered
    assert "is not yours to write" in answered[1]


# Flags that exclude each other, or say what cannot be followed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("evaluate {checkpoint} --tasks arc_easy --core", "--tasks and --core exclude each other"),
        ("evaluate {checkpoint} --tasks-shots 3", "no task is run"),
        ("evaluate {checkpoint} --tasks-limit 3", "give --tasks or --core"),
        ("train --data {data} d2 --model.vocab-size 5", "--model.vocab-size has no effect: the tokenizer"),
        ("train --data {data} d2 --model.vocab_size=5", "leave the flag out"),
        ("train --data {data} d2 --batch-size 1000000000000", "batch_size is 1000000000000; it must be a whole number"),
        ("train --data {data} d2 --batch-size 1000000", "a step of 1,000,000 rows"),
        ("train --data {data} d2 --batch-size 1000000 --device-batch 1", "give smaller ones"),
        ("sample {checkpoint} --n 1000000000000", "n is 1000000000000; it must be 1 to 100,000"),
        ("demo --seed -1", "--seed is -1; give a whole number from 0"),
        ("study {study} --results {text}/below", "cannot be written"),
    ],
)
def test_what_flags_cannot_say_is_one_line(
    words: str, said: str, places: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lrt.utils.device.memory_bytes", lambda device: 10**9)  # wherever this runs
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words.format(**places).split())
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in " ".join(errors.replace("\n", " ").split())


# Studies


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"kind: tracking\neditions:\n  tiny: {seeds: [0], axes: [\n", "study.yaml is no YAML: line 4, column 1"),
        (b"kind: tracking\neditions:\n  tiny:\n\tseeds: [0]\n", "is no YAML: line 4, column 1"),
        (b"kind: tracking # caf\xe9\n", "study.yaml is not UTF-8 text"),
        (b"kind: tracking\neditions: {tiny: " + b"[" * 10**5, "is no YAML: maximum recursion depth"),
        (b"kind: tracking\neditions: [tiny]\n", "study.yaml is no study"),
        (STUDY.replace("[0]", "[x]").encode(), "edition tiny: seeds is ['x']; give whole numbers"),
        (STUDY.replace("[0]", "3").encode(), "edition tiny: seeds is 3; give whole numbers"),
        (STUDY.replace("parity: {task", "3: {task").encode(), "axes: task: the choice 3 is 3; it has to be text"),
        (STUDY.replace("{task: parity}}}", "[1]}}").encode(), "axes: task: parity is [1]; it has to be fields"),
        (STUDY.replace("1e-3", "fast").encode(), "cell parity/0: optim.matrix_lr is 'fast'; it has to be float"),
        (STUDY.replace("depth: 1", "depth: true").encode(), "model.depth is True; it has to be int"),
        (STUDY.replace("matrix_lr", "matrix_rate").encode(), "optim has no field matrix_rate"),
        (STUDY.replace("{depth: 1}", "3").encode(), "model is 3; it has to be fields of ModelConfig"),
        (STUDY.replace("seeds: [0]", "seeds: [0], sweep: 3").encode(), "sweep is 3; it has `axis` and `by`"),
        (STUDY.replace("{model", "{minutes: soon, model").encode(), "base: minutes is 'soon'; give a number"),
    ],
)
def test_a_wrong_study_is_one_line(content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "study.yaml").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main(["study", str(tmp_path / "study.yaml"), "--results", str(tmp_path)])
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert errors.startswith("lrt: ")
    assert errors.count("\n") == 1
    assert said in errors


def test_yaml_is_read_as_of_version_1_2(tmp_path: Path):
    """1e-3 is a number; no and yes are names."""
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.replace("{parity: {task: parity}}", "{no: {task: parity}, yes: {task: parity}}"))
    cells = grid.read_study(str(file), "tiny").cells
    assert [cell.choices for cell in cells] == [("no",), ("yes",)]
    assert [cell.fields["optim"] for cell in cells] == [{"matrix_lr": 0.001}] * 2


# The boundary


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory; give a smaller batch"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply to be read (maximum"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 8 bytes"), "out of memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\n  Tried to allocate"),
            "or another --device (CUDA out of memory.",
        ),
        (RuntimeError("CUDA error: out of memory"), "give a smaller batch, model or file"),
        (yaml.YAMLError("a\nb"), "a b"),
        (pickle.UnpicklingError("invalid load key"), "invalid load key"),
        (safetensors.SafetensorError("header too large"), "header too large"),
        (zipfile.BadZipFile("File is not a zip file"), "no"),
        (zlib.error("incorrect header check"), "incorrect header check"),
        (lzma.LZMAError("Corrupt input data"), "Corrupt input data"),
        (EOFError("Compressed file ended"), "a file ends too early (Compressed file ended)"),
        (pyarrow.ArrowNotImplementedError("no such type"), "no such type"),
        (json.JSONDecodeError("Expecting value", "", 0), "Expecting value"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "invalid start byte"),
        (OverflowError("int too large to convert"), "int too large"),
        (ValueError(), "ValueError"),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, Exception) else "",
)
def test_an_error_of_a_library_is_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(tyro, "cli", fail)
    with pytest.raises(SystemExit) as ended:
        main(["report"])
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert errors.startswith("lrt: ")
    assert errors.count("\n") == 1
    assert said in errors


def test_a_defect_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: object, **options: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(tyro, "cli", fail)
    with pytest.raises(KeyError, match="ours"):
        main(["report"])
