"""One promise: no request harms the server or its neighbours. Refusals, disconnects, shutdown, secrets."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tyro
from pydantic import ValidationError
from support.server import EXACT, Live, live, saved

from lrt.cli.main import main
from lrt.cli.serve import Serve
from lrt.serve.config import Limits, Settings
from lrt.serve.detokenizer import Detokenizer, overlap
from lrt.serve.models import model_names
from lrt.serve.page_files import addresses
from lrt.serve.protocol import CompletionBody
from lrt.serve.server import AcceptErrors

TIGHT = Limits(
    body_bytes=20_000, body_seconds=0.7, prompt_tokens=100, new_tokens=200, choices=4, queue=2, connections=40
)
SECRET, OTHER_SECRET = "0123456789abcdef0123", "fedcba9876543210fedc"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "lrt", context=2000)


@pytest.fixture(scope="module")
def tight(folder: Path) -> Iterator[Live]:
    with live(folder, settings=Settings(rows=2, prefill="exact"), limits=TIGHT) as running:
        yield running
        assert running.idle()


def exchange(url: str, data: bytes, then: bytes = b"", pause: float = 0.0) -> bytes:
    """Bytes sent, bytes that come back until the server closes."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 20) as link:
        try:
            link.sendall(data)
            if then:
                time.sleep(pause)
                link.sendall(then)
        except OSError:
            pass
        parts = []
        try:
            while part := link.recv(65536):
                parts.append(part)
        except OSError:
            pass
    return b"".join(parts)


def post(body: bytes, length: int | None = None, more: str = "") -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def error_of(answer: bytes) -> dict[str, Any]:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_bodies_that_are_large_slow_or_nonsense(tight: Live):
    large = exchange(tight.url, post(b"x" * 30_000))
    assert large.startswith(b"HTTP/1.1 413 ")
    assert error_of(large)["message"] == "the body is larger than 20,000 bytes; send less"
    endless = exchange(tight.url, post(b"", 10**30))
    assert endless.startswith(b"HTTP/1.1 413 ") or endless.startswith(b"HTTP/1.1 400 ")
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert exchange(tight.url, chunked + (b"1000\r\n" + b"x" * 4096 + b"\r\n") * 8).startswith(b"HTTP/1.1 413 ")
    slow = exchange(tight.url, post(b"{", 100), b"}", 1.2)
    assert slow.startswith(b"HTTP/1.1 408 ")
    begin = time.monotonic()
    assert exchange(tight.url, b"POST /v1/comp") == b""  # the head never comes
    assert time.monotonic() - begin < 10
    for body in (b"{", b"[]", b"\xff\xfe", b"[" * 5000, b'{"model": NaN}', b'{"a":' + b"9" * 5000 + b"}",
                 b'{"model": "lrt", "prompt": "\\ud800"}', b'{"\\ud800": 1}', b"null"):  # fmt: skip
        answer = exchange(tight.url, post(body, more="Connection: close\r\n"))
        assert answer.startswith(b"HTTP/1.1 400 "), (body[:50], answer)
        assert error_of(answer)["type"] == "invalid_request_error"


