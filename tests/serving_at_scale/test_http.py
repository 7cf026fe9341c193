"""vLLM's own server with an exported LRT: 32 clients of the official library at once, a third of which go away."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from support.vllm_engine import NEW, exported, native, ragged_prompts, true_logits

CLIENTS = 32
PROMPTS = ragged_prompts(CLIENTS, seed=5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as an older version wrote it: without the fields that have come since."""
    out = exported(tmp_path_factory.mktemp("http"), "shared")
    config = json.loads((out / "config.json").read_text())
    for name in ("scoring", "plugins"):
        config.pop(name)
    for name in ("delay", "layers", "state_start"):
        config["architecture"]["memory"].pop(name)
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, shared = free_port(), tmp_path_factory.mktemp("prometheus")
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(shared), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name",
        "mine", "--port", str(port), "--dtype", "float32", "--block-size", "32", "--max-num-seqs", "16",
        "--max-num-batched-tokens", "128", "--num-gpu-blocks-override", "40", "--enforce-eager",
        "--kv-cache-memory-bytes", str(2**26), "--hf-overrides", '{"prefill": "exact"}',
    ]  # fmt: skip
    server = subprocess.Popen(command, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < end
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)


def complete(url: str, number: int) -> list[str] | None:
    """The tokens of an answer, as the server spells ids; None of one whose client goes away after a few."""
    answer = client(url).completions.create(
        model="mine",
        prompt=PROMPTS[number],
        max_tokens=NEW,
        temperature=0,
        stream=True,
        logprobs=1,
        extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
    )
    tokens: list[str] = []
    for chunk in answer:
        tokens += chunk.choices[0].logprobs.tokens if chunk.choices and chunk.choices[0].logprobs else []
        if number % 3 == 2 and len(tokens) > 2:
            answer.close()
            return None
    return tokens


def metric(url: str, name: str) -> float:
    text = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


def test_32_clients_get_what_each_would_alone(url: str, folder: Path):
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda number: complete(url, number), range(CLIENTS)))
    stayed = [number for number in range(CLIENTS) if number % 3 != 2]
    texts = {n: [int(token.removeprefix("token_id:")) for token in answers[n] or []] for n in stayed}
    assert all(len(text) == NEW for text in texts.values())
    logits = true_logits(folder, [[*PROMPTS[n], *texts[n]] for n in stayed])
    for number, row in zip(stayed, logits, strict=True):
        own = row[len(PROMPTS[number]) - 1 : -1]
        behind = own.amax(-1) - own.gather(1, own.new_tensor(texts[number]).long()[:, None])[:, 0]
        assert behind.max() < 1e-4, f"client {number}"
    assert native(folder).config.context >= max(map(len, PROMPTS)) + NEW


def test_what_is_counted(url: str):
    assert metric(url, "lrt_prompts_total") >= CLIENTS // 2
    assert metric(url, "lrt_prefill_bound_count") == metric(url, "lrt_prompts_total")
    assert metric(url, "vllm:num_preemptions_total") > 0
    end = time.monotonic() + 30
    while metric(url, "vllm:num_requests_running") > 0:  # those that have gone away are forgotten
        assert time.monotonic() < end
        time.sleep(0.5)


def test_modes_go_over_http(url: str):
    asked = {"model": "mine", "prompt": PROMPTS[20], "max_tokens": 1}
    client(url).completions.create(**asked, extra_body={"vllm_xargs": {"prefill": "exact"}})
    with pytest.raises(openai.BadRequestError, match="choose one of exact, converged, fast"):
        client(url).completions.create(**asked, extra_body={"vllm_xargs": {"prefill": "exakt"}})
    assert client(url).completions.create(**asked).choices[0].finish_reason == "length"
