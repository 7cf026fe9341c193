"""One promise: schemathesis finds nothing in what the OpenAPI document says of the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import CHATML, Live, live, saved

from lrt.serve.limits import Limits


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = saved(tmp_path_factory.mktemp("models") / "lrt", *CHATML)
    with live(folder, limits=Limits(request_seconds=20)) as running:
        yield running
        assert running.idle()


@pytest.fixture(scope="module")
def document(up: Live) -> Any:
    return schemathesis.openapi.from_url(f"{up.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("document")


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Most requests name the model that is there, else every one of them is a 404."""
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("model"), str) and body["model"] and len(body["model"]) <= 200:
        body["model"] = "lrt"


@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_nothing_is_found(case: Any, up: Live):
    # A body that fits the document may still ask for too much (tokens, choices): a 400 that no schema can foretell.
    case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=60)


def test_the_document_says_what_is_refused(up: Live, document: Any):
    paths = document.raw_schema["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/healthz", "/metrics", "/"} <= set(paths)
    for operation in (op for methods in paths.values() for op in methods.values()):
        assert "422" not in operation["responses"]
        assert "400" in operation["responses"]
    assert Path  # the document names no file
    assert "file" not in document.raw_schema["components"]["schemas"]["CompletionBody"]["properties"]
