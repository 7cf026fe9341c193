"""CORE: prompts and few-shot examples by hand, shared contexts against every option alone, chance, and damage."""

from __future__ import annotations

import functools
import http.server
import json
import math
import random
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.core_bundle import NAMES, make_bundle, write
from support.models import configuration as any_configuration
from support.models import random_model

from lrt.data.tokenizer import Tokenizer
from lrt.distributed.single_process import SingleProcess
from lrt.eval.core_metric.answers import MODES, Answer, On, OptionScore, answer_question, score_alone, score_questions
from lrt.eval.core_metric.benchmark import CoreSettings, run_core
from lrt.eval.core_metric.bundle import OFFICIAL, Bundle, CoreTask, download, read_sums
from lrt.eval.core_metric.questions import (
    Question,
    build_question,
    crop_question,
    few_shot_examples,
    language_modeling_prompts,
    multiple_choice_prompts,
    schema_prompts,
    shared_length,
)
from lrt.eval.report.result_tables import result_tables
from lrt.eval.results import read_results
from lrt.model.config import ModelConfig
from lrt.model.memory_config import MemoryConfig
from lrt.utils.files import sha256

V, CONTEXT = 300, 40


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "bundle").mkdir()
    return make_bundle(tmp_path / "bundle")


def model_of(**memory: Any) -> Any:
    config = ModelConfig(
        depth=2, width=12, heads=2, vocab_size=V, context=CONTEXT, mlp_width=20, memory=MemoryConfig(**memory)
    )
    return random_model(config)


KINDS: dict[str, dict[str, Any]] = {
    "L": {},
    "channels, embedding": {"source": (0, 2), "combine": "channels", "initial": "embedding"},
    "delay": {"delay": 2},
    "none": {"injection": "none"},
}
# Prompts
MC = [{"query": f"Q{i}", "choices": [f"a{i}", f"b{i}"], "gold": i % 2} for i in range(20)]


def test_few_shot_examples_are_the_bundle_s():
    """random.Random(1234 + 3).sample of the nineteen others, drawn once with CPython and written down."""
    assert [e["query"] for e in few_shot_examples(MC, 3, 4)] == ["Q5", "Q13", "Q10", "Q8"]
    assert MC[3] not in few_shot_examples(MC, 3, 19)
    assert few_shot_examples(MC, 0, 0) == []


def test_prompts_by_hand():
    assert multiple_choice_prompts(MC[1], [MC[0], MC[3]], "\nAnswer: ") == [
        "Q0\nAnswer: a0\n\nQ3\nAnswer: b3\n\nQ1\nAnswer: a1",
        "Q0\nAnswer: a0\n\nQ3\nAnswer: b3\n\nQ1\nAnswer: b1",
    ]
    item = {"context_options": ["The cat", "The dog"], "continuation": "barked.", "gold": 1}
    assert schema_prompts(item, [], " ") == ["The cat barked.", "The dog barked."]
    assert schema_prompts(item, [item], " ")[0] == "The dog barked.\n\nThe cat barked."
    text = {"context": " one two ", "continuation": "three"}
    assert language_modeling_prompts(text, [text], " ") == [
        "one two three\n\none two",
        "one two three\n\none two three",
    ]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat and the dog sat on the mat. question answer"] * 4, V)


def task(kind: str, shots: int = 0, file: Path = Path("x.jsonl"), **fields: Any) -> CoreTask:
    return CoreTask(
        "made", file, kind, shots, fields.pop("delimiter", " "), fields.pop("random", 0.25), fields.pop("sha", None)
    )


def test_what_is_scored(tokenizer: Tokenizer):
    encode = tokenizer.encode
    found = build_question(task("multiple_choice"), MC, 0, tokenizer, CONTEXT)
    assert found.rows[0] == (tokenizer.bos, *encode("Q0 a0"))
    assert found.starts == (found.shared, found.shared)
    assert found.rows[0][: found.shared] == found.rows[1][: found.shared]
    assert found.rows[0][found.shared] != found.rows[1][found.shared]
    items = [{"context_options": ["the cat", "a dog ran"], "continuation": "sat.", "gold": 1}]
    found = build_question(task("schema"), items, 0, tokenizer, CONTEXT)
    for row, start in zip(found.rows, found.starts, strict=True):
        assert tokenizer.decode(row[start:]) == " sat."
    assert found.shared == 1
    items = [{"context": "the cat sat on the ", "continuation": "mat"}]
    found = build_question(task("language_modeling"), items, 0, tokenizer, CONTEXT)
    assert tokenizer.decode(found.rows[0][found.starts[0] :]) == " mat"
    assert (found.gold, len(found.rows)) == (None, 1)


