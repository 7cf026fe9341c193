"""One promise: no request, valid or not, keeps other clients waiting. Figures are benchmarks/serve_pauses.py's."""

from __future__ import annotations

import asyncio
import importlib
import json
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from support.server import Live, live
from test_serve_limits import end, post, start

from lrt.serve.body import LARGE, MEMBERS, count_values, largest_object, off_loop, parse_body
from lrt.serve.config import Limits, Settings
from lrt.serve.errors import ApiError
from lrt.serve.protocol import ChatBody, CompletionBody

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "serve_pauses.py"
LIMITS = Limits()


def random_json(r: random.Random, depth: int) -> Any:
    texts = ("", "a", '"', "\\", '\\"', "[,{", "é\n", '",[')
    kind = r.randrange(5 if depth else 3)
    if kind == 3:
        return [random_json(r, depth - 1) for _ in range(r.randrange(5))]
    if kind == 4:
        return {r.choice(texts) + str(i): random_json(r, depth - 1) for i in range(r.randrange(5))}
    return r.choice(texts) if kind == 0 else r.choice([0, -1.5e300, 10**30]) if kind == 1 else r.choice([None, True])


def count_exactly(data: Any) -> int:
    """Values and names, the outermost left out."""
    if isinstance(data, dict):
        return sum(2 + count_exactly(inner) for inner in data.values())
    return sum(1 + count_exactly(inner) for inner in data) if isinstance(data, list) else 0


def test_values_are_counted_before_they_are_made():
    r = random.Random(0)
    for _ in range(300):
        data = random_json(r, 4)
        for text in (json.dumps(data), json.dumps(data, ensure_ascii=False, indent=1)):
            exact, bound = count_exactly(data), count_values(text.encode(), 10**9)
            assert exact <= bound + 1
            assert bound <= 3 * exact + 2


@pytest.mark.parametrize(
    ("raw", "status", "message"),
    [
        (
            b'{"model":"m","prompt":[' + b"1," * 40_000 + b"1]}",
            413,
            "more than 32,768 JSON values; send fewer, or text",
        ),
        (b"[" * 500_000, 413, "more than 32,768 JSON values"),
        (b'"' * 500_000, 413, "more than 32,768 JSON values"),
        (b"[" * 30_000, 400, "no JSON object"),
        (b"[" * 150 + b"]" * 150, 400, "no JSON object"),
        (b'{"model":"m","prompt":"\\ud800"}', 400, "half a character"),
        (b'{"model":NaN}', 400, "no JSON object"),
        (b"\xff", 400, "no JSON object"),
        (b"", 400, "no JSON object"),
        (json.dumps({f"k{i}": 1 for i in range(12_000)}).encode(), 400, "12,000 members, 1,024 are taken"),
        (json.dumps({"logit_bias": {str(i): 1 for i in range(1025)}}).encode(), 400, "1,025 members"),
        (json.dumps({"messages": [{f"k{i}": 1 for i in range(5000)}]}).encode(), 400, "5,000 members"),
        (b'{"' + b"a" * 900_000 + b'":1}', 400, ""),
    ],
    ids=lambda given: repr(given)[:30],
)
def test_what_is_too_much_is_refused_in_few_words(raw: bytes, status: int, message: str):
    for model in (CompletionBody, ChatBody):
        with pytest.raises(ApiError) as caught:
            parse_body(raw, model, LIMITS)
        assert caught.value.status == status
        assert message in str(caught.value)
        assert len(json.dumps(caught.value.body)) < 1000


def test_a_text_may_hold_any_number_of_commas():
    raw = json.dumps({"model": "m", "prompt": 'a,[{\\"' * 100_000}).encode()
    body = parse_body(raw, CompletionBody, LIMITS)
    assert isinstance(body, CompletionBody)
    assert body.prompt == 'a,[{\\"' * 100_000
    assert largest_object({"a": [1, "b", {str(i): None for i in range(MEMBERS)}]}) == MEMBERS


def test_what_is_large_is_done_in_a_thread():
    async def where(size: int) -> int:
        return await off_loop(size, threading.get_ident)

    assert asyncio.run(where(LARGE - 1)) == threading.get_ident()
    assert asyncio.run(where(LARGE)) != threading.get_ident()


def test_large_bodies_and_answers_leave_the_loop_alone(up: Live, monkeypatch: pytest.MonkeyPatch):
    """Reading, tokenizing and writing: each in a thread, and tokenizing without the interpreter."""
    loop_thread, names = [], []
    tokenizer = up.registry.find("lrt").tokenizer

    async def spy(size: int, function: Any, *arguments: Any) -> Any:
        loop_thread.append(threading.get_ident())

        def noted() -> Any:
            names.append((function.__name__, threading.get_ident() == loop_thread[0]))
            return function(*arguments)

        return await off_loop(size, noted)

    def refuse(text: str) -> Any:
        raise AssertionError

    for module in ("body", "app", "responses"):
        monkeypatch.setattr(f"lrt.serve.{module}.off_loop", spy)
    monkeypatch.setattr(tokenizer, "encode", refuse)
    body: dict[str, Any] = {"model": "lrt", "prompt": "a", "max_tokens": 200, "logit_bias": {"5": 100}, "logprobs": 20}
    answer = httpx.post(f"{up.url}/v1/completions", json=body | {"n": 3, "user": "u" * LARGE}, timeout=60)
    assert answer.status_code == 200
    assert len(answer.content) == int(answer.headers["content-length"])
    assert "prompt_tokens_details" not in answer.json()["usage"]  # it would tell what others have asked
    assert ("parse_body", False) in names
    assert ("parse_completion", False) in names
    assert ("write_answer", False) in names
    names.clear()
    turns = [{"role": "user", "content": "a " * LARGE}]
    refused = httpx.post(f"{up.url}/v1/chat/completions", json={"model": "lrt", "messages": turns})
    assert "the context of lrt is 256; shorten it" in refused.json()["error"]["message"]
    assert names == [("parse_body", False), ("parse_chat", False)]