def test_limits_of_a_request(tight: Live):
    for fields, message in (
        ({"prompt": "a b c d " * 80}, "this server takes 100; shorten it"),
        ({"max_tokens": 201}, "this server gives 200 at most"),
        ({"n": 5}, "5 continuations are asked for, this server gives 4 at once"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            tight.client().completions.create(**{"model": "lrt", "prompt": "x", **fields})  # pyright: ignore


def test_a_full_queue_says_when_to_come_back(tight: Live):
    streams = [
        tight.client().completions.create(model="lrt", prompt="x", max_tokens=200, n=4, seed=1, stream=True)
        for _ in range(1)
    ]
    with pytest.raises(openai.RateLimitError, match="exceed the 2 rows and 2 places in the queue") as caught:
        tight.client().completions.create(model="lrt", prompt="x", n=1)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    for stream in streams:
        stream.close()
    assert tight.idle()
    assert tight.client().completions.create(model="lrt", prompt="x").choices[0].text != ""


@pytest.mark.parametrize("streamed", [True, False])
def test_who_goes_away_frees_its_rows_at_once(folder: Path, streamed: bool):
    with live(folder, settings=EXACT) as up:
        engine = up.registry.find("lrt").workers[0].engine
        # The bias lets no sample end early.
        fields = {"model": "lrt", "prompt": "x", "max_tokens": 1900, "n": 3, "logit_bias": {"5": 100}}
        body = json.dumps({**fields, "stream": streamed}).encode()
        host, port = up.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 20) as link:
            link.sendall(post(body))
            patience = time.monotonic() + 60
            while engine.engine.rows.used < 3:
                assert time.monotonic() < patience
                time.sleep(0.01)
        begin = time.monotonic()
        assert up.idle(5)
        assert time.monotonic() - begin < 1.0


def test_answers_have_a_time_limit(folder: Path):
    with live(folder, limits=Limits(request_seconds=0.5, queue_seconds=0.3), settings=Settings(rows=1)) as up:
        body: dict[str, Any] = {"model": "lrt", "prompt": "x", "max_tokens": 1900, "logit_bias": {"5": 100}}
        with pytest.raises(openai.InternalServerError, match=r"longer than 0\.5 seconds; ask for fewer") as caught:
            up.client().completions.create(**body)
        assert caught.value.status_code == 504
        stream = up.client().completions.create(**body, stream=True)
        with pytest.raises(openai.APIError, match="longer than"):
            for _ in stream:
                pass
        assert up.idle()


def test_waiting_for_a_row_has_a_time_limit(folder: Path):
    with live(folder, limits=Limits(queue_seconds=0.2), settings=Settings(rows=1, prefill="exact")) as up:
        body: dict[str, Any] = {"model": "lrt", "prompt": "x", "max_tokens": 1900, "logit_bias": {"5": 100}}
        busy = up.client().completions.create(**body, stream=True)
        next(iter(busy))
        for streamed in (False, True):
            with pytest.raises(openai.InternalServerError, match=r"no row was free within 0\.2 seconds") as caught:
                up.client().completions.create(**body, stream=streamed)
            assert caught.value.status_code == 503
        busy.close()
        assert up.idle()


def test_the_token_is_asked_for(folder: Path):
    with live(folder, tokens=[SECRET, OTHER_SECRET]) as up:
        for key in ("wrong", SECRET[:-1], SECRET + "x", f"{SECRET} {OTHER_SECRET}", "ü"):
            status = httpx.get(f"{up.url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()}).status_code
            assert status == 401
        with pytest.raises(openai.AuthenticationError, match="the token is missing or wrong"):
            up.client("wrong").models.list()
        assert httpx.get(f"{up.url}/metrics").status_code == 401
        assert httpx.get(f"{up.url}/openapi.json").status_code == 401
        assert httpx.get(f"{up.url}/healthz").status_code == httpx.get(up.url).status_code == 200
        assert httpx.head(f"{up.url}/healthz").status_code == httpx.head(up.url).status_code == 200  # load balancers'
        for key in (SECRET, OTHER_SECRET):
            assert [m.id for m in up.client(key).models.list()] == ["lrt"]


def test_other_peoples_pages_cannot_reach_a_private_server(folder: Path):
    with live(folder, hosts=("127.0.0.1", "localhost", "::1")) as up:
        assert httpx.get(f"{up.url}/v1/models", headers={"Host": "evil.example:80"}).status_code == 403
        for host in ("[::1]:80", "[::1]", "localhost", "LOCALHOST:1", "127.0.0.1"):
            assert httpx.get(f"{up.url}/v1/models", headers={"Host": host}).status_code == 200, host
        for host in ("::1", "[::1]evil.example", "[::2]", "evil.example", "localhost.evil.example:80", ":80"):
            assert httpx.get(f"{up.url}/v1/models", headers={"Host": host}).status_code in (400, 403), host
        assert httpx.get(f"{up.url}/v1/models").status_code == 200
        form = httpx.post(
            f"{up.url}/v1/completions", content=b'{"model":"lrt"}', headers={"Content-Type": "text/plain"}
        )
        assert form.status_code == 400
        assert "access-control-allow-origin" not in form.headers
        policy = httpx.get(up.url).headers["content-security-policy"]
        assert "default-src 'none'" in policy


def test_a_failing_engine_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with live(folder) as up:
        engine = up.registry.find("lrt").workers[0].engine

        def broken() -> Any:
            raise RuntimeError("/secret/path")

        stream = up.client().completions.create(
            model="lrt", prompt="x", max_tokens=1900, stream=True, logit_bias={"5": 100}
        )
        next(iter(stream))
        monkeypatch.setattr(engine.engine, "step", broken)
        monkeypatch.setattr(engine.engine, "cancel", broken)  # nothing of it works any more
        with pytest.raises(openai.APIError, match="the server failed to answer") as caught:
            for _ in stream:
                pass
        assert "secret" not in str(caught.value)
        assert up.idle()
        assert up.client().completions.create(model="lrt", prompt="x").choices[0].text
        assert httpx.get(f"{up.url}/healthz").json() == {"status": "ok", "models": {"lrt": "ok"}}
        text = httpx.get(f"{up.url}/metrics").text
        assert 'lrt_engine_failures_total{model="lrt"} 1.0' in text
        families = ("lrt_rows{", "lrt_rows_in_use{", "lrt_queue{", "lrt_tokens_per_second{", "lrt_http_requests_total{")
        timed = ("lrt_first_token_seconds_bucket", "lrt_next_token_seconds_bucket", "process_resident_memory_bytes")
        for name in (*families, *timed):
            assert name in text, name


LONG = "the end of it all, " * 30
"""A prompt long enough to be swept."""


def counts(up: Live) -> dict[str, float]:
    """What /metrics counts of models; not how long anything took, which a client sees by its own clock."""
    lines = httpx.get(f"{up.url}/metrics").text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if 'model="lrt"' in line]
    timed = ("_seconds_bucket", "_seconds_sum", "_created", "per_second")
    return {name: float(number) for name, number in pairs if not any(part in name for part in timed)}


@pytest.mark.parametrize("prefill", ["exact", "converged", "one_sweep"])
def test_nobody_is_told_what_was_known_of_a_prompt(folder: Path, monkeypatch: pytest.MonkeyPatch, prefill: str):
    """The same request again: nearly all of its prompt is in a kept row, and nothing but time shows it."""
    form = {"model": "lrt", "prompt": LONG, "max_tokens": 2, "temperature": 0, "prefill": prefill}
    with live(folder, settings=Settings(rows=2, prefixes=10**8)) as up:
        engine, reused, growth, events = up.registry.find("lrt").workers[0].engine, [], [], []
        finish = engine.engine._finish
        monkeypatch.setattr(engine.engine, "_finish", lambda job, why: reused.append(job.reused) or finish(job, why))
        for _ in range(2):
            before = counts(up)
            answer = httpx.post(f"{up.url}/playground/generate", json=form, timeout=60).text
            assert up.idle()
            growth.append({name: number - before.get(name, 0) for name, number in counts(up).items()})
            events.append([line for line in answer.splitlines() if '"type":"prefill"' in line])
        assert reused[0] == 0
        assert reused[1] > 100
        assert events == [[], []]
        assert growth[0] == growth[1]


def test_without_kept_rows_the_page_says_how_a_prompt_was_computed(folder: Path):
    form = {"model": "lrt", "prompt": LONG, "max_tokens": 1, "prefill": "one_sweep"}
    with live(folder) as up:
        answer = httpx.post(f"{up.url}/playground/generate", json=form, timeout=60).text
        assert '"type":"prefill","path":"single"' in answer
        assert counts(up)['lrt_prefill_sweeps_count{model="lrt"}'] == 1
        assert counts(up)['lrt_step_seconds_count{model="lrt"}'] > 0


def start(folder: Path, *more: str) -> tuple[subprocess.Popen[str], str]:
    """`lrt serve` as a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lrt", "serve", str(folder), "--port", str(port), "--device", "cpu", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            httpx.get(f"{url}/healthz")
            return process, url
        except httpx.TransportError:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
    raise TimeoutError


def end(process: subprocess.Popen[str]) -> str:
    """End a server in its orderly way: all that it has said."""
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=30)[0]


def test_sigterm_lets_streams_end_and_tells_the_rest(folder: Path):
    process, url = start(folder, "--limits.grace-seconds", "1.5")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
    try:
        body: dict[str, Any] = {"model": "lrt", "prompt": "x", "stream": True, "logit_bias": {"5": 100}}
        streams = {n: client.completions.create(max_tokens=n, **body) for n in (20, 1900)}
        endless = client.completions.create(max_tokens=1900, n=16, **body)  # so that 1.5 seconds are not enough
        for stream in (*streams.values(), endless):
            next(iter(stream))
        process.send_signal(signal.SIGTERM)
        short = [chunk.choices[0].finish_reason for chunk in streams[20]]
        assert short[-1] == "length"
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            for _ in endless:
                pass
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in output


def test_addresses_that_others_reach_need_a_token(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    short, same = tmp_path / "short", tmp_path / "other" / "lrt"
    short.write_text("hush\n")
    bare = tmp_path / "bare"
    bare.mkdir()
    for arguments, message in (
        ((str(folder), "--host", "0.0.0.0"), "0.0.0.0 can be reached from other machines; give --token-file FILE"),
        ((str(folder), "--token-file", str(short)), "is no token; give at least 16"),
        ((str(folder), "--api-key", SECRET, "hush"), "--api-key is no token; give at least 16 ASCII characters"),
        ((str(folder), "--api-key", SECRET + "ü"), "--api-key is no token"),
        ((str(folder), str(same)), "two checkpoints are called lrt; tell them apart with --names"),
        ((str(folder), "--rows", "0"), "rows is 0; it must be at least 1"),
        ((str(folder), "--limits.queue", "-1"), "limits.queue is -1; it must be at least 0"),
        ((str(folder), "--template", "chatml"), "template 'chatml' needs the special tokens"),
        ((str(tmp_path / "nowhere"),), "is not a checkpoint"),
        ((), "no checkpoint is given; name at least one folder of `lrt train`, or --models-dir"),
        (("--models-dir", str(tmp_path / "nowhere")), "nowhere is no folder; give one of checkpoints"),
        ((str(folder), "--models-dir", str(folder)), "is a checkpoint itself; give the folder that it lies in"),
        (("--models-dir", str(bare)), "holds no checkpoint that can be served; give a folder whose folders are"),
        ((str(folder), "--adapter", str(folder), "--models-dir", str(folder.parent)), "--models-dir has others"),
        ((str(folder), "--devices", "cpu", "cpu"), "--device cpu and --devices exclude each other"),
        ((str(folder), "--devices", "cpu", "no-such", "--device", "auto"), "device 'no-such' cannot be used here"),
        (
            (str(folder), "--allowed-origins", "chat.example"),
            "chat.example is no origin of pages; give scheme and host",
        ),
        (
            (str(folder), "--allowed-origins", "https://a.example", "http://b.example/x"),
            "http://b.example/x is no origin",
        ),
    ):
        with pytest.raises(SystemExit):
            main(["serve", "--device", "cpu", *arguments])
        shown = " ".join(word for word in capsys.readouterr().err.split() if word not in "│|")
        assert message in shown


def test_keys_of_the_command_line_and_of_the_file_all_serve(tmp_path: Path):
    (tmp_path / "token").write_text(SECRET + "\n")
    keys = tyro.cli(Serve, args=["run", "--token-file", str(tmp_path / "token"), "--api-key", OTHER_SECRET, "k" * 16])
    assert keys.read_tokens() == [OTHER_SECRET, "k" * 16, SECRET]
    assert Serve((Path("run"),)).read_tokens() == []


def test_only_files_of_the_page_have_addresses(tmp_path: Path):
    for name in ("index.html", "page.js", "style.css", ".DS_Store", "page.js.swp", "notes", ".css"):
        (tmp_path / name).write_text("")
    assert set(addresses(tmp_path)) == {"/", "/page/page.js", "/page/style.css"}


def test_names_are_the_folders():
    assert model_names([Path("runs/mine"), Path("runs/a b/checkpoint")]) == ["mine", "a-b"]
    assert model_names([Path("x"), Path("x")], ["one", "two"]) == ["one", "two"]


class Letters:
    """A tokenizer's stream whose tokens are characters."""

    def push(self, token: int) -> str:
        return chr(token)

    def finish(self) -> str:
        return ""


@pytest.mark.parametrize("stops", [(), ("abc",), ("aab", "b"), ("aaaa",), ("ba", "abab", "c")])
def test_a_detokenizer_shows_what_is_before_the_first_stop(stops: tuple[str, ...]):
    for number in range(3**7):
        text = "".join("abc"[number // 3**i % 3] for i in range(7))
        detokenizer, shown, stopped = Detokenizer(Letters(), stops), "", False
        for letter in text:
            delta = detokenizer.push(ord(letter), None)
            shown += delta.text
            if delta.stopped:
                stopped = True
                break
        if not stopped:
            shown += detokenizer.finish().text
        # The reference: the shortest beginning of the text that ends with a stop decides.
        ends = [n for n in range(1, 8) if any(text[:n].endswith(s) for s in stops)]
        whole = text[: ends[0]] if ends else text
        cut = min((whole.find(s) for s in stops if s in whole), default=len(whole))
        assert shown == whole[:cut]
    assert overlap("xab", "abc") == 2


@pytest.mark.parametrize("fields", [{"temperature": 1e-40}, {"temperature": 1e-300}, {"top_p": 1e-320}])
def test_the_coldest_draws_take_the_likeliest_token(tight: Live, fields: dict[str, Any]):
    body: dict[str, Any] = {"model": "lrt", "prompt": "hello", "max_tokens": 8, "seed": 0}
    client = tight.client()
    likeliest = client.completions.create(**body, temperature=0).choices[0].text
    assert client.completions.create(**(body | fields)).choices[0].text == likeliest
    assert "lrt_engine_failures_total{" not in tight.registry.metrics.text().decode()  # nobody else was ended


def test_too_many_prompts_are_refused_before_they_are_tokenized(tight: Live, monkeypatch: pytest.MonkeyPatch):
    model = tight.registry.find("lrt")
    texts: list[str] = []
    for name in ("encode", "encode_batch"):
        encode = getattr(model.tokenizer, name)
        monkeypatch.setattr(model.tokenizer, name, lambda text, encode=encode: texts.append(text) or encode(text))
    with pytest.raises(openai.BadRequestError, match="1000 continuations are asked for"):
        tight.client().completions.create(model="lrt", prompt=["a"] * 1000)
    assert texts == []


def test_of_many_wrong_prompts_the_first_is_enough():
    with pytest.raises(ValidationError) as caught:
        CompletionBody.model_validate({"model": "lrt", "prompt": [["a"]] * 1000})
    assert caught.value.error_count() < 10


def test_the_head_of_a_second_request_has_its_time_too(tight: Live):
    whole = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    begin = time.monotonic()
    answer = exchange(tight.url, whole, b"POST /v1/comp", 0.3)
    assert answer.count(b"HTTP/1.1") == 1
    assert time.monotonic() - begin < 10


def test_a_port_in_use_is_said_with_the_way_out(folder: Path, capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit):
            main(["serve", str(folder), "--port", str(port), "--device", "cpu"])
    assert f"cannot listen on 127.0.0.1 port {port}; choose another with --port" in capsys.readouterr().err


def test_a_socket_that_was_closed_is_not_listened_on_again(caplog: pytest.LogCaptureFixture):
    """asyncio tries again a second after no connection could be accepted; the server may have ended by then."""

    def try_again(handler: Any) -> int:
        async def retry() -> None:
            loop, listener = asyncio.get_running_loop(), socket.socket()
            listener.close()
            loop.set_exception_handler(handler)
            loop.call_soon(loop._start_serving, asyncio.Protocol, listener)  # pyright: ignore
            await asyncio.sleep(0.01)

        caplog.clear()
        asyncio.run(retry())
        return len(caplog.records)

    assert (try_again(None), try_again(AcceptErrors())) == (1, 0)
