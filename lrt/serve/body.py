"""From a body's bytes to a validated one, so that no body stops the event loop for long.

Whatever grows with a body is bounded before it is done, and what is left of a large one is done in a thread. A C
function holds the interpreter in a thread too, so the bounds are on what each of them is given. Measured in
docs/log.md: a megabyte of text is read in 2 ms, a megabyte of empty lists took 1,200.
"""

from __future__ import annotations

import asyncio
import email.message
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import pydantic_core
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from lrt.serve.config import Limits
from lrt.serve.errors import ApiError, not_json_error, validation_error

LARGE = 4096
"""Bytes of a body, or characters of a text, from which work on it is done in a thread."""
MEMBERS = 1024
"""Members of one JSON object, as many as `logit_bias` may have. A wrong body gives no more errors than that."""
T = TypeVar("T")


async def off_loop(size: int, function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments): at once where what it works on is small, else in a thread beside the event loop."""
    return function(*arguments) if size < LARGE else await asyncio.to_thread(function, *arguments)


def parse_body(raw: bytes, model: type[BaseModel], limits: Limits) -> BaseModel:
    """A body as a model. ApiError 413 or 400 where it is too much, or wrong; what it says is bounded."""
    count = count_values(raw, limits.body_values)
    if count > limits.body_values:
        raise ApiError(413, f"the body holds more than {limits.body_values:,} JSON values; send fewer, or text")
    try:
        # Unlike json.loads it takes a long number in linear time, and no halves of characters.
        data = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        if "hex escape" in str(error):
            raise ApiError(
                400, "the body holds half a character (a lone surrogate), or another escape that is none"
            ) from None
        raise not_json_error() from None
    longest = largest_object(data)
    if longest > MEMBERS:
        raise ApiError(400, f"an object in the body has {longest:,} members, {MEMBERS:,} are taken; leave some out")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False)) from None


def count_values(raw: bytes, limit: int) -> int:
    """How many values and names JSON text holds: an upper bound, found before any of them is made.

    Some number above `limit` where there are more; counted with functions that take 5 ms per megabyte at most.
    """
    text = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    strings = text.count(b'"') // 2
    if strings > limit:
        return strings
    outside = b"".join(text.split(b'"')[::2])
    return strings + outside.count(b",") + outside.count(b"[") + outside.count(b"{")


def largest_object(data: Any) -> int:
    """The members of the largest object anywhere in parsed JSON."""
    largest, containers = 0, [data]
    while containers:
        container = containers.pop()
        if isinstance(container, dict):
            largest, container = max(largest, len(container)), container.values()
        if not isinstance(container, str | int | float | None):
            containers += [inner for inner in container if isinstance(inner, dict | list)]
    return largest


class ValidatedRequest(Request):
    """A request whose body is read already: FastAPI takes the model for its JSON, and validates an instance at once."""

    def __init__(self, request: Request, raw: bytes, validated: BaseModel) -> None:
        super().__init__(request.scope, request.receive)
        self.raw, self.validated = raw, validated

    async def body(self) -> bytes:
        return self.raw

    async def json(self) -> Any:
        return self.validated


def body_route(limits: Limits) -> type[APIRoute]:
    """A route whose body, if it takes one, is parsed by `parse_body`; `body_size` tells how large it was."""

    class BodyRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle: Callable[[Request], Awaitable[Response]] = super().get_route_handler()
            field = self.body_field
            if field is None:
                return handle  # pyright: ignore[reportReturnType]
            model: type[BaseModel] = field.field_info.annotation  # pyright: ignore[reportAssignmentType]

            async def handle_body(request: Request) -> Response:
                if not is_json(request.headers.get("content-type", "")):
                    raise not_json_error()
                raw = await request.body()
                request.state.body_size = len(raw)
                body = await off_loop(len(raw), parse_body, raw, model, limits)
                return await handle(ValidatedRequest(request, raw, body))

            return handle_body

    return BodyRoute


def body_size(request: Request) -> int:
    """Bytes of a request's body: what `off_loop` wants to know."""
    return request.state.body_size


def is_json(content_type: str) -> bool:
    """Whether a body of this type is read: pages elsewhere can send forms and plain text, and JSON only if asked."""
    message = email.message.Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))