def test_a_request_is_checked_once(up: Live, monkeypatch: pytest.MonkeyPatch):
    from lrt.inference.request import Request

    checks, check = [], Request.check
    monkeypatch.setattr(Request, "check", lambda request, *limits: checks.append(1) or check(request, *limits))
    up.client().completions.create(model="lrt", prompt="a", max_tokens=1)
    assert len(checks) == 1


def test_a_prompt_is_prefilled_while_others_decode(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """As long as a prefill lasts, another client's tokens come."""
    go_on = threading.Event()
    with live(folder, settings=Settings(rows=3, prefill="exact")) as up:
        model = up.registry.find("lrt")
        model.workers[0].prefills.submit(go_on.wait)  # the thread of prefills is busy with somebody's prompt
        body: dict[str, Any] = {"model": "lrt", "max_tokens": 120, "logit_bias": {"5": 100}}
        answers: list[httpx.Response] = []
        swept = threading.Thread(
            target=lambda: answers.append(
                httpx.post(
                    f"{up.url}/v1/completions",
                    json=body | {"prompt": list(range(5, 125)) + [5] * 16, "max_tokens": 2, "prefill": "one_sweep"},
                    timeout=60,
                )
            )
        )
        swept.start()
        while not model.workers[0].engine.engine.prefilling:
            time.sleep(0.01)
        assert up.client().completions.create(prompt="a", **body).choices[0].finish_reason == "length"
        assert not answers
        go_on.set()
        swept.join(60)
        assert answers[0].status_code == 200
        assert up.idle()


@pytest.mark.slow
def test_one_line_per_event(folder: Path):
    """Clients that leave an answer, and no file descriptors: no traceback, one line, and it recovers."""
    process, url = start(folder)
    host, port = url.removeprefix("http://").split(":")
    address = (host, int(port))
    try:
        whole = json.dumps({"model": "lrt", "prompt": "x", "max_tokens": 200, "logit_bias": {"5": 100}}).encode()
        for _ in range(5):
            with socket.create_connection(address) as link:
                link.sendall(post(whole).replace(b"Host: x", b"Host: 127.0.0.1"))
                time.sleep(0.1)
        used = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (used + 4, used + 4))
        links = [socket.create_connection(address) for _ in range(30)]
        time.sleep(2.5)
        for link in links:
            link.close()
        assert httpx.get(f"{url}/healthz", timeout=20).status_code == 200
        output = end(process)
    finally:
        process.kill()
    assert "Traceback" not in output
    assert output.count("no connection can be accepted (Too many open files)") == 1
    assert len(output.splitlines()) < 20


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/serve_pauses.py."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("serve_pauses")


def waits(ping: float, token: float, *failed: str) -> dict[str, Any]:
    longest = {"ping_ms": {"median": 1.0, "longest": ping}, "token_ms": {"median": 1.0, "longest": token}}
    return longest | {"requests": 1, "statuses": [200], "failed": list(failed)}


@pytest.mark.parametrize(
    ("row", "limit_ms", "held"),
    [
        (waits(52, 55), 50, True),  # on top of the 2 and 5 ms of a machine where nothing is asked
        (waits(52.1, 55), 50, False),
        (waits(52, 55.1), 50, False),
        (waits(1, 1, "HTTP/1.1 500"), 50, False),
        (waits(400, 400), 1000, True),
        (waits(2142, 10), 1000, False),  # what the faults of this kind were
        (waits(10, 5855), 1000, False),
    ],
)
def test_the_exit_status_says_whether_others_waited(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any, row: dict[str, Any], limit_ms: float, held: bool
):
    monkeypatch.setattr(script, "measure", lambda *arguments: {"nothing": waits(2, 5), "a kind": row})
    with pytest.raises(SystemExit) as ended:
        script.main(Path("model"), limit_ms=limit_ms)
    assert ended.value.code == (0 if held else 1)
    assert json.loads(capsys.readouterr().out)["holds"] == {"nothing": True, "a kind": held}


def test_a_wait_that_goes_on_is_counted(script: ModuleType):
    gaps = script.Gaps(ping=0.5, token=0.1, pings=3, tokens=2, asked_at=10.0, token_at=11.0)
    taken = gaps.take(13.0)
    assert (taken.ping, taken.token, taken.pings, taken.tokens) == (3.0, 2.0, 3, 2)
    assert (gaps.ping, gaps.token, gaps.pings, gaps.asked_at, gaps.token_at) == (0.0, 0.0, 0, 10.0, 11.0)


@pytest.mark.slow
def test_no_request_keeps_others_waiting(folder: Path):
    """The kinds that once kept others for 2 to 6 s. A busy machine may add a second to a wait; it has two tries."""
    statuses = {
        "nothing": [0],
        "60,000 unknown names": [413],
        "a word of a megabyte": [400],
        "8 long answers, 20 logprobs": [200],
        "chunks of a byte": [400],
    }
    kinds = [name for name in statuses if name != "nothing"]
    command = [sys.executable, str(SCRIPT), str(folder), "--seconds", "0.5", "--at-least", "1", "--limit-ms", "1000"]
    done = subprocess.run([*command, "--kinds", *kinds], capture_output=True, text=True, timeout=200)
    if done.returncode:
        done = subprocess.run(done.args, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, (done.stdout, done.stderr[-2000:])
    figures = json.loads(done.stdout.splitlines()[-1])["kinds"]
    assert {name: row["statuses"] for name, row in figures.items()} == statuses
    assert all(row["pings"] > 0 for row in figures.values())
