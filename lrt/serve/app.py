"""The application: which address does what. Everything it says of itself is at /openapi.json."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import aclosing, asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Receive, Scope, Send

from lrt.serve import request_parsing
from lrt.serve.errors import ApiError, install_handlers
from lrt.serve.middleware import OPEN, RequestGuard
from lrt.serve.models import ModelRegistry, ServedModel
from lrt.serve.playground import MemoryInspector, generate_text, parse_inspection
from lrt.serve.protocol import (
    ChatBody,
    ChatCompletion,
    CompletionBody,
    Error,
    GenerateBody,
    Health,
    InspectBody,
    Model,
    ModelList,
    TextCompletion,
)
from lrt.serve.request_parsing import GenerationTask
from lrt.serve.responses import full_response, stream_response

EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
EVENTS = {"text/event-stream": {"schema": EVENT}}
SAID = {
    400: "The request is wrong: the message says what, its limit and the fix.",
    401: "The token is missing or wrong.",
    403: "The host is not this machine.",
    404: "There is no such model.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    429: "The queue is full.",
    500: "The server failed.",
    503: "The server is shutting down, or no row was free in time.",
    504: "The answer took too long.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": said} for status, said in SAID.items()
}
PAGE = files("lrt.serve") / "page.html"


def create_app(library: ModelRegistry, token: str | None = None, hosts: Collection[str] | None = None) -> FastAPI:
    """The ASGI application over a library, whose workers it starts and stops. `token`, `hosts`: see `Gate`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        library.start()
        try:
            yield
        finally:
            bench.close()
            await library.stop()

    bench = MemoryInspector(library)
    app = FastAPI(
        title="lrt serve",
        version="1",
        description="OpenAI's completions and chat over latent recurrent transformers.",
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        responses=ERRORS,
    )
    install_handlers(app)
    about_server(app, library)
    about_text(app, library)
    about_memory(app, library, bench)
    app.openapi = document_errors(app, token is not None)  # pyright: ignore[reportAttributeAccessIssue]
    routes = list(app.openapi()["paths"])
    app.add_middleware(
        RequestGuard, limits=library.limits, metrics=library.metrics, token=token, hosts=hosts, routes=routes
    )
    return app


def about_server(app: FastAPI, library: ModelRegistry) -> None:
    """The page, health, metrics."""

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=Response, responses={200: {"content": {"text/html": {}}}})
    async def page() -> HTMLResponse:
        """The playground."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", responses={200: {"model": Health}, 503: {"model": Health}})
    async def health() -> JSONResponse:
        """200 while requests are taken."""
        states = {name: "failed" if one.worker.failed else "ok" for name, one in library.models.items()}
        good = not library.ending and "failed" not in states.values()
        return JSONResponse(
            {"status": "shutting_down" if library.ending else "ok", "models": states}, 200 if good else 503
        )

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(library.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def about_text(app: FastAPI, library: ModelRegistry) -> None:
    """OpenAI's interface."""

    @app.get("/v1/models", response_model=ModelList)
    async def models() -> ModelList:
        """What is served."""
        return ModelList(data=[Model(id=one.name, created=one.created) for one in library.models.values()])

    @app.get("/v1/models/{model}", response_model=Model)
    async def model(model: str) -> Model:
        """One of them."""
        one = library.find(model)
        return Model(id=one.name, created=one.created)

    async def answered(ask: GenerationTask, http: Request) -> Response:
        if ask.stream:
            return await event_stream(stream_response(ask, library, http))
        return JSONResponse((await full_response(ask, library, http)).model_dump())

    @app.post("/v1/completions", responses={200: {"model": TextCompletion, "content": EVENTS}})
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue a prompt, or several. With `stream`, server-sent events."""
        return await answered(await request_parsing.completion(body, library.find(body.model), library.limits), request)

    @app.post("/v1/chat/completions", responses={200: {"model": ChatCompletion, "content": EVENTS}})
    async def chat(body: ChatBody, request: Request) -> Response:
        """The next turn of a conversation. With `stream`, server-sent events."""
        return await answered(await request_parsing.chat(body, library.find(body.model), library.limits), request)


def about_memory(app: FastAPI, library: ModelRegistry, bench: MemoryInspector) -> None:
    """What the page uses."""

    @app.get("/playground/models")
    async def described() -> dict[str, Any]:
        """The models and their memory."""
        return {"models": [one.about() for one in library.models.values()], "inspect": library.limits.inspect_tokens}

    @app.post("/playground/generate", response_class=Response, responses={200: {"content": EVENTS}})
    async def generate(body: GenerateBody, request: Request) -> Response:
        """Tokens with their surprisal, as server-sent events."""
        one: ServedModel = library.find(body.model)
        ask = await parse_inspection(body, one, library)
        return await event_stream(generate_text(ask, library, request))

    @app.post("/playground/inspect")
    async def inspect(body: InspectBody, request: Request) -> dict[str, Any]:
        """What the memory did with a text."""
        return await bench.inspect(library.find(body.model), body.tokens, request)


class EventStream(Response):
    """Server-sent events from a generator, which is closed in whatever way it ends."""

    media_type = "text/event-stream"

    def __init__(self, first: str, events: AsyncIterator[str]) -> None:
        self.first, self.events = first, events
        self.status_code, self.background = 200, None
        self.init_headers({"X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events):  # pyright: ignore[reportArgumentType]
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self.first.encode(), "more_body": True})
            async for event in self.events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def event_stream(events: AsyncIterator[str]) -> Response:
    """A response of events. What goes wrong before the first of them is an answer of its own."""
    first = await anext(events, None)
    if first is None:
        raise ApiError(499, "the client has gone away")
    return EventStream(first, events)


def document_errors(app: FastAPI, secured: bool) -> Callable[[], dict[str, Any]]:
    """The OpenAPI document as the server really is: validation answers 400, and it may want a token."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        for path, methods in document["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                if secured and path not in OPEN:
                    operation["security"] = [{"bearer": []}]
        if secured:
            schemes = document["components"].setdefault("securitySchemes", {})
            schemes["bearer"] = {"type": "http", "scheme": "bearer"}
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        return document

    return openapi
