"""The command line from end to end, in this process; a user's mistake is one line and status 2."""

from __future__ import annotations

import ast
import csv
import inspect
import io
import itertools
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from support.core_bundle import make_bundle

from lrt.cli import flag_names, verbs
from lrt.cli.evaluate import Diagnose
from lrt.cli.flag_names import OTHERS, RENAMED
from lrt.cli.main import main
from lrt.data.corpus import stdlib_files
from lrt.data.tokenizer import Tokenizer
from lrt.eval.results import read_results
from lrt.inference.session import Session
from lrt.model.checkpoint import about, load, save
from lrt.model.config import ModelConfig
from lrt.model.fingerprint import fingerprint
from lrt.model.memory_config import MemoryConfig
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.training.config import RunConfig
from lrt.training.optim_config import OptimConfig
from lrt.training.recipes import RECIPES

TINY = (
    *("--model.width", "16", "--model.heads", "2", "--model.context", "32", "--model.mlp-width", "24"),
    *("--batch-size", "4", "--device-batch", "4", "--horizon", "tokens=4000"),
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A few files of the standard library's source, cut to size."""
    folder = tmp_path_factory.mktemp("texts")
    sources = [path for path in stdlib_files() if path.stat().st_size > 20_000][:4]
    for path in sources:
        (folder / path.name).write_bytes(path.read_text(encoding="utf-8")[:8000].encode())
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def data(texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "prepared"
    main(["prepare", str(out), "--text", *map(str, texts), "--vocab-size", "300"])
    return out


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    main(["train", "--data", str(data), "--out", str(out), "--device", "cpu", "d2", *TINY])
    return out


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message on standard error of a command that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The same, of a command whose flags are right: one line that starts with the program's name."""
    message = mistake(capsys, *arguments)
    assert message.startswith("lrt: ")
    assert message.count("\n") == 1
    assert message.endswith("\n")
    return message


# Help


def bare(text: str) -> str:
    """Without white space and the frames that wrap it."""
    return re.sub(r"[\s│╭╮╰╯─]+", "", text)


def helped(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--help"])
    assert caught.value.code == 0
    return bare(capsys.readouterr().out)


def field_docs(kind: type) -> dict[str, str]:
    """Field -> the docstring under it, from the source."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(kind)).body if isinstance(node, ast.ClassDef))
    pairs = itertools.pairwise(body)
    return {
        field.target.id: text.value.value
        for field, text in pairs
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",)], ids=["bare", "-h", "--help"])
def test_help_lists_the_verbs(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([*arguments])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for name in verbs.PLACES:
        assert f"\n  {name} " in text
        first = " ".join((verbs.load(name).__doc__ or "?").split()).partition(". ")[0].removesuffix(".")
        assert bare(first) in bare(text)


def test_version_names_what_it_stands_on(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"lrt {metadata.version('latent-recurrent-transformer')}, Python 3.")


@pytest.mark.parametrize(("word", "near"), [("tarin", "train"), ("diagnos", "diagnose"), ("xyzzy", "")])
def test_an_unknown_verb_is_answered_with_those_spelt_like_it(word: str, near: str, capsys: pytest.CaptureFixture[str]):
    message = one_line(capsys, word)
    assert message.startswith(f"lrt: there is no verb '{word}'")
    assert ("did you mean" in message) == bool(near)
    assert near in message


@pytest.mark.parametrize(
    ("verb", "written", "ours"),
    [
        ("train", ["--max-steps", "5"], ["--horizon", "steps=5"]),
        ("train", ["--max_steps=5", "d2"], ["--horizon", "steps=5", "d2"]),
        ("train", ["--save-steps", "5"], ["--snapshots.every", "5"]),
        ("train", ["--eval-steps=5"], ["--eval.every", "5"]),
        ("train", ["--report-to", "wandb"], ["--log-to", "wandb"]),
        ("train", ["--report-to", "none", "d2"], ["d2"]),
        ("train", ["--report-to=none", "d2"], ["d2"]),
        ("serve", ["--report-to", "none"], ["--report-to", "none"]),  # no flag of it, which tyro says
        ("serve", ["--max-num-seqs", "4", "--served-model-name", "a"], ["--rows", "4", "--names", "a"]),
        ("sample", ["--prompt", "--max", "x_y"], ["--prompt", "--max", "x_y"]),
    ],
)
def test_names_that_other_tools_have_for_flags_are_taken(verb: str, written: list[str], ours: list[str]):
    assert flag_names.translate(verb, written) == ours


def test_a_flag_of_another_name_without_a_value_is_answered(capsys: pytest.CaptureFixture[str]):
    assert one_line(capsys, "train", "d2", "--max-steps") == "lrt: --max-steps has no value; write --max-steps N\n"


@pytest.mark.parametrize("verb", OTHERS)
def test_help_says_which_other_names_are_taken(verb: str, capsys: pytest.CaptureFixture[str]):
    text = helped(capsys, verb)
    for other, ours in OTHERS[verb].items():
        assert bare(f"{other} for {ours}") in text


def test_generate_is_sample(capsys: pytest.CaptureFixture[str]):
    assert "usage:lrtsample" in helped(capsys, "generate")


@pytest.mark.parametrize(
    ("arguments", "kinds"),
    [
        (("prepare",), (verbs.load("prepare"),)),
        (("evaluate",), (verbs.load("evaluate"),)),
        (("sample",), (verbs.load("sample"),)),
        (("chat",), (verbs.load("chat"),)),
        (("demo",), (verbs.load("demo"),)),
        (("train",), (verbs.load("train"),)),
        (("train", "d2"), (RunConfig, ModelConfig, MemoryConfig, OptimConfig)),
    ],
    ids=["prepare", "evaluate", "sample", "chat", "demo", "train", "train d2"],
)
def test_help_of_a_verb_has_every_fields_docstring(
    arguments: tuple[str, ...],
    kinds: tuple[type, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("COLUMNS", "80")
    text = helped(capsys, *arguments)
    for kind in kinds:
        docs = field_docs(kind)
        assert docs
        missing = [name for name, doc in docs.items() if bare(doc) not in text]
        assert missing == []


def test_help_of_train_lists_the_recipes(capsys: pytest.CaptureFixture[str]):
    text = helped(capsys, "train")
    assert all(name in text for name in RECIPES)


# From text to a sample


def test_prepare_says_what_it_made(data: Path, texts: list[Path], capsys: pytest.CaptureFixture[str]):
    main(["prepare", str(data), "--text", *map(str, texts), "--vocab-size", "300"])  # the same again: opened
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "vocabulary 300"
    assert [line.split()[0] for line in lines[1:-1]] == ["train", "val", "test"]
    counted = sum(int(line.replace(",", "").split()[-2]) for line in lines[1:-1])
    assert counted == sum(path.stat().st_size for path in texts)
    assert re.fullmatch(rf"{data}, [\d.]+ kB", lines[-1])


def test_train_writes_a_metrics_log_and_a_checkpoint(run: Path):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [128 * (i + 1) for i in range(32)]  # 4000 rounded up to whole steps
    assert lines[-1]["loss"] < lines[0]["loss"]
    model, tokenizer = load(run / "checkpoint")
    assert (model.config.width, model.config.depth, model.config.vocab_size) == (16, 2, tokenizer.vocab_size)
    made = about(run / "checkpoint")
    assert made["schedule"] == RECIPES["d2"]().schedule
    assert made["run"]["horizon"] == "tokens=4000"
    assert made["trained"]["tokens"] == 4096


def test_a_recipe_may_come_with_another_schedule_and_memory(data: Path, tmp_path: Path):
    flags = ("--schedule", "mixture([(0.5, plain()), (0.5, interleaved(2))])", "--model.memory.source", "1")
    main(["train", "--data", str(data), "--out", str(tmp_path), "d2", *TINY, *flags, "--horizon", "tokens=500"])
    assert about(tmp_path / "checkpoint")["schedule"] == flags[1]
    assert load(tmp_path / "checkpoint")[0].config.memory.source == 1
    schedules = {json.loads(line)["schedule"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()}
    assert schedules <= {"plain()", "interleaved(2)"}


def test_each_source_may_have_its_own_delay(data: Path, tmp_path: Path):
    sources = ("--model.memory.source", "0", "0", "2", "--model.memory.combine", "channels")
    flags = (*TINY, *sources, "--model.memory.delay", "1", "2", "3", "--horizon", "steps=1", "--eval.every", "0")
    main(["train", "--data", str(data), "--out", str(tmp_path), "d2", *flags])
    memory = load(tmp_path / "checkpoint")[0].config.memory
    assert (memory.source, memory.delay) == ((0, 0, 2), (1, 2, 3))


def test_flags_may_stand_before_or_behind_the_recipe(data: Path, tmp_path: Path):
    for place in ("before", "behind"):
        own = ("--data", str(data), "--out", str(tmp_path / place), "--device", "cpu")
        rest = (*TINY, "--horizon", "steps=2", "--eval.every", "0")
        main(["train", *own, "d2", *rest] if place == "before" else ["train", "d2", *rest, *own])
    before, behind = (load(tmp_path / place)[0].state_dict() for place in ("before", "behind"))
    assert all(torch.equal(before[name], behind[name]) for name in before)


def test_an_lrt_begins_with_a_transformers_weights(
    data: Path, texts: list[Path], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    own = ("--data", str(data), "--device", "cpu", "--eval.every", "0")
    narrow = (*TINY, "--model.mlp-width", "16")  # in place of TINY's 24
    main(["train", *own, "--out", str(tmp_path / "plain"), "d2-transformer", *narrow])
    again = ["train", *own, "--out", str(tmp_path / "lrt"), "d2", *TINY, "--init", str(tmp_path / "plain")]
    main(again)
    begun, _ = load(tmp_path / "plain")
    model, _ = load(tmp_path / "lrt")
    assert (model.config.mlp_dim, model.config.sources) == (16, (0, 2))  # the Transformer's model, the recipe's memory
    losses = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss"] for name in ("plain", "lrt")
    ]
    last = json.loads((tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    assert abs(losses[1] - last) < abs(losses[0] - last) / 2  # it goes on where the Transformer stood
    assert about(tmp_path / "lrt")["run"]["init"] == fingerprint(begun)
    main(again)  # of a finished run nothing is done again
    plain_run, foreign = str(tmp_path / "plain"), tmp_path / "foreign"
    main(["prepare", str(foreign), "--text", str(texts[0]), "--vocab-size", "290"])
    deeper = ("--model.depth", "3", "--model.memory.source", "3")
    for before, flags, named in (
        ((), ("--init", str(tmp_path / "nowhere")), ("nowhere", "is not a checkpoint")),
        ((), ("--init", plain_run, *deeper), ("depth 2", "this one 3")),
        (("--match", "parameters", str(run)), ("--init", plain_run), ("--match parameters", "--init")),
        (("--data", str(foreign)), ("--init", plain_run), ("another tokenizer",)),
    ):
        message = one_line(capsys, "train", *own, *before, "--out", str(tmp_path / "other"), "d2", *TINY, *flags)
        assert all(part in message for part in named), message


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    main(["evaluate", *arguments, "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_evaluate_prints_one_json_object(run: Path, data: Path, capsys: pytest.CaptureFixture[str]):
    scores = evaluated(capsys, str(run), "--data", str(data))
    assert scores["schedule"] == RECIPES["d2"]().schedule  # the one trained with
    assert scores["complete"] is True
    assert scores["gap"] == scores["live_bpb"] - scores["parallel_bpb"]
    assert 1 < scores["live_bpb"] < 8
    assert None not in scores.values()
    # The checkpoint's own folder is as good, and no score depends on the batch size.
    again = evaluated(
        capsys, str(run / "checkpoint"), "--data", str(data), "--batch-size", "3", "--schedule", "plain()"
    )
    assert again["schedule"] == "plain()"
    assert again["live_bpb"] == pytest.approx(scores["live_bpb"], rel=1e-5)
    test = evaluated(capsys, str(run), "--data", str(data), "--split", "test")
    assert test["live_bpb"] != scores["live_bpb"]


def test_evaluate_prints_text(run: Path, data: Path, capsys: pytest.CaptureFixture[str]):
    scores = evaluated(capsys, str(run), "--data", str(data))
    main(["evaluate", str(run), "--data", str(data)])
    said, basis, *table = capsys.readouterr().out.splitlines()
    assert said.startswith(f"{run.name} has {scores['live_bpb']:.4f} bits per byte, live; ")
    assert basis.endswith(f"{scores['targets']:,} tokens, {scores['bytes']:,} bytes, the whole split.")
    assert f"| live BPB | {scores['live_bpb']:.4f} |" in table
    assert "tokens scored" not in "".join(table)
    assert re.fullmatch(rf"{run}/evaluation, [\d.]+ [kM]B", table[-1])


def test_scores_come_in_every_form(run: Path, data: Path, capsys: pytest.CaptureFixture[str]):
    command = ["evaluate", str(run), "--data", str(data)]
    scores = evaluated(capsys, *command[1:])
    shown = {}
    for form in ("json", "csv", "md", "latex"):
        main([*command, "--format", form])
        shown[form] = capsys.readouterr().out
    assert json.loads(shown["json"]) == scores
    rows = dict(csv.reader(io.StringIO(shown["csv"])))
    assert rows["score"] == f"{data.name}-val"
    assert rows["live BPB"] == f"{scores['live_bpb']:.4f}"
    assert rows["tokens scored"] == f"{scores['targets']:,}"
    assert not [name for name in rows if "_" in name]
    assert f"live BPB & {rows['live BPB']} \\\\" in shown["latex"]
    assert shown["latex"].startswith("% needs")
    main([*command, "--full"])
    assert f"| tokens scored | {rows['tokens scored']} |" in capsys.readouterr().out
    assert "--json and --format csv name two forms" in mistake(capsys, *command, "--json", "--format", "csv")


def test_several_corpora_are_scored_in_one_call(
    run: Path, data: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Each by itself, and all as one text; folders of one name stay apart."""
    other = tmp_path / data.name
    main(["prepare", str(other), "--text", str(texts[0]), "--tokenizer", str(data / "tokenizer.json")])
    out = tmp_path / "results"
    scores = evaluated(capsys, str(run), "--data", str(data), str(other), "--out", str(out), "--split", "train")
    assert list(scores["corpora"]) == [f"{data}-train", f"{other}-train"]
    alone = [
        evaluated(capsys, str(run), "--data", str(folder), "--out", str(tmp_path / "alone"), "--split", "train")
        for folder in (data, other)
    ]
    for one, corpus in zip(alone, scores["corpora"].values(), strict=True):
        assert corpus == {name: value for name, value in one.items() if name != "corpora"}
    size = sum(one["bytes"] for one in alone)
    assert scores["bytes"] == size
    assert scores["live_bpb"] == pytest.approx(sum(one["live_bpb"] * one["bytes"] for one in alone) / size)
    (result,) = read_results(out)
    assert (result.kind, result.values) == ("scores", scores)
    main(
        ["diagnose", str(run), "--data", str(data), str(other), "--out", str(out), "--only", "bpb", "--split", "train"]
    )
    assert len([r for r in read_results(out) if r.kind == "bpb"]) == 2
    main(["evaluate", str(run), "--data", str(data), str(other), "--out", str(out), "--split", "train"])
    assert f"| score | {data}-train | {other}-train | together |" in capsys.readouterr().out


def sampled(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    main(["sample", *arguments])
    return capsys.readouterr().out


def test_sample_continues_the_prompt_and_equal_seeds_give_equal_text(run: Path, capsys: pytest.CaptureFixture[str]):
    arguments = (str(run), "--prompt", "def größer(", "--max-new-tokens", "12")
    first = sampled(capsys, *arguments)
    assert first.startswith("def größer(")
    assert len(first) > len("def größer(\n")
    assert sampled(capsys, *arguments) == first
    assert sampled(capsys, *arguments, "--seed", "1") != first
    greedy = sampled(capsys, *arguments, "--temperature", "0")
    assert sampled(capsys, *arguments, "--temperature", "0", "--seed", "1") == greedy
    assert sampled(capsys, str(run), "--prompt", "def f(", "--max-new-tokens", "0") == "def f(\n"
    assert sampled(capsys, str(run), "--max-new-tokens", "3") != ""  # an empty prompt starts a document


def test_several_prompts_and_samples_are_continued_at_once(run: Path, capsys: pytest.CaptureFixture[str]):
    arguments = (str(run), "--max-new-tokens", "8", "--prefill", "exact")
    alone = [
        sampled(capsys, *arguments, "--prompt", prompt, "--seed", seed)
        for prompt in ("def f(", "import os\nfrom")
        for seed in ("3", "4")
    ]
    together = sampled(capsys, *arguments, "--prompt", "def f(", "import os\nfrom", "--n", "2", "--seed", "3")
    titles = [f"--- prompt {p}, sample {s}\n" for p in (1, 2) for s in (1, 2)]
    assert together == "".join(title + text for title, text in zip(titles, alone, strict=True))
    assert len(set(alone)) == 4


def chatted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str, *arguments: str) -> Any:
    """What `lrt chat` prints for lines on standard input."""
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    main(["chat", *arguments, "--max-new-tokens", "5", "--prefill", "exact"])
    return capsys.readouterr()


def test_chat_through_a_pipe(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    _, tokenizer = load(run / "checkpoint")
    config = ModelConfig(depth=2, width=16, heads=2, vocab_size=tokenizer.vocab_size, context=200)
    torch.manual_seed(0)
    save(tmp_path / "talker", LatentRecurrentTransformer(config), tokenizer)
    run = tmp_path / "talker"
    once = chatted(capsys, monkeypatch, "a b\n/exit\nnot read\n", str(run)).out
    assert once.count("\n") == 1
    # A turn that is taken back leaves no trace; a saved conversation goes on as this one does.
    folder = tmp_path / "talk"
    lines = f"a b\nx\n/undo\n/save {folder}\nc\n/undo\n/undo\n/undo\n"
    first = chatted(capsys, monkeypatch, lines, str(run))
    answers = first.out.splitlines()
    assert answers[0] == once.strip("\n")
    assert answers[2:4] == ["1 turns left", f"{folder}: 1 turns"]
    assert answers[5:] == ["1 turns left", "0 turns left"]
    assert first.err == "lrt: there is no turn to take back\n"
    second = chatted(capsys, monkeypatch, f"/load {folder}\nc\n/nonsense\n/save\n", str(run))
    assert second.out.splitlines() == [f"{folder}: 1 turns", answers[4]]
    assert "unknown command /nonsense" in second.err
    assert "/save needs a folder" in second.err
    long = chatted(capsys, monkeypatch, "x" * 300 + "\na b\n", str(run))
    assert "the context is 200; take turns back" in long.err
    assert long.out == once  # as it was before


def test_chat_prints_an_answer_of_several_lines_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    answer = "Steps:\n1. first\n2. second\n\n    Done."
    inner = Tokenizer.train(["the state of it\n"] * 9, 300).inner
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = Tokenizer(inner)
    config = ModelConfig(depth=2, width=16, heads=2, vocab_size=tokenizer.vocab_size, context=200)
    save(tmp_path / "talker", LatentRecurrentTransformer(config), tokenizer)

    def generate(self: Session, *arguments: Any, on_token: Callable[[int], None]) -> Session:
        for token in tokenizer.encode(f"\n {answer}\n\n"):
            on_token(token)
        return self

    monkeypatch.setattr(Session, "generate", generate)
    assert chatted(capsys, monkeypatch, "hi\n", str(tmp_path / "talker")).out == answer + "\n"


# Mistakes


# What the flags themselves say wrongly is reported in tyro's own frame.
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("train", "d2", "--modle.width", "3"), "--modle.width"),
        (("train", "d3"), "d3"),
        (("train", "d2", "--model.width", "wide"), "wide"),
        (("sample",), "PATH"),
        (("compute",), "compute"),
        (("evaluate", "x", "--batch-size", "2.5"), "2.5"),
        (("train", "d2", "--schedule", "wave(3)"), "unknown schedule 'wave'; choose one of plain, interleaved"),
        (("train", "d2", "--schedule", "interleaved(0)"), "subsets is 0; it must be a whole number of at least 1"),
        (("train", "d2", "--schedule", "3"), "3"),
        (("train", "d2", "--model.heads", "3"), "width 128 is not a multiple of heads 3"),
        (("train", "d2", "--horizon", "tokens=0"), "horizon is 'tokens=0'"),
        (("train", "d2", "--log-to", "mlflow"), "cannot log to mlflow; choose among tensorboard, wandb, trackio"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_flags_are_named(
    arguments: tuple[str, ...],
    named: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    for work in ("lrt.data.prepare.prepare",):  # no work before the flags are right
        monkeypatch.setattr(work, None)
    assert bare(named) in bare(mistake(capsys, *arguments))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("train", "--device", "warp:0", "d2"), ("'warp:0'", "--device auto or cpu")),
        (("train", "--device", "meta", "d2"), ("'meta'", "--device auto or cpu")),
        (("train", "--data", "{tmp}/nowhere", "d2"), ("nowhere", "not a prepared folder")),
        (("train", "--data", "{tmp}", "d2"), ("not a prepared folder",)),
        (("evaluate", "{tmp}/nowhere", "--device", "cpu"), ("nowhere", "is not a checkpoint")),
        (("sample", "{tmp}/nowhere", "--device", "cpu"), ("nowhere", "is not a checkpoint")),
        (("sample", "{run}", "--top-p", "2"), ("top_p is 2.0", "at most 1")),
        (("sample", "{run}", "--max-new-tokens", "100"), ("100 new ones", "context of 32")),
        (("sample", "{run}", "--max-new-tokens", "-1"), ("--max-new-tokens is -1", "from 0")),
        (("evaluate", "{run}", "--data", "{data}", "--split", "dev"), ("'dev'", "train, val, test")),
        (("evaluate", "{run}", "--data", "{data}", "--schedule", "wave"), ("'wave'", "interleaved")),
        (("evaluate", "{run}", "--data", "{data}", "--batch-size", "0"), ("batch_size is 0", "at least 1")),
        (("evaluate", "{run}", "--data", "{tmp}"), ("not a prepared folder",)),
        (("prepare", "{tmp}/out", "--text", "{tmp}/no.txt"), ("no.txt", "no file")),
        (("prepare", "{tmp}/out", "--text", "{tmp}"), ("out lies in",)),
        (("prepare", "{tmp}/out", "--text", "{text}", "--vocab-size", "9"), ("vocab_size is 9", "at least 257")),
        (("prepare", "{tmp}/out", "--text", "{text}", "--tokenizer", "{tmp}/t.json"), ("t.json",)),
        (("demo", "--text", "{tmp}/no.txt", "--out", "{tmp}/demo"), ("no.txt", "no file")),
        (("demo", "--text", "{text}", "--out", "{tmp}/demo", "--tokens", "-1"), ("--tokens is -1", "whole number")),
        (("demo", "--text", "{text}", "--out", "{tmp}/demo", "--tokens", "0"), ("tokens is 0", "at least 1")),
    ],
    ids=lambda value: " ".join(value) if value[0] in ("train", "evaluate", "sample", "prepare", "demo") else "",
)
def test_a_mistake_is_one_line_on_standard_error(
    arguments: tuple[str, ...],
    named: tuple[str, ...],
    texts: list[Path],
    data: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    # None of these may get as far as the real work; it would take minutes.
    for work in ("lrt.training.loop.train", "lrt.experiments.demo.train"):
        monkeypatch.setattr(work, None)
    if "--data" not in arguments and arguments[0] == "train":
        monkeypatch.setattr("lrt.data.prepare.prepare", None)
    places = {"tmp": tmp_path, "run": run, "data": data, "text": texts[0]}
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([argument.format(**places) for argument in arguments])
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.err.startswith("lrt: ")
    assert printed.err.count("\n") == 1
    assert all(part in printed.err for part in named), printed.err


@pytest.mark.parametrize(("verb", "old"), [(verb, old) for verb, flags in RENAMED.items() for old in flags])
def test_a_renamed_flag_answers_with_its_new_name(
    verb: str, old: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    new = RENAMED[verb][old]
    assert one_line(capsys, verb, old, "5", "d2") == f"lrt: {old} is now {new}\n"
    assert one_line(capsys, verb, "d2", f"{old.replace('-to', '_to')}=5") == f"lrt: {old} is now {new}\n"
    monkeypatch.setenv("COLUMNS", "200")
    helptext = helped(capsys, verb)
    assert new in helptext
    assert old not in helptext
    changelog = Path(__file__).parents[2] / "CHANGELOG.md"
    assert f"| `{old}` | `{new}` |" in changelog.read_text()


def test_data_of_another_tokenizer_is_refused(
    run: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    foreign = tmp_path / "foreign"
    main(["prepare", str(foreign), "--text", *map(str, texts), "--vocab-size", "290"])
    message = one_line(capsys, "evaluate", str(run), "--data", str(foreign))
    assert "another tokenizer" in message
    assert f"--tokenizer {run}/checkpoint/tokenizer.json" in message  # and the advice works
    main(["prepare", str(foreign), "--text", *map(str, texts), "--tokenizer", f"{run}/checkpoint/tokenizer.json"])
    assert evaluated(capsys, str(run), "--data", str(foreign))["targets"] > 0


def test_a_damaged_checkpoint_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(run / "checkpoint", tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors" in one_line(capsys, "sample", str(tmp_path / "copy"), "--device", "cpu")


def test_a_runs_folder_is_found_after_a_save_that_was_cut_off(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    # As a process leaves it that is killed between the two renames of a save.
    shutil.copytree(run / "checkpoint", tmp_path / ".checkpoint.previous")
    assert evaluated(capsys, str(tmp_path), "--data", str(data))["targets"] > 0


# Interrupted

INTERRUPTED = """
import sys
from collections.abc import Callable
import torch
torch.set_num_threads(1)
from lrt.cli.main import main
from lrt.training import loop
step = loop.step_or_report
def announcing(training):
    line = step(training)
    if line["step"] == 5:
        print("five", flush=True)
    return line
loop.step_or_report = announcing
main(sys.argv[1:])
"""


def test_ctrl_c_during_training_keeps_a_loadable_checkpoint(data: Path, tmp_path: Path):
    arguments = [
        "train",
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--execution.compile",
        "never",
        "--device",
        "cpu",
        "d2",
        *TINY,
        "--horizon",
        f"tokens={10**9}",
    ]
    command = [sys.executable, "-c", INTERRUPTED, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "five\n" in iter(process.stdout.readline, ""), process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors.splitlines() == [
        "warning: 1,000,000,000 tokens go 47648.5 times through the 20,987 of the data",
        "training: uncompiled passes (compile is never)",
        "lrt: interrupted; what was done is kept, and the same command goes on from there",
    ]
    tokens = about(tmp_path / "run")["trained"]["tokens"]
    assert tokens >= 5 * 128
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["tokens"] == tokens
    assert load(tmp_path / "run")[0].config.width == 16


def test_diagnose_prints_and_keeps_its_results(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "results"
    command = ["diagnose", str(run), "--data", str(data), "--at-least", "200", "--out", str(out)]
    main(command)
    short = capsys.readouterr().out.splitlines()
    main([*command, "--full"])
    text = capsys.readouterr().out
    results = {result.kind: result for result in read_results(out)}
    assert {"sweeps", "ablations"} <= set(results)
    verdict = results["sweeps"].values["verdict"]
    assert short[0] == f"{data.name}-val, {results['bpb'].settings['targets']:,} tokens"
    assert short[1].startswith(("Recurrence is worth ", "Recurrence costs "))
    assert f"; {verdict}; it reaches " in short[1]
    assert short[2].startswith(f"- {run.name}: {verdict}; 64 refinements give ")
    assert not [line for line in short if line.startswith("|")]
    assert short[-1].startswith(f"{out}, ")
    assert short[-1].endswith("; --full shows the tables behind this")
    assert all(line in text for line in short[:-1])
    assert f"| live | {results['ablations'].values['live_bpb']:.4f} (+0.0 %) |" in text
    assert "| two forwards |" in text
    assert "_" not in text.replace(str(out), "").replace(results["bpb"].settings["schedule"], "")
    main([*command, "--format", "json"])
    assert [line["kind"] for line in json.loads(capsys.readouterr().out)] == list(Diagnose(run).only)
    weights = json.loads((run / "checkpoint" / "manifest.json").read_text())["model.safetensors"]["sha256"]
    assert {result.checkpoint for result in results.values()} == {weights}
    assert {result.subject for result in results.values()} == {f"{data.name}-val"}


def test_diagnose_says_how_many_hops_the_state_survives(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, plain = tmp_path / "results", tmp_path / "plain"
    command = ["diagnose", str(run), "--data", str(data), "--at-least", "200", "--out", str(out), "--only", "hops"]
    main([*command, "--full"])
    text = capsys.readouterr().out
    (result,) = read_results(out)
    values = result.values
    assert (result.kind, values["targets"]) == ("hops", result.settings["targets"])
    assert [point["hops"] for point in values["points"]] == [0, 1, 2, 4, 8, 16, 30]  # windows of BOS and 31 tokens
    assert f"{run.name}: {values['verdict']}." in text
    assert f"live {values['live']:.4f}" in text
    assert f"| 0 | {values['points'][0]['nats']:.4f} | {values['points'][0]['gap']:+.4f} |" in text
    # What is measured is not measured again.
    (ledger,) = (out / "partial").glob("hops-*.jsonl")
    written = ledger.read_text()
    main(command)
    assert ledger.read_text() == written
    assert read_results(out)[0].values == values
    capsys.readouterr()
    main(["train", "--data", str(data), "--out", str(plain), "--device", "cpu", "d2-transformer", *TINY])
    main(["diagnose", str(plain), "--data", str(data), "--at-least", "200", "--only", "hops"])
    assert "plain: nothing recurs: there is no memory to carry." in capsys.readouterr().out
    assert "'hop'" in mistake(capsys, "diagnose", str(run), "--data", str(data), "--only", "hop")
    message = one_line(capsys, "diagnose", str(run), "--data", str(data), "--only", "hops", "--batch-size", "0")
    assert "batch_size is 0; it must be at least 1" in message
    assert "nowhere" in one_line(capsys, "diagnose", str(tmp_path / "nowhere"), "--data", str(data), "--only", "hops")


def test_evaluate_runs_core_from_a_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bundle, out = make_bundle(tmp_path), tmp_path / "results"
    main(["evaluate", str(run), "--core", str(bundle), "--out", str(out), "--device", "cpu"])
    text = capsys.readouterr().out
    assert "partial CORE (3/22)" in text
    assert "one sweep" in text
    (result,) = read_results(out)
    file = bundle / "eval_data" / "some" / "winograd.jsonl"
    file.write_text("{")
    arguments = ["evaluate", str(run), "--core", str(bundle), "--out", str(out), "--device", "cpu", "--json"]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert f"some tasks could not be run: {file}" in printed.err
    kept = json.loads(printed.out)["values"]["tasks"]
    assert kept == {label: result.values["tasks"][label] for label in ("arc_easy", "lambada_openai")}
    message = one_line(capsys, "evaluate", str(run), "--core", str(tmp_path / "nowhere"), "--device", "cpu")
    assert "there is no CORE bundle in" in message


@pytest.mark.slow
def test_two_ranks_diagnose_and_answer_as_one_does(run: Path, data: Path, tmp_path: Path):
    """Two gloo processes share the windows and the questions; scores agree to what float32's batches leave."""
    bundle = make_bundle(tmp_path)
    verbs = (
        ("diagnose", str(run), "--data", str(data), "--at-least", "300", "--only", "bpb", "text"),
        ("evaluate", str(run), "--core", str(bundle)),
        ("evaluate", str(run), "--data", str(data), "--batch-size", "4"),
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    for verb in verbs:
        main([*verb, "--device", "cpu", "--out", str(tmp_path / "one")])
        command = [*torchrun, "-m", "lrt", *verb, "--device", "cpu", "--out", str(tmp_path / "two")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    one, two = ({r.kind: r.values for r in read_results(tmp_path / name)} for name in ("one", "two"))
    assert set(one) == set(two) == {"bpb", "text", "core", "scores"}
    for name in ("live_bpb", "parallel_bpb", "live_bpb_memory_zero"):
        assert two["scores"][name] == pytest.approx(one["scores"][name], abs=1e-4)
    for name, column in one["bpb"]["columns"].items():
        assert two["bpb"]["columns"][name]["bpb"] == pytest.approx(column["bpb"], abs=1e-4)
    assert two["core"] == one["core"]
    assert len(list((tmp_path / "two" / "partial").glob("bpb-*.rank1.jsonl"))) == 1


@pytest.mark.parametrize(
    ("verb", "kept"), [("sample", False), ("chat", False), ("prepare", True), ("compare", True), ("study", True)]
)
def test_an_interruption_says_what_is_kept(
    verb: str, kept: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stopped(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tyro, "cli", stopped)
    with pytest.raises(SystemExit) as ended:
        main([verb])
    assert ended.value.code == 130
    message = capsys.readouterr().err
    assert message.startswith("lrt: interrupted")
    assert ("the same command goes on from there" in message) == kept