def test_an_option_that_begins_another_has_a_scored_token():
    items = [{"query": "q", "choices": ["x", "x y"], "gold": 1}]
    found = build_question(task("multiple_choice"), items, 0, Tokenizer.train(["q x y"] * 3, V), CONTEXT)
    assert all(start < len(row) for row, start in zip(found.rows, found.starts, strict=True))


def test_a_long_question_loses_its_beginning_but_not_bos():
    rows = [[9, 1, 2, 3, 4, 5, 6, 7], [9, 1, 2, 3, 4, 8]]
    found = crop_question(0, rows, [5, 5], 5, 1, 6)
    assert found.rows == ((9, 3, 4, 5, 6, 7), (9, 3, 4, 8))
    assert (found.starts, found.shared, found.cropped) == ((3, 3), 3, True)
    found = crop_question(0, rows, [5, 5], 5, 1, 3)  # not even the options fit
    assert found.rows == ((9, 6, 7), (9, 8))
    assert (found.starts, found.shared) == ((1, 1), 1)
    assert not crop_question(0, rows, [5, 5], 5, 1, 8).cropped


# Answers
def made(seed: int, count: int = 5) -> list[Question]:
    """Questions of all shapes: one-token options, schemas, a single row; contexts of different lengths."""
    g = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(1, V, (n,), generator=g).tolist()

    found = []
    for i in range(count):
        shared = [0, *draw(3 + 4 * i)]
        options = [shared + draw(1 + (i + j) % 4) for j in range(1 if i == 3 else 2 + i % 3)]
        if i == 2:  # as commonsense_qa: each option one token
            options = [shared + draw(1) for _ in range(5)]
        start = len(shared)
        starts = [start + min(1, len(o) - start - 1) if i == 4 else start for o in options]
        found.append(Question(i, tuple(map(tuple, options)), tuple(starts), start, None if i == 3 else 1))
    return found


@pytest.mark.parametrize("memory", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("name", MODES)
def test_a_shared_context_gives_what_every_option_alone_does(name: str, memory: dict[str, Any]):
    model, questions = model_of(**memory), made(0)
    mode = On("exact") if name == "on" else MODES[name]()
    together = score_questions(model, questions, mode)
    for q, rows in zip(questions, together, strict=True):
        alone = score_alone(model, q, mode)
        assert [row.nats for row in rows] == pytest.approx([row.nats for row in alone], rel=1e-10, abs=1e-10)
        assert [row.greedy for row in rows] == [row.greedy for row in alone]
        (single,) = score_questions(model, [q], mode)
        assert [row.nats for row in single] == pytest.approx([row.nats for row in rows], rel=1e-10, abs=1e-10)


def test_the_modes_differ_where_something_recurs():
    model, questions = model_of(), made(1)
    nats = [
        score_questions(model, questions, mode)[1][0].nats
        for mode in (On("exact"), MODES["off"](), MODES["one_sweep"]())
    ]
    assert len(set(nats)) == 3


def test_a_sliding_window_is_scored_alike():
    config = any_configuration({"window_pattern": "SL"})
    model = random_model(config)
    q = Question(0, ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 6, 7, 8)), (4, 4), 4, 0)
    for mode in (On("exact"), MODES["off"](), MODES["one_sweep"]()):
        together, alone = score_questions(model, [q], mode)[0], score_alone(model, q, mode)
        assert [row.nats for row in together] == pytest.approx([row.nats for row in alone], rel=1e-10)


@pytest.mark.parametrize("name", MODES)
def test_padding_may_lie_behind_the_context(name: str):
    model, long, short = model_of(), list(range(1, 33)), [1, 2]
    questions = [
        Question(0, ((0, *long, 5, 6), (0, *long, 7)), (33, 33), 33, 0),
        Question(1, ((0, *short, *long[:30]), (0, *short, 9)), (3, 3), 3, 0),
    ]
    for q, rows in zip(questions, score_questions(model, questions, MODES[name]()), strict=True):
        alone = score_alone(model, q, MODES[name]())
        assert [row.nats for row in rows] == pytest.approx([row.nats for row in alone], rel=1e-4)


def test_answers_by_hand():
    q = Question(0, ((0, 1), (0, 2)), (1, 1), 1, 1)
    assert answer_question(q, [OptionScore(2.0, False), OptionScore(1.0, False)]) == Answer(1, True, (2.0, 1.0))
    assert answer_question(q, [OptionScore(1.0, True), OptionScore(1.0, True)]).correct is False  # the first of equals
    alone = Question(0, ((0, 1, 2),), (1,), 1, None)
    assert answer_question(alone, [OptionScore(9.0, True)]).correct
    assert not answer_question(alone, [OptionScore(0.1, False)]).correct


