"""One promise: what clients send is answered. `make clients` has recorded it from each that installs; two are from
their source (docs/clients.md)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.server import CHATML, Live, live, saved

HERE = Path(__file__).resolve().parent
RECORDINGS = sorted((HERE / "clients").glob("*.json"))
PAGE = (HERE.parents[1] / "docs" / "clients.md").read_text(encoding="utf-8")
REFUSED = {
    "/v1/chat/completions": "tools is not supported here",
    "/v1/embeddings": "there ",
    "/v1/responses": "there ",
}
"""What `openai_refused` asks for -> words of the answer's message."""


def requests() -> Iterator[Any]:
    for file in RECORDINGS:
        for number, request in enumerate(json.loads(file.read_text(encoding="utf-8"))):
            yield pytest.param(file.stem, request, id=f"{file.stem}-{number}")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(saved(tmp_path_factory.mktemp("models") / "lrt", *CHATML, context=2048)) as running:
        yield running
        assert running.idle()


@pytest.mark.parametrize(("client", "request_"), list(requests()))
def test_what_a_client_sends_is_answered(up: Live, client: str, request_: dict[str, Any]):
    body = request_.get("body")
    answer = httpx.request(request_["method"], up.url + request_["path"], json=body, timeout=120)
    if client == "openai_refused":
        assert 400 <= answer.status_code < 500
        assert REFUSED[request_["path"]] in answer.json()["error"]["message"]
        return
    assert answer.status_code == 200, answer.text
    if body is None:
        assert answer.text
    elif body.get("stream"):
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
        assert {c["index"] for chunk in chunks for c in chunk["choices"]} == set(range(body.get("n") or 1))
        assert ("usage" in chunks[-1]) == bool(body.get("stream_options", {}).get("include_usage"))
    else:
        prompts = body["prompt"] if isinstance(body.get("prompt"), list) else [0]
        texts = len(prompts) if not isinstance(prompts[0], int) else 1
        assert len(answer.json()["choices"]) == texts * (body.get("n") or 1)
        assert answer.json()["usage"]["total_tokens"] > 0


def test_there_are_recordings_and_each_client_is_on_its_page():
    assert len(RECORDINGS) > 6
    for file in RECORDINGS:
        assert f"`{file.stem}.json`" in PAGE, file.stem
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"/tmp|/home|/root|localhost|127\.0\.0\.1", text), file.stem
        assert len(text) < 40_000


def test_clients_are_installed_at_the_versions_that_were_recorded():
    folder = HERE.parent / "clients"
    lines = (folder / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if "==" in line}
    wanted = re.findall(r"^([\w-]+)", (folder / "requirements.txt").read_text(), re.MULTILINE)
    assert {name.lower() for name in wanted} <= pinned
