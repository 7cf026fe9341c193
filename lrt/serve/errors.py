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
from lrt.serve.wording import describe

RETRY = {"Retry-After": "2"}
"""Seconds, which OpenAI's clients obey."""


CHAT_INSTEAD = "use /v1/chat/completions, with the whole conversation in each request"
TEXT_ONLY = "a model here reads and writes text only; use /v1/completions or /v1/chat/completions"
NOTHING_KEPT = "this server keeps no files, jobs or conversations; send each request by itself"
NO_VECTORS = "a model here writes text and was trained to give no vectors of texts; use a model made for them"
REFUSED_ROUTES = {
    "/v1/embeddings": f"there are no embeddings: {NO_VECTORS}",
    "/embeddings": f"there are no embeddings: {NO_VECTORS}",
    "/v1/rerank": f"there is no ranking: {NO_VECTORS}",
    "/rerank": f"there is no ranking: {NO_VECTORS}",
    "/v1/score": f"there is no ranking: {NO_VECTORS}",
    "/v1/moderations": "there is no moderation; use a model made for it",
    "/v1/responses": f"there are no responses: {CHAT_INSTEAD}",
    "/v1/conversations": f"there are no conversations: {CHAT_INSTEAD}",
    "/v1/messages": f"there is no interface of Anthropic's: {CHAT_INSTEAD}",
    "/v1/assistants": f"there are no assistants: {CHAT_INSTEAD}",
    "/v1/threads": f"there are no threads: {CHAT_INSTEAD}",
    "/v1/edits": f"there are no edits: {CHAT_INSTEAD}",
    "/v1/audio": f"there is no audio: {TEXT_ONLY}",
    "/v1/images": f"there are no images: {TEXT_ONLY}",
    "/v1/videos": f"there are no videos: {TEXT_ONLY}",
    "/v1/realtime": f"there is no realtime interface: {TEXT_ONLY}",
    "/v1/files": f"there are no files: {NOTHING_KEPT}",
    "/v1/uploads": f"there are no uploads: {NOTHING_KEPT}",
    "/v1/batches": f"there are no batches: {NOTHING_KEPT}",
    "/v1/fine_tuning": f"there is no fine-tuning over HTTP: {NOTHING_KEPT}; use lrt finetune",
    "/v1/vector_stores": f"there are no vector stores: {NOTHING_KEPT}",
    "/api/chat": "there is no interface of Ollama's; use OpenAI's, at /v1",
    "/api/generate": "there is no interface of Ollama's; use OpenAI's, at /v1",
    "/api/tags": "there is no interface of Ollama's; use OpenAI's, at /v1",
}
"""Addresses that clients know from other servers -> why they are not here, and what to do."""


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


def lasting_error(message: str, code: str) -> ApiError:
    """503 that does not pass by waiting: no Retry-After."""
    return ApiError(503, message, "server_error", code=code)


def shutdown_error() -> ApiError:
    return unavailable_error("the server is shutting down; try again later", "shutting_down")


def timeout_error(seconds: float) -> ApiError:
    return ApiError(504, f"the answer took longer than {seconds:g} seconds; ask for fewer tokens", "server_error",
                    code="timeout")  # fmt: skip


def grammar_error() -> ApiError:
    return ApiError(400, "the shape that is asked for became too slow or too large to follow; ask for a simpler one")


def internal_error() -> ApiError:
    return ApiError(500, "the server failed to answer this request; its log says more", "server_error", code="internal")


def unknown_model_error(names: Sequence[str]) -> ApiError:
    message = f"there is no such model; choose one of {', '.join(names)}"
    return ApiError(404, message, param="model", code="model_not_found")


def load_error(name: str) -> ApiError:
    message = f"the checkpoint of {name} cannot be loaded; the server's log says why"
    return ApiError(500, message, "server_error", param="model", code="model_failed")


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
        if error.status_code == 404 and (reason := refused_route(request.url.path)) is not None:
            return ApiError(404, reason, code="unsupported").response()
        messages = {404: "there is nothing at this address", 405: "this address does not take that method"}
        message = messages.get(error.status_code, "the request cannot be read; send a JSON object")
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def handle_exception(request: Request, error: Exception) -> JSONResponse:
        return internal_error().response()


def refused_route(path: str) -> str | None:
    """Why an address that clients know from elsewhere is not served, and what is; None for other addresses."""
    return next((why for known, why in REFUSED_ROUTES.items() if f"{path}/".startswith(f"{known}/")), None)


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 for pydantic's errors, as `describe` takes them, about the first parameter among them.

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
    same = [error for error in errors if param in map(str, error["loc"])]
    message = describe(same).encode("ascii", "replace").decode()
    return ApiError(400, message, param=param if param.isidentifier() else None)