def test_greedy_means_every_token():
    model = model_of(injection="none")
    with torch.no_grad():
        tokens = [0]
        for _ in range(4):
            hidden, _ = model(torch.tensor([tokens]), range(len(tokens)), model.empty_state(1, len(tokens)))
            tokens.append(int(model.logits(hidden)[0, -1].argmax()))
    right, wrong = (Question(0, (tuple(row),), (2,), 2, None) for row in (tokens, [*tokens[:-1], 1 + tokens[-1] % 7]))
    assert score_questions(model, [right], On())[0][0].greedy
    assert not score_questions(model, [wrong], On())[0][0].greedy
    assert shared_length(right.rows[0], wrong.rows[0]) == len(tokens) - 1


def test_centred_accuracy():
    assert task("schema", random=0.25).centred(0.25) == 0
    assert task("schema", random=0.25).centred(1.0) == 1
    assert task("schema", random=0.62).centred(0.552294) == pytest.approx(-0.178175, abs=1e-5)  # GPT-2's boolq


def run(bundle: Path, out: Path, tokenizer: Tokenizer, settings: CoreSettings | None = None, **memory: Any) -> Any:
    torch.manual_seed(0)
    return run_core(model_of(**memory), tokenizer, Bundle.open(bundle), "weights", out, settings, progress=False)


def test_a_run_is_every_question_asked_alone(bundle: Path, tmp_path: Path, tokenizer: Tokenizer):
    result, problems = run(bundle, tmp_path / "out", tokenizer, CoreSettings(prefill="exact"))
    assert problems == []
    values = result.values
    assert values["name"] == "partial CORE (3/22)"
    assert values["missing"] == ["squad"]
    torch.manual_seed(0)
    model = model_of()
    for t in Bundle.open(bundle).tasks:
        for name, mode in (("on", On("exact")), ("off", MODES["off"]()), ("one_sweep", MODES["one_sweep"]())):
            items = t.questions()
            random.Random(1337).shuffle(items)  # as nanochat does before it draws examples
            asked = [build_question(t, items, i, tokenizer, CONTEXT) for i in range(len(items))]
            correct = [answer_question(q, score_alone(model, q, mode)).correct for q in asked]
            assert values["tasks"][t.label]["accuracy"][name] == sum(correct) / len(correct)
    assert values["references"]["gpt2"]["same tasks"] == 0.25
    easy = values["tasks"]["arc_easy"]
    assert easy["centred"]["on"] == pytest.approx((easy["accuracy"]["on"] - 0.33) / 0.67)
    assert values["score"]["on"] == pytest.approx(sum(t["centred"]["on"] for t in values["tasks"].values()) / 3)
    assert read_results(tmp_path / "out") == [result]
    (table,) = result_tables(result)
    assert table.title.endswith("Not in the bundle: squad")
    assert table.body[-1][0] == "partial CORE (3/22)"
    assert table.head[-1] == "gpt2"


def test_without_recurrence_there_is_one_mode(bundle: Path, tmp_path: Path, tokenizer: Tokenizer):
    result, _ = run(bundle, tmp_path / "out", tokenizer, injection="none")
    assert result.values["modes"] == ["off"]


