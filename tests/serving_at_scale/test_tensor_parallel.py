"""Two processes over gloo compute what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.vllm_engine import check_answers, exported, ragged_prompts


@pytest.mark.parametrize("mode", ["exact", "converged"])
def test_two_ranks_are_the_native_engine(mode: str, tmp_path: Path):
    folder = exported(tmp_path, "channels (0, L)", value_embeddings="alternate")
    program = Path(__file__).with_name("tensor_parallel.py")
    # Both on the cores that there are: each would else ask for a socket of its own.
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, program, folder, "2", mode, tmp_path / "answers.json"]
    assert subprocess.run(command, env=environment, timeout=600).returncode == 0
    answers = [
        SimpleNamespace(
            token_ids=answer["token_ids"],
            logprobs=[
                {token: SimpleNamespace(logprob=logprob)}
                for token, logprob in zip(answer["token_ids"], answer["logprobs"], strict=True)
            ],
        )
        for answer in json.loads((tmp_path / "answers.json").read_text())
    ]
    check_answers(folder, ragged_prompts(12), answers, greedy=mode == "exact")
