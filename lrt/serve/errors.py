"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}.

Messages name what was asked for, its limit and the way out; never a path, a stack or a value of the server's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lrt.serve.protocol import UNSUPPORTED

RETRY = {"Retry-After": "2"}
"""Seconds, which OpenAI's clients obey."""


class ApiError(Exception):
    """An answer that is no success. `type`, `param` and `code` are OpenAI's terms."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.error = {"message": message, "type": type, "param": param, "code": code}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def busy_error(message: str) -> ApiError:
    """429, too many at once: clients wait and try again."""
    return ApiError(429, message, "rate_limit_error", code="rate_limit_exceeded", headers=RETRY)


def unavailable_error(message: str, code: str) -> ApiError:
    """503: clients wait and try again."""
    return ApiError(503, message, "server_error", code=code, headers=RETRY)


def shutdown_error() -> ApiError:
    return unavailable_error("the server is shutting down; try again later", "shutting_down")


def timeout_error(seconds: float) -> ApiError:
    return ApiError(504, f"the answer took longer than {seconds:g} seconds; ask for fewer tokens", "server_error",
                    code="timeout")  # fmt: skip


def grammar_error() -> ApiError:
    return ApiError(400, "the shape that is asked for became too large to follow; ask for a simpler one")


def internal_error() -> ApiError:
    return ApiError(500, "the server failed to answer this request; its log says more", "server_error", code="internal")


def not_json_error() -> ApiError:
    return ApiError(400, "the body is no JSON object; send one, with Content-Type: application/json")


class ClientDisconnected(ApiError):
    """The client has gone away. 499 is nginx's code for it, as HTTP has none; nobody receives it."""

    def __init__(self) -> None:
        super().__init__(499, "the client has gone away")


def install_handlers(app: FastAPI) -> None:
    """Every error of an app takes this shape."""

    @app.exception_handler(ApiError)
    async def handle_api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return validation_error(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def handle_http_exception(request: Request, error: HTTPException) -> JSONResponse:
        messages = {404: "there is nothing at this address", 405: "this address does not take that method"}
        message = messages.get(error.status_code, "the request cannot be read; send a JSON object")
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def handle_exception(request: Request, error: Exception) -> JSONResponse:
        return internal_error().response()


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 for pydantic's errors (`loc`, `type`, `msg`), about the first parameter among them.

    What a message quotes of the request is cut, and made ASCII: a lone surrogate could not be sent back.
    """
    first = errors[0]
    place = [p for p in first["loc"] if p != "body"]
    if first["type"] == "value_error":
        return ApiError(400, str(first["msg"]).removeprefix("Value error, "))
    if not place or first["type"] == "json_invalid":
        return not_json_error()
    param = str(place[0])
    if param in UNSUPPORTED and first["type"] != "extra_forbidden":
        return ApiError(400, f"{param} is not supported here: {UNSUPPORTED[param]}", param=param, code="unsupported")
    if first["type"] == "extra_forbidden" and len(place) == 1:
        message = f"unknown parameter {param[:64]!r}; leave it out"
        return ApiError(400, message.encode("ascii", "replace").decode(), param=None, code="unknown_parameter")
    # A union of types gives an error for each of them; three say enough.
    same = [error for error in errors if param in map(str, error["loc"])]
    reasons = list(dict.fromkeys(str(error["msg"])[:200] for error in same))[:3]
    message = f"{param}: {'; or '.join(reasons)}".encode("ascii", "replace").decode()
    return ApiError(400, message, param=param if param.isidentifier() else None)
