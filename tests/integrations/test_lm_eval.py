"""lm-eval: the log-likelihoods are the live oracle's, whatever the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from support.harness import LONG_ANSWER, QUESTIONS, TASK

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, score
from lrt.cli.main import main
from lrt.data.tokenizer import Tokenizer
from lrt.integrations.hf.export import export
from lrt.integrations.lm_eval import Adapter, make_adapter, run_tasks
from lrt.model import checkpoint

pytest.importorskip("lm_eval")
TEXTS = [f"the state of token {i} is what token {i + 1} remembers" for i in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint, an exported folder and a task."""
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = Tokenizer.train(TEXTS, 300)
    torch.manual_seed(0)
    memory = MemoryConfig(injection="both")
    model = LatentRecurrentTransformer(
        ModelConfig(depth=2, width=32, heads=2, vocab_size=tokenizer.vocab_size, context=128, memory=memory)
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    checkpoint.save(folder / "checkpoint", model, tokenizer, {"schedule": "settled(0, 1, 1)"})
    export(folder / "checkpoint", folder / "out", "exact")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "memory.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (folder / "tasks" / "memory.yaml").write_text(TASK.format(file=folder / "tasks" / "memory.jsonl"))
    return folder


def oracle(folder: Path, context: str, continuation: str) -> float:
    """Live log-likelihood of a continuation, by the native scorer."""
    model, tokenizer = checkpoint.load(folder / "checkpoint")
    head = [tokenizer.bos, *tokenizer.encode(context)]
    whole = [tokenizer.bos, *tokenizer.encode(context + continuation)]
    return -float(score(model, torch.tensor([whole]))[0, len(head) - 1 :].sum())


PAIRS = [(f"{q['question']}\nAnswer:", f" {choice}") for q in QUESTIONS for choice in q["choices"]]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_loglikelihoods_are_the_live_oracles(folder, batch_size):
    model = make_adapter(folder / "checkpoint", "exact", batch_size)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    expected = [oracle(folder, *pair) for pair in PAIRS]
    for order in (1, -1):
        scored = model.loglikelihood(requests[::order])
        assert [nats for nats, _ in scored] == pytest.approx(expected[::order], abs=1e-4)
    scored = make_adapter(folder / "checkpoint", "converged", batch_size).loglikelihood(requests)
    assert [nats for nats, _ in scored] == pytest.approx(expected, abs=1e-3)


def test_rolling_and_generation(folder):
    model = make_adapter(folder / "checkpoint", "exact", 4)
    native, tokenizer = checkpoint.load(folder / "checkpoint")
    text = " ".join(TEXTS[:3])
    whole = [tokenizer.bos, *tokenizer.encode(text)]
    assert len(whole) <= 128
    (nats,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert nats == pytest.approx(-float(score(native, torch.tensor([whole])).sum()), abs=1e-4)
    options = {"until": ["zzz"], "max_gen_toks": 6, "do_sample": False}
    prompts = ["the state of token", "what token 3"]
    together = model.generate_until([Instance("generate_until", {}, (p, options), i) for i, p in enumerate(prompts)])
    alone = [model.generate_until([Instance("generate_until", {}, (p, options), 0)])[0] for p in prompts]
    assert together == alone


@pytest.mark.slow
def test_a_local_task_and_the_harness_own_command(folder, tmp_path):
    results = run_tasks(folder / "checkpoint", ["memory"], "exact", include=folder / "tasks", batch_size=4)
    likely = 0
    for q in QUESTIONS:
        scores = [oracle(folder, f"{q['question']}\nAnswer:", f" {choice}") for choice in q["choices"]]
        likely += scores.index(max(scores)) == 0
    assert results["memory"]["acc,none"] == pytest.approx(likely / len(QUESTIONS))
    ran = subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
            f"pretrained={folder / 'out'},trust_remote_code=True,add_bos_token=True,prefill=exact",
            "--tasks", "memory", "--include_path", str(folder / "tasks"), "--batch_size", "4", "--device", "cpu",
            "--output_path", str(tmp_path),
        ],
        capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "m")},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    (written,) = tmp_path.rglob("results_*.json")
    assert json.loads(written.read_text())["results"]["memory"]["acc,none"] == results["memory"]["acc,none"]


@pytest.mark.slow
def test_an_unknown_task_is_named(folder):
    with pytest.raises(ValueError, match="knows no task no_such_task"):
        run_tasks(folder / "checkpoint", ["no_such_task"])