def test_a_stopped_run_goes_on(bundle: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    whole, _ = run(bundle, tmp_path / "whole", tokenizer)
    asked: list[int] = []

    def counting(model: Any, questions: Any, mode: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(questions))
        return score_questions(model, questions, mode)

    monkeypatch.setattr("lrt.eval.core_metric.benchmark.score_questions", counting)
    with pytest.raises(KeyboardInterrupt):
        run(bundle, tmp_path / "out", tokenizer, CoreSettings(rows=9))
    assert asked == [3, 3]
    asked[:] = [0, 0, 0]  # never two again
    again, _ = run(bundle, tmp_path / "out", tokenizer, CoreSettings(rows=9))
    assert again.values == whole.values
    assert sum(asked) == 3 * (12 + 8 + 6) - 6
    asked[:] = [0, 0, 0]
    run(bundle, tmp_path / "out", tokenizer)
    assert sum(asked) == 0


def test_ranks_share_the_questions(bundle: Path, tmp_path: Path, tokenizer: Tokenizer):
    alone, _ = run(bundle, tmp_path / "alone", tokenizer)
    torch.manual_seed(0)
    model, opened = model_of(), Bundle.open(bundle)
    ranks = [SingleProcess(rank=r, ranks=2) for r in range(2)]
    # One after the other: the first has its half only, which the second's ledger finds.
    with pytest.raises(KeyError):
        run_core(model, tokenizer, opened, "weights", tmp_path / "both", None, ranks[1], progress=False)
    task_of = opened.tasks[0]
    done = len(list((tmp_path / "both" / "partial").glob(f"core-{task_of.label}-on-*.rank1.jsonl")))
    assert done == 1
    both, _ = run_core(model, tokenizer, opened, "weights", tmp_path / "both", None, progress=False)
    assert both.values == alone.values


def test_a_limit_makes_it_partial(bundle: Path, tmp_path: Path, tokenizer: Tokenizer):
    result, _ = run(bundle, tmp_path / "out", tokenizer, CoreSettings(limit=4))
    assert result.values["name"] == "partial CORE (3/22, 4 questions each)"
    assert result.values["tasks"]["arc_easy"]["items"] == 4


# Damage
def test_a_damaged_task_leaves_the_others_alone(bundle: Path, tmp_path: Path, tokenizer: Tokenizer):
    file = bundle / "eval_data" / "some" / "winograd.jsonl"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 + 5])
    result, (problem,) = run(bundle, tmp_path / "out", tokenizer)
    assert set(result.values["tasks"]) == {"arc_easy", "lambada_openai"}
    assert result.values["name"] == "partial CORE (2/22)"
    assert str(file) in problem
    assert "is cut off or damaged" in problem
    assert "copy or download the bundle again" in problem
    before = len(list((tmp_path / "out" / "partial").iterdir()))
    make_bundle(bundle)  # repaired: only the third is run
    result, problems = run(bundle, tmp_path / "out", tokenizer)
    assert (set(result.values["tasks"]), problems) == (set(NAMES), [])
    assert len(list((tmp_path / "out" / "partial").iterdir())) == before + 3


def test_a_changed_file_is_named(bundle: Path, tmp_path: Path):
    file = bundle / "eval_data" / "some" / "winograd.jsonl"
    file.write_text(file.read_text().replace("mat", "rug"))
    (t,) = (t for t in Bundle.open(bundle).tasks if t.label == "winograd")
    with pytest.raises(ValueError, match=r"winograd\.jsonl is not the bundle's file: its SHA-256 is"):
        t.questions()
    write(file, [{"continuation": "x", "gold": 0}])
    with pytest.raises(ValueError, match=r"line 1 has no context_options; copy or download"):
        t.questions()


def test_a_folder_without_checksums_is_held_against_the_published_ones(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    """A file cut at a line's end is sound JSON: only its checksum tells."""
    (bundle / "SHA256SUMS").unlink()
    file = bundle / "eval_data" / "some" / "winograd.jsonl"
    sums = {"core.yaml": sha256(bundle / "core.yaml"), "eval_data/some/winograd.jsonl": sha256(file)}
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:-2]))

    def winograd() -> CoreTask:
        return next(t for t in Bundle.open(bundle).tasks if t.label == "winograd")

    assert len(winograd().questions()) == 6  # a bundle of somebody's own
    monkeypatch.setattr("lrt.eval.core_metric.bundle.OFFICIAL_OF", {sums["core.yaml"]: sums})
    with pytest.raises(ValueError, match=r"winograd\.jsonl is not the bundle's file"):
        winograd().questions()


@pytest.mark.parametrize("gold", [3, -1, "1", None])
def test_a_question_without_its_answer_is_named(tmp_path: Path, gold: Any):
    t = task("multiple_choice", file=write(tmp_path / "x.jsonl", [MC[0], {**MC[1], "gold": gold}]))
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: gold is .*, none of its choices; copy or download"):
        t.questions()


def test_a_text_may_hold_a_line_separator(tmp_path: Path):
    line = json.dumps({"context": "one\u2028two", "continuation": "three\x85"}, ensure_ascii=False)
    (tmp_path / "x.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")
    assert [q["context"] for q in task("language_modeling", file=tmp_path / "x.jsonl").questions()] == [
        "one\u2028two"
    ] * 2


