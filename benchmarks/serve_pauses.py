"""How long one client is kept waiting by what others ask of `lrt serve`: the longest pause, by kind of request.

    python benchmarks/serve_pauses.py runs/mine --seconds 4

Starts a server process of its own, and a process that watches it: one connection asks for /healthz every few
milliseconds, another streams tokens. Meanwhile this process sends requests of one kind after the other, the good and
the bad. Given are, in milliseconds, the longest answer of /healthz and the longest time between two tokens during a
request: the median over the requests of a kind, and the longest of all. A machine that does other work makes gaps of
its own, which `nothing` shows: the same while nothing else is asked. Prints a JSON object, in which "holds" says by
kind whether no wait was longer than --limit-ms and what `nothing` showed together. Exits with 1 where one was.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from lrt.utils.provenance import hardware

PAUSE = 0.003
"""Seconds between two questions for /healthz."""
MEGABYTE = 1_000_000
JSON = "Content-Type: application/json\r\n"


def text_body(text: str, **fields: Any) -> bytes:
    return json.dumps({"model": "served", "prompt": text, "max_tokens": 1, **fields}).encode()


def chat_body(messages: list[Any], **fields: Any) -> bytes:
    return json.dumps({"model": "served", "messages": messages, "max_tokens": 1, **fields}).encode()


def raw_json(part: str, name: str = "prompt") -> bytes:
    """A body of nearly a megabyte: a list of one and the same value under a name."""
    return f'{{"model":"served","{name}":[{",".join([part] * (990_000 // (len(part) + 1)))}]}}'.encode()


def members(count: int) -> dict[str, int]:
    return {f"k{i}": i for i in range(count)}


TURN = {"role": "user", "content": "a"}
BODIES: dict[str, Callable[[], bytes]] = {
    "a word of a megabyte": lambda: text_body("a" * 980_000),
    "a text of a megabyte": lambda: text_body("so it was, [and] {it} is; " * 38_000),
    "a megabyte of escapes": lambda: b'{"model":"served","prompt":"' + b"\\n" * 490_000 + b'"}',
    "32 prompts of 30 kB": lambda: json.dumps({"model": "served", "prompt": ["so it was " * 3000] * 32}).encode(),
    "60,000 unknown names": lambda: json.dumps({"model": "served", **members(60_000)}).encode(),
    "12,000 unknown names": lambda: json.dumps({"model": "served", **members(12_000)}).encode(),
    "1,000 unknown names": lambda: json.dumps({"model": "served", **members(1000)}).encode(),
    "12,000 biases": lambda: text_body("a", logit_bias=members(12_000)),
    "1,000 biases": lambda: text_body("a", max_tokens=50, logit_bias={str(i % 300): 1 for i in range(1000)}),
    "12,000 names in a message": lambda: chat_body([TURN | members(12_000)]),
    "12,000 names in metadata": lambda: chat_body([TURN], metadata=members(12_000)),
    "4,000 messages": lambda: chat_body([TURN] * 4000),
    "8,000 parts of a message": lambda: chat_body(
        [{"role": "user", "content": [{"type": "text", "text": "a"}] * 8000}]
    ),
    "8,000 wrong parts": lambda: chat_body([{"role": "user", "content": [{"type": "x", "text": "a"}] * 8000}]),
    "a megabyte of lists": lambda: raw_json("[]"),
    "a megabyte of objects": lambda: raw_json('{"":1}'),
    "a megabyte of numbers": lambda: raw_json("1"),
    "a megabyte of long numbers": lambda: raw_json("9" * 4000),
    "30,000 tokens": lambda: raw_json("1")[: 2 * 30_000] + b"1]}",
    "30,000 tokens, one wrong": lambda: raw_json("1")[: 2 * 30_000] + b'"a"]}',
    "15,000 prompts of a token": lambda: raw_json("[1]")[: 4 * 15_000] + b"[1]]}",
    "30,000 stops": lambda: text_body("a", stop=["a"] * 30_000),
    "long stops": lambda: text_body("a", max_tokens=60, stop=["a" * 999 + str(i) for i in range(4)]),
    "a megabyte of brackets": lambda: b"[" * 990_000,
    "a megabyte of quotes": lambda: b'"' * 990_000,
    "a megabyte of nothing": lambda: b" " * 990_000,
    "half characters": lambda: b'{"model":"served","prompt":"' + b"\\ud800" * 160_000 + b'"}',
    "a name of a megabyte": lambda: b'{"model":"served","' + b"a" * 980_000 + b'":1}',
    "2 MB": lambda: text_body("a" * 2 * MEGABYTE),
    "a long prompt, converged": lambda: text_body(LONG, prefill="converged"),
    "a long prompt, one sweep": lambda: text_body(LONG, prefill="one_sweep"),
    "a long prompt, exact": lambda: text_body(LONG, prefill="exact"),
    "a long prompt, scored": lambda: text_body(LONG, max_tokens=0, echo=True, logprobs=20),
    "8 long answers, 20 logprobs": lambda: text_body("a", n=8, max_tokens=200, logprobs=20, logit_bias={"5": 100}),
}
"""By kind: the body of a request for an answer."""
LONG = "it is "
"""A prompt that nearly fills the context: set by `main`."""


@dataclass
class Gaps:
    """The longest waits so far, in seconds."""

    ping: float = 0.0
    token: float = 0.0
    pings: int = 0
    tokens: int = 0
    failed: list[str] = field(default_factory=list)
    asked_at: float | None = None
    """When the question for /healthz was sent that is not answered yet."""
    token_at: float | None = None
    """When the last token came of the answer that goes on."""

    def take(self, now: float) -> Gaps:
        """The gaps until now, with those that go on; what follows begins anew."""
        ping, token = (0.0 if since is None else now - since for since in (self.asked_at, self.token_at))
        taken = dataclasses.replace(self, ping=max(self.ping, ping), token=max(self.token, token))
        self.ping, self.token, self.pings, self.tokens, self.failed = 0.0, 0.0, 0, 0, []
        return taken


def request(path: str, body: bytes | None = None, more: str = "") -> bytes:
    verb = "GET" if body is None else "POST"
    head = f"{verb} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{more}"
    return head.encode() + (b"\r\n" if body is None else f"Content-Length: {len(body)}\r\n\r\n".encode() + body)


def exchange(port: int, data: bytes, timeout: float = 60.0) -> bytes:
    """What the server answers to bytes on a connection of their own, up to its end."""
    parts = []
    with socket.create_connection(("127.0.0.1", port), timeout) as link:
        with suppress(OSError):  # it may be refused before its end
            link.sendall(data)
        with suppress(OSError):
            while part := link.recv(65536):
                parts.append(part)
    return b"".join(parts)


def ping(port: int, gaps: Gaps, lock: Any) -> None:
    """Ask for /healthz again and again, on one connection."""
    link = socket.create_connection(("127.0.0.1", port), 60)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while True:
        with lock:
            gaps.asked_at = begin = time.perf_counter()
        link.sendall(request("/healthz"))
        answer = b""
        while not answer.endswith(b"}}"):  # head and body may come one after the other
            answer += link.recv(65536)
        with lock:
            gaps.ping = max(gaps.ping, time.perf_counter() - begin)
            gaps.asked_at = None
            gaps.pings += 1
            if b" 200 " not in answer[:20]:
                gaps.failed.append(answer[:80].decode("latin1"))
        time.sleep(PAUSE)


def stream(port: int, gaps: Gaps, lock: Any, tokens: int) -> None:
    """Stream one answer after another, and note the time between tokens."""
    body = text_body("a", max_tokens=tokens, stream=True, logit_bias={"5": 100}, prefill="exact")
    while True:
        with socket.create_connection(("127.0.0.1", port), 60) as link:
            link.sendall(request("/v1/completions", body, JSON + "Connection: close\r\n"))
            while part := link.recv(65536):
                now = time.perf_counter()
                with lock:
                    if gaps.token_at is not None:
                        gaps.token = max(gaps.token, now - gaps.token_at)
                    gaps.tokens += part.count(b"data: {")
                    gaps.token_at = now
        with lock:
            gaps.token_at = None


def watch(port: int, tokens: int, pipe: Any) -> None:
    """A process: for each message of the pipe, the gaps since the one before."""
    gaps, lock = Gaps(), threading.Lock()
    sys.setswitchinterval(0.0005)
    threading.Thread(target=ping, args=(port, gaps, lock), daemon=True).start()
    threading.Thread(target=stream, args=(port, gaps, lock, tokens), daemon=True).start()
    while pipe.recv():
        with lock:
            taken = gaps.take(time.perf_counter())
        pipe.send(taken)


def send(port: int, data: bytes | None) -> int:
    """The status of a request; without one, 0 after a while."""
    if data is None:
        time.sleep(0.3)
        return 0
    answer = exchange(port, data)
    time.sleep(0.02)  # so that the watcher has seen what it did
    return int(answer[9:12]) if answer[9:12].isdigit() else 0


@contextmanager
def serving(folder: Path, *more: str) -> Iterator[int]:
    """A server process over a checkpoint that it calls `served`: its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lrt", "serve", str(folder), "--names", "served", "--port", str(port)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen([*command, "--device", "cpu", *more], stdout=quiet, stderr=quiet) as process:
        try:
            for _ in range(600):
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield port
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def other_requests() -> dict[str, bytes]:
    """Requests that are not a body of JSON: by kind."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n{JSON}Connection: close\r\n"
    return {
        "5,000 headers": request("/healthz", None, "Connection: close\r\n" + "a:b\r\n" * 5000),
        "a header of 30 kB": request("/healthz", None, f"Connection: close\r\na: {'b' * 30_000}\r\n"),
        "chunks of a byte": (head + "Transfer-Encoding: chunked\r\n\r\n").encode()
        + b"1\r\n \r\n" * 100_000
        + b"0\r\n\r\n",
        "1,000 questions at once": request("/healthz") * 1000 + request("/healthz", None, "Connection: close\r\n"),
    }


def measure(folder: Path, seconds: float, at_least: int, kinds: list[str], tokens: int) -> dict[str, Any]:
    """By kind the figures of `summary`; the first is `nothing`."""
    everything = {
        name: request(path(name), body(), JSON + "Connection: close\r\n") for name, body in BODIES.items()
    } | other_requests()
    figures: dict[str, Any] = {}
    with serving(folder) as port:
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        watcher = multiprocessing.get_context("spawn").Process(target=watch, args=(port, tokens, theirs), daemon=True)
        watcher.start()
        time.sleep(3)  # the first requests make tables and open files

        def gaps() -> Gaps:
            ours.send(True)
            return ours.recv()

        for name in ("nothing", *(kinds or everything)):
            gaps()
            statuses, seen, end = [], [], time.monotonic() + seconds
            while time.monotonic() < end or len(statuses) < at_least:
                statuses.append(send(port, everything.get(name)))
                seen.append(gaps())
            figures[name] = summary(statuses, seen)
        ours.send(False)
        watcher.kill()
    return figures


def summary(statuses: list[int], seen: list[Gaps]) -> dict[str, Any]:
    """The figures of one kind, from the status and the gaps of each of its requests."""
    pings, tokens = [1000 * gaps.ping for gaps in seen], [1000 * gaps.token for gaps in seen]
    return {
        "ping_ms": {"median": round(statistics.median(pings), 1), "longest": round(max(pings), 1)},
        "token_ms": {"median": round(statistics.median(tokens), 1), "longest": round(max(tokens), 1)},
        "requests": len(statuses),
        "statuses": sorted(set(statuses)),
        "pings": sum(gaps.pings for gaps in seen),
        "tokens": sum(gaps.tokens for gaps in seen),
        "failed": [answer for gaps in seen for answer in gaps.failed][:3],
    }


def holds(figures: dict[str, Any], limit_ms: float) -> dict[str, bool]:
    """By kind: whether no wait was longer than the limit and the longest while nothing is asked, together."""
    calm = figures["nothing"]
    return {
        name: not row["failed"]
        and all(row[wait]["longest"] <= limit_ms + calm[wait]["longest"] for wait in ("ping_ms", "token_ms"))
        for name, row in figures.items()
    }


def path(name: str) -> str:
    return "/v1/chat/completions" if "message" in name or "parts" in name or "metadata" in name else "/v1/completions"


def main(
    checkpoint_folder: tyro.conf.Positional[Path],
    seconds: float = 4.0,
    at_least: int = 2,
    kinds: tuple[str, ...] = (),
    tokens: int = 200,
    prompt_words: int = 60,
    limit_ms: float = 50.0,
) -> None:
    """Measure all kinds, or some; the exit status is 1 where one keeps others waiting longer than the limit."""
    global LONG
    LONG = "it is " * (prompt_words // 2)
    figures = measure(checkpoint_folder, seconds, at_least, list(kinds), tokens)
    for name, row in figures.items():
        ping, token = (f"{row[key]['median']:6.1f} {row[key]['longest']:6.1f}" for key in ("ping_ms", "token_ms"))
        print(f"{name:28} ping {ping}  token {token}  {row['requests']:4} x {row['statuses']}", file=sys.stderr)
    held = holds(figures, limit_ms)
    print(json.dumps({"kinds": figures, "holds": held, "limit_ms": limit_ms, "hardware": hardware("cpu")}))
    sys.exit(0 if all(held.values()) else 1)


if __name__ == "__main__":
    tyro.cli(main)
