"""The commands and programs of docs/huggingface.md, run in order as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.harness import QUESTIONS, TASK
from support.nanochat import RECURRENT, published, write

pytest.importorskip("lm_eval")
import json

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig
from lrt.data.tokenizer import Tokenizer
from lrt.model import checkpoint

GUIDE = Path(__file__).parents[2] / "docs" / "huggingface.md"


@pytest.mark.slow
def test_the_guide_runs(tmp_path):
    tokenizer = Tokenizer.train(["def main(): some text of your own", "class A:\n    def f(self): ..."] * 4, 290)
    config = ModelConfig(
        depth=2, width=32, heads=2, vocab_size=tokenizer.vocab_size, context=128, memory=MemoryConfig(injection="both")
    )
    torch.manual_seed(0)
    checkpoint.save(
        tmp_path / "runs/mine", LatentRecurrentTransformer(config), tokenizer, {"schedule": "settled(1, 1, 1)"}
    )
    write(tmp_path / "theirs", published("recurrent", tokenizer.vocab_size), tokenizer.vocab_size, **RECURRENT)
    tokenizer.save(tmp_path / "theirs/tokenizer.json")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/memory.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (tmp_path / "tasks/memory.yaml").write_text(TASK.format(file=tmp_path / "tasks/memory.jsonl"))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(GUIDE.parents[1]), os.environ.get("PYTHONPATH", "")])),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    blocks = re.findall(r"```(bash|python)\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    for language, block in blocks:
        run = ["bash", "-euc", block] if language == "bash" else [sys.executable, "-c", block]
        ran = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, f"{block}\n{ran.stdout}\n{ran.stderr[-3000:]}"