LONG = "the state of token is what token remembers. " * 20


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows that the model is called with, to score and to generate, without what pads them on the left."""
    rows: list[list[int]] = []

    scoring, generating = Adapter._model_call, Adapter._model_generate

    def score_rows(self, tokens, *args, **kwargs):
        rows.extend(tokens.tolist())
        return scoring(self, tokens, *args, **kwargs)

    def generate_rows(self, context, max_length, stop, **kwargs):
        masks = kwargs["attention_mask"].bool()
        rows.extend(row[mask].tolist() for row, mask in zip(context, masks, strict=True))
        return generating(self, context, max_length, stop, **kwargs)

    monkeypatch.setattr(Adapter, "_model_call", score_rows)
    monkeypatch.setattr(Adapter, "_model_generate", generate_rows)
    return rows


def ask(model: Adapter, kind: str, *requests: tuple) -> list:
    return getattr(model, kind)([Instance(kind, {}, request, i) for i, request in enumerate(requests)])


def live(folder: Path, tokens: list[int], scored: int) -> float:
    """Live log-likelihood of the last `scored` tokens."""
    model, _ = checkpoint.load(folder / "checkpoint")
    return -float(score(model, torch.tensor([tokens]))[0, -scored:].sum())


def test_a_prompt_beyond_the_context_keeps_bos_and_loses_its_beginning(folder, fed, capsys):
    model, tokenizer = make_adapter(folder / "checkpoint", "exact", 4), checkpoint.load(folder / "checkpoint")[1]
    text, end = tokenizer.encode(LONG.strip() + " token"), len(tokenizer.encode(" token"))
    [(nats, _), _] = ask(model, "loglikelihood", (LONG.strip(), " token"), ("the state", " of"))
    assert all(row[0] == tokenizer.bos for row in fed)
    assert "1 of 2 prompts do not fit" in capsys.readouterr().err
    # 128 inputs, BOS among them; the last token is only predicted.
    assert nats == pytest.approx(live(folder, [tokenizer.bos, *text[-128:]], end), abs=1e-4)


@pytest.mark.parametrize("words", [1, 15, 25, 60])
def test_a_rolling_text_is_scored_in_the_windows_of_lrt_evaluate(folder, fed, words):
    model, tokenizer = make_adapter(folder / "checkpoint", "exact", 4), checkpoint.load(folder / "checkpoint")[1]
    text = " ".join(TEXTS[:words])
    tokens = tokenizer.encode(text)
    (nats, empty) = ask(model, "loglikelihood_rolling", (text,), ("",))
    assert all(row[0] == tokenizer.bos for row in fed)
    pieces = [tokens[i : i + 127] for i in range(0, len(tokens), 127)]
    assert nats == pytest.approx(sum(live(folder, [tokenizer.bos, *p], len(p)) for p in pieces), rel=1e-5)
    assert empty == 0.0


def test_contexts_and_continuations_of_every_length(folder, fed):
    """Empty context or continuation, one that the tokenizer joins with the context, one that just fits.

    Two of them give the model the same inputs, and score tokens of different number.
    """
    model, tokenizer = make_adapter(folder / "checkpoint", "exact", 4), checkpoint.load(folder / "checkpoint")[1]
    bos, remembers = tokenizer.bos, tokenizer.encode("remembers")
    alone, nothing, joined = ask(model, "loglikelihood", ("", "remembers"), ("what", ""), ("remember", "s"))
    assert alone[0] == pytest.approx(live(folder, [bos, *remembers], len(remembers)), abs=1e-4)
    assert nothing == (0.0, True)
    assert len(remembers) <= len(tokenizer.encode("remember"))  # joined
    assert joined[0] == pytest.approx(live(folder, [bos, *remembers], 1), abs=1e-4)
    whole = tokenizer.encode(LONG)[:128]
    text = tokenizer.decode(whole)
    assert tokenizer.encode(text) == whole
    (just,) = ask(model, "loglikelihood", ("", text))
    assert just[0] == pytest.approx(live(folder, [bos, *whole], 128), abs=1e-3)
    assert all(row[0] == bos for row in fed)
    with pytest.raises(ValueError, match=r"a continuation of \d+ tokens is to be scored.*context is 128"):
        ask(model, "loglikelihood", ("", "a"), ("the", " " + LONG))


def test_generation_without_a_limit_takes_what_the_context_leaves(folder, fed, capsys):
    model, tokenizer = make_adapter(folder / "checkpoint", "exact", 4), checkpoint.load(folder / "checkpoint")[1]
    greedy = {"until": ["zzz"], "do_sample": False}
    prompts = ["the state of", LONG]
    unnamed = ask(model, "generate_until", *((p, greedy) for p in prompts))
    assert [row[0] for row in fed] == [tokenizer.bos] * 2
    assert sorted(map(len, fed)) == [1 + len(tokenizer.encode("the state of")), 64]
    assert "1 of 2 prompts do not fit" in capsys.readouterr().err
    assert unnamed == ask(model, "generate_until", *((p, {**greedy, "max_gen_toks": 64}) for p in prompts))
    assert unnamed[1:] == ask(model, "generate_until", (LONG, greedy))


@pytest.mark.parametrize("limit", [0, 127, 128, 500])
def test_a_task_that_leaves_no_room_for_a_prompt_is_named(folder, limit):
    model = make_adapter(folder / "checkpoint", "exact", 4)
    request = Instance("generate_until", {}, ("the", {"max_gen_toks": limit}), 0, metadata=("memory", 0, 1))
    with pytest.raises(ValueError, match=f"task memory wants {limit} new tokens.*context of 128.*give 1 to 126"):
        model.generate_until([request])


@pytest.mark.slow  # the harness reads the index of all its tasks
def test_the_command_line_names_such_a_task_before_others_are_run(folder, tmp_path, fed, capsys):
    (tmp_path / "long.yaml").write_text(LONG_ANSWER.format(file=folder / "tasks" / "memory.jsonl"))
    (tmp_path / "memory.yaml").write_text((folder / "tasks" / "memory.yaml").read_text())
    with pytest.raises(SystemExit):
        main(["evaluate", str(folder / "checkpoint"), "--tasks", "memory", "long", "--tasks-include", str(tmp_path)])
    assert "lrt: task long wants 300 new tokens" in capsys.readouterr().err
    assert fed == []


def test_an_empty_stop_string_stops_nothing(folder):
    model = make_adapter(folder / "checkpoint", "exact", 4)
    limits = {"max_gen_toks": 8, "do_sample": False}
    stopped, free = ask(model, "generate_until", *(("the state", {**limits, "until": u}) for u in ("", "zzz")))
    assert stopped == free
