"""One promise: schemathesis finds nothing in what the OpenAPI document says of the server."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.server import CHATML, Live, live, saved

from lrt.serve.config import Limits

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = saved(tmp_path_factory.mktemp("models") / "lrt", *CHATML)
    with live(folder, limits=Limits(request_seconds=20)) as running:
        yield running
        assert running.idle()


def run(up: Live, examples: int, folder: Path) -> None:
    """`schemathesis run`, all checks but one: a body that fits the document may ask for too many tokens, a 400 that no
    schema can foretell."""
    command = [
        str(Path(sysconfig.get_path("scripts")) / "schemathesis"), "run", f"{up.url}/openapi.json",
        "--max-examples", str(examples), "--checks", "all", "--exclude-checks", "positive_data_acceptance",
        "--generation-deterministic", "--request-timeout", "60", "--no-color",
    ]  # fmt: skip
    hooks = {"SCHEMATHESIS_HOOKS": "support.schemathesis_hooks", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, **hooks}, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Tested: 14" in done.stdout, done.stdout[-3000:]


def test_nothing_is_found(up: Live, tmp_path: Path):
    run(up, 4, tmp_path)
    engine = up.registry.find("lrt").workers[0].engine
    assert not engine.failed


@pytest.mark.slow
def test_nothing_is_found_with_many_examples(up: Live, tmp_path: Path):
    run(up, 40, tmp_path)


def test_the_document_says_what_is_refused(up: Live):
    document = httpx.get(f"{up.url}/openapi.json").json()
    paths = document["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/healthz", "/metrics", "/"} <= set(paths)
    for operation in (op for methods in paths.values() for op in methods.values()):
        assert "422" not in operation["responses"]
        assert "400" in operation["responses"]
    assert "tools" in document["components"]["schemas"]["ChatBody"]["properties"]
