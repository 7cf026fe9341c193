"""Many clients at once against `lrt serve`, some of them rude: tokens right, rows free, memory flat, latencies.

    python benchmarks/serve_load.py runs/mine --clients 64 --seconds 120

Starts a server process of its own. Every client streams completions in a loop; a third of the requests leave in the
middle, one in ten is malformed, oversized or slow. Whole answers are compared, token for token, with what an
engine gives that decodes each request alone. Prints a JSON object; ends with 1 where anything does not hold.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from lrt.inference import cost_model
from lrt.inference.engine import Engine
from lrt.inference.request import Request
from lrt.inference.sampling import Sampling, uniform
from lrt.model import checkpoint
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.library import sequential
from lrt.schedules.refinement import refine
from lrt.utils.provenance import hardware

MARGIN = 1e-4
"""Below it two exact decodes may differ in float32 (contract, section 7)."""


@dataclass(frozen=True)
class Query:
    """One of the requests that clients send."""

    body: dict[str, Any]
    request: Request
    tokens: tuple[int, ...]
    """What it gives alone."""


@dataclass
class Tally:
    """What the clients counted."""

    whole: int = 0
    left: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    wrong: list[tuple[Query, list[int]]] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    next: list[float] = field(default_factory=list)


def make_queries(model: LatentRecurrentTransformer, bos: int, folder: Path, count: int, longest: int) -> list[Query]:
    """Requests of many lengths, and what each gives alone."""
    r = random.Random(0)
    calibration = cost_model.read_calibration(folder, model)
    queries = []
    for seed in range(count):
        prompt = (bos, *(r.randrange(1, model.config.vocab_size) for _ in range(r.choice((1, 4, 16, 48)))))
        temperature, new = r.choice((0.0, 0.8, 1.0)), r.randint(8, longest)
        request = Request(prompt, new, Sampling(temperature, top_p=0.95), seed, stop=frozenset({bos}))
        ((done,),) = Engine(model, rows=1, prefill="converged", calibration=calibration).complete([request])
        body = {"prompt": list(prompt), "max_tokens": new, "temperature": temperature, "top_p": 0.95, "seed": seed}
        queries.append(Query(body, request, done.tokens))
    return queries


async def exchange(port: int, head: str, body: bytes, pause: float = 0.0) -> tuple[asyncio.StreamReader, Any]:
    """Send a request; `pause` seconds before the second half of its body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + (body[: len(body) // 2] if pause else body))
    await writer.drain()
    if pause:
        await asyncio.sleep(pause)
        writer.write(body[len(body) // 2 :])
    return reader, writer


def post(body: bytes) -> str:
    return (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )


async def send_rude(port: int, name: str, seen: Tally, r: random.Random) -> None:
    """A request that has to be refused, in one of several ways."""
    kinds: dict[str, tuple[bytes, str, float]] = {
        "malformed": (b'{"model": "' + bytes([r.randrange(256) for _ in range(50)]), "400", 0),
        "unknown": (json.dumps({"model": name, "prompt": "x", "file": "/etc/passwd"}).encode(), "400", 0),
        "oversized": (b'{"prompt": "' + b"x" * 1_200_000 + b'"}', "413", 0),
        "slow": (json.dumps({"model": name, "prompt": "x" * 100}).encode(), "408", 4.0),
    }
    kind = r.choice(list(kinds))
    body, expected, pause = kinds[kind]
    status = "closed"
    try:
        reader, writer = await exchange(port, post(body), body, pause)
        line = (await asyncio.wait_for(reader.readline(), 30)).decode()
        status = line.split(" ")[1] if " " in line else "closed"
        writer.close()
    except (ConnectionError, TimeoutError) as error:
        status = "closed" if isinstance(error, ConnectionError) else "timeout"
    seen.refused[f"{kind}: {status}"] = seen.refused.get(f"{kind}: {status}", 0) + 1
    if status not in (expected, "closed"):
        seen.unexpected.append(f"{kind}: {status}")


async def send_polite(port: int, name: str, one: Query, leave_after: int | None, seen: Tally) -> None:
    """A whole streamed answer, compared; or the beginning of one."""
    body = json.dumps({"model": name, "stream": True, "logprobs": 0, **one.body}).encode()
    begin = time.perf_counter()
    reader, writer = await exchange(port, post(body), body)
    texts: list[str] = []
    last, finished, count = begin, False, 0
    try:
        while line := await asyncio.wait_for(reader.readline(), 120):
            if not line.startswith(b"data: "):
                if line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                    seen.unexpected.append(line.decode().strip())
                    return
                continue
            now = time.perf_counter()
            if line.startswith(b"data: [DONE]"):
                finished = True
                break
            chunk = json.loads(line[6:])
            if "error" in chunk:
                seen.unexpected.append(chunk["error"]["message"])
                return
            listed = chunk["choices"][0]["logprobs"]["tokens"]
            if listed:
                (seen.next if texts else seen.first).append(now - last)
                last = now
                texts += listed
            count += 1
            if leave_after is not None and count >= leave_after:
                seen.left += 1
                return
    finally:
        writer.close()
    if not finished:
        seen.unexpected.append("a stream ended early")
        return
    seen.whole += 1
    seen.tokens += len(texts)
    if texts != SPELLED[one.request.seed]:
        seen.wrong.append((one, []))


SPELLED: dict[int, list[str]] = {}
"""By a request's seed: its tokens as the server spells them."""


async def run_client(number: int, port: int, name: str, pool: list[Query], end: float, seen: Tally) -> None:
    """One request after another until `end`: one in ten rude, a third of the rest left in the middle."""
    r = random.Random(number)
    while time.monotonic() < end:
        if r.random() < 0.1:
            await send_rude(port, name, seen, r)
            continue
        one = r.choice(pool)
        leave = r.randint(1, len(one.tokens)) if r.random() < 1 / 3 else None
        await send_polite(port, name, one, leave, seen)


def resident_megabytes(pid: int) -> float:
    """MB of memory that a process has."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


async def read_metrics(port: int) -> dict[str, float]:
    """The numbers of /metrics, by name."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode().partition("\r\n\r\n")[2]
    writer.close()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[:4] == "lrt_"}


async def run_load(port: int, pid: int, name: str, pool: list[Query], clients: int, seconds: float) -> dict[str, Any]:
    """All clients for so long; then whether the server is as it was."""
    seen, memory, end = Tally(), [], time.monotonic() + seconds

    async def watch() -> None:
        while True:
            memory.append(resident_megabytes(pid))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(run_client(i, port, name, pool, end, seen) for i in range(clients)))
    watching.cancel()
    await asyncio.sleep(2)
    numbers = await read_metrics(port)
    label, worker = f'{{model="{name}"}}', f'{{model="{name}",worker="0"}}'
    half = min(len(memory) // 2, 60)
    return {
        "seen": seen,
        "rows_in_use": numbers[f"lrt_rows_in_use{worker}"],
        "queue": numbers[f"lrt_queue{worker}"],
        "failures": numbers.get(f"lrt_engine_failures_total{label}", 0.0),
        "memory": memory,
        "after_first_minute": memory[half:],
    }


def smallest_margin(model: LatentRecurrentTransformer, one: Query) -> float:
    """The smallest distance, over the answer's tokens, at which another token would have been drawn."""
    import torch

    row = torch.tensor([[*one.request.tokens, *one.tokens[:-1]]])
    begin, margins = len(one.request.tokens) - 1, []
    with torch.no_grad():
        hidden = refine(model, row, sequential()).hidden[0, begin:]
        for i, logits in enumerate(model.logits(hidden)):
            if one.request.sampling.temperature == 0:
                best = logits.topk(2).values
                margins.append(float(best[0] - best[1]))
                continue
            sums = one.request.sampling.probabilities(logits.unsqueeze(0)).double().cumsum(-1)[0]
            number = uniform(one.request.seed, len(one.request.tokens) + i)  # what the draw compares the sums with
            margins.append(float((sums - number).abs().min()))
    return min(margins)


def quantile_ms(values: list[float], q: float) -> float:
    """A quantile of seconds, in milliseconds."""
    return round(1000 * statistics.quantiles(values, n=100)[round(q * 100) - 1], 1)


def serve_under_load(
    folder: Path, pool: list[Query], clients: int, seconds: float, rows: int
) -> tuple[dict[str, Any], int, str]:
    """(What the load came to, the server's exit status after SIGTERM, its standard error)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = [sys.executable, "-m", "lrt", "serve", str(folder), "--names", "loaded"]
    limits = ["--limits.body-seconds", "3", "--limits.queue", "256"]
    command = [*serve, "--port", str(port), "--rows", str(rows), "--device", "cpu", *limits]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until_listening(port)
            outcome = asyncio.run(run_load(port, process.pid, "loaded", pool, clients, seconds))
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    return outcome, process.returncode, errors


def wait_until_listening(port: int) -> None:
    """At most a minute; who asks later finds out."""
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.2)


def main(
    checkpoint_folder: tyro.conf.Positional[Path],
    clients: int = 64,
    seconds: float = 120.0,
    rows: int = 64,
    pool: int = 40,
    longest: int = 64,
) -> None:
    """Run the load, and end with 1 where anything does not hold."""
    folder = checkpoint.verify(checkpoint_folder)
    model, tokenizer = checkpoint.load(folder)
    requests = make_queries(model, tokenizer.bos, folder, pool, longest)
    from lrt.serve.detokenizer import display_token

    for one in requests:
        shown = [t for t in one.tokens if t != tokenizer.bos]
        SPELLED[one.request.seed] = [display_token(tokenizer.spelling(t)) for t in shown]
    outcome, status, errors = serve_under_load(checkpoint_folder, requests, clients, seconds, rows)
    seen: Tally = outcome["seen"]
    near = [smallest_margin(model, one) for one, _ in seen.wrong]
    after = outcome["after_first_minute"]
    quarter = max(1, len(after) // 4)
    growth = statistics.median(after[-quarter:]) / statistics.median(after[:quarter]) - 1
    holds = {
        "no wrong token": all(m < MARGIN for m in near),
        "nothing unexpected": not seen.unexpected,
        "no stuck row": outcome["rows_in_use"] == outcome["queue"] == outcome["failures"] == 0,
        "memory flat": growth < 0.02,
        "ended by SIGTERM": status in (0, -signal.SIGTERM) and "Traceback" not in errors,
    }
    print(
        json.dumps(
            {
                "clients": clients, "seconds": seconds, "rows": rows, "answers": seen.whole, "left": seen.left,
                "refused": dict(sorted(seen.refused.items())), "tokens_compared": seen.tokens,
                "differing_below_margin": len(near), "margins": near, "unexpected": seen.unexpected[:10],
                "first_token_ms": {"p50": quantile_ms(seen.first, 0.5), "p99": quantile_ms(seen.first, 0.99)},
                "next_token_ms": {"p50": quantile_ms(seen.next, 0.5), "p99": quantile_ms(seen.next, 0.99)},
                "tokens_per_second": round((len(seen.first) + len(seen.next)) / seconds, 1),
                "rss_mb": {"start": round(outcome["memory"][0]), "after_first_minute": round(after[0]),
                           "end": round(after[-1]), "growth": round(growth, 4)},
                "holds": holds, "hardware": hardware("cpu"),
            }
        )
    )  # fmt: skip
    if not all(holds.values()):
        print(errors[-3000:], file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    tyro.cli(main)