def test_no_task_is_no_score(bundle: Path, tmp_path: Path, tokenizer: Tokenizer):
    for label in NAMES:
        (bundle / "eval_data" / "some" / f"{label}.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"arc_easy\.jsonl, line 1 is cut off.*lambada_openai\.jsonl, line 1"):
        run(bundle, tmp_path / "out", tokenizer)
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize("content", ["", "Eval Task\narc_easy\n", "Eval Task,Random baseline\narc_easy,x\n"])
def test_damaged_baselines_are_named(bundle: Path, content: str):
    (bundle / "SHA256SUMS").unlink()
    (bundle / "eval_meta_data.csv").write_text(content)
    with pytest.raises(ValueError, match=r"eval_meta_data\.csv.* copy or download"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("core.yaml", None, "there is no CORE bundle in"),
        ("eval_meta_data.csv", None, r"eval_meta_data\.csv is missing; copy or download"),
        ("core.yaml", "icl_tasks: [{", r"core\.yaml is not the bundle's file"),
    ],
)
def test_a_damaged_bundle_is_named(bundle: Path, name: str, content: str | None, message: str):
    file = bundle / name
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(ValueError, match=message):
        Bundle.open(bundle)
    if content is not None:  # without checksums
        (bundle / "SHA256SUMS").unlink()
        with pytest.raises(ValueError, match=r"core\.yaml is damaged"):
            Bundle.open(bundle)


# Downloads
@pytest.fixture
def served(bundle: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """URL and file of the bundle's .zip on a server of this machine."""
    root = tmp_path / "served"
    root.mkdir()
    packed = root / "eval_bundle.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted(bundle.rglob("*")):
            if file.is_file() and file.name != "SHA256SUMS":
                archive.write(file, f"eval_bundle/{file.relative_to(bundle)}")
        archive.writestr("eval_bundle/../../evil.txt", "no")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/eval_bundle.zip", packed
        server.shutdown()


def test_a_bundle_is_downloaded_once(served: tuple[str, Path], bundle: Path, tmp_path: Path, tokenizer: Tokenizer):
    url, packed = served
    sums = read_sums(bundle / "SHA256SUMS")
    folder = download(tmp_path / "deep" / "core", url, sums, progress=False)
    assert {k: v for k, v in read_sums(folder / "SHA256SUMS").items() if k in sums} == sums
    assert not list(tmp_path.rglob("evil.txt"))
    assert run(folder, tmp_path / "a", tokenizer)[0].values == run(bundle, tmp_path / "b", tokenizer)[0].values
    packed.unlink()
    assert download(folder, url, sums, progress=False) == folder  # there already


def test_a_download_takes_no_place_of_what_a_user_put_there(tmp_path: Path):
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "core.yaml").write_text("the user's own")
    with pytest.raises(ValueError, match=r"core holds files that were not downloaded .* --core "):
        download(tmp_path / "core", "http://127.0.0.1:9/never", progress=False)
    assert (tmp_path / "core" / "core.yaml").read_text() == "the user's own"


def test_a_wrong_checksum_leaves_nothing(served: tuple[str, Path], bundle: Path, tmp_path: Path):
    url, packed = served
    sums = read_sums(bundle / "SHA256SUMS") | {"eval_data/some/winograd.jsonl": "0" * 64}
    with pytest.raises(ValueError, match=r"eval_data/some/winograd\.jsonl of http.* instead of 0000.*give a folder"):
        download(tmp_path / "core", url, sums, progress=False)
    with pytest.raises(ValueError, match=r"http.* has the SHA-256 None instead of"):
        download(tmp_path / "core", url, progress=False)  # not nanochat's
    packed.write_bytes(packed.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"is no whole \.zip"):
        download(tmp_path / "core", url, {}, progress=False)
    with pytest.raises(OSError, match=r"cannot download http.*give a folder: --core FOLDER"):
        download(tmp_path / "core", url.replace("eval_bundle", "nothing"), {}, progress=False)
    assert not (tmp_path / "core").exists()
    assert not list(tmp_path.glob(".core*"))


def test_the_checksums_of_nanochat_s_bundle_are_whole():
    assert len(OFFICIAL) == 20
    assert all(len(digest) == 64 for digest in OFFICIAL.values())


def test_an_untrained_model_guesses(tmp_path: Path, tokenizer: Tokenizer):
    """Options drawn at random, right ones too: no model can know, and 400 questions of four leave 2.2 % of error."""
    g = random.Random(0)
    words = ["the", "cat", "and", "dog", "sat", "on", "mat", "question", "answer"]
    items = [
        {"query": " ".join(g.choices(words, k=4)), "choices": [" ".join(g.choices(words, k=3)) for _ in range(4)]}
        | {"gold": g.randrange(4)}
        for _ in range(400)
    ]
    t = task("multiple_choice", 1, write(tmp_path / "x.jsonl", items))
    model = model_of()
    found = [build_question(t, items, i, tokenizer, CONTEXT) for i in range(len(items))]
    right = sum(
        answer_question(q, r).correct for q, r in zip(found, score_questions(model, found, MODES["off"]()), strict=True)
    )
    assert abs(t.centred(right / 400)) < 3 * math.sqrt(0.25 * 0.75 / 400) / 0.75
