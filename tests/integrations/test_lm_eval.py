"""lm-eval: the log-likelihoods are the live oracle's, whatever the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from support.harness import QUESTIONS, TASK

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, score
from lrt.data.tokenizer import Tokenizer
from lrt.integrations.hf.export import export
from lrt.integrations.lm_eval import make_adapter, run_tasks
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


def test_an_unknown_task_is_named(folder):
    with pytest.raises(ValueError, match="knows no task no_such_task"):
        run_tasks(folder / "checkpoint", ["no_such_task"])
