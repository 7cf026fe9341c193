"""The ASGI application: which address does what. Its own description is at /openapi.json."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Receive, Scope, Send

from lrt.serve.body import body_route, body_size, off_loop
from lrt.serve.errors import ClientDisconnected, install_handlers
from lrt.serve.middleware import PUBLIC_PATHS, RequestGuard
from lrt.serve.models import ModelRegistry, ServedModel
from lrt.serve.page_files import PAGE_FILES, read_page_file
from lrt.serve.playground import MemoryInspector, parse_generation, stream_generation
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
from lrt.serve.request_parsing import GenerationTask, parse_chat, parse_completion
from lrt.serve.responses import full_response, stream_response

EVENT_SCHEMA = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
EVENT_STREAM = {"text/event-stream": {"schema": EVENT_SCHEMA}}
ERROR_DESCRIPTIONS = {
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
    status: {"model": Error, "description": description} for status, description in ERROR_DESCRIPTIONS.items()
}


def create_app(registry: ModelRegistry, tokens: Collection[str] = (), hosts: Collection[str] | None = None) -> FastAPI:
    """The application over a registry, whose engines it starts and stops. `tokens`, `hosts`: see `RequestGuard`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        registry.start()
        try:
            yield
        finally:
            inspector.close()
            await registry.stop()

    inspector = MemoryInspector(registry)
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
    app.router.route_class = body_route(registry.limits)
    add_server_routes(app, registry)
    add_openai_routes(app, registry)
    add_playground_routes(app, registry, inspector)
    app.openapi = document_errors(app, len(tokens) > 0)  # pyright: ignore[reportAttributeAccessIssue]
    # The guard counts these paths by name and all others together, so that nobody can grow the metrics.
    routes = list(app.openapi()["paths"])
    app.add_middleware(
        RequestGuard, limits=registry.limits, metrics=registry.metrics, tokens=tokens, hosts=hosts, routes=routes
    )
    return app


def add_server_routes(app: FastAPI, registry: ModelRegistry) -> None:
    """The page, health, metrics."""

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=Response, responses={200: {"content": {"text/html": {}}}})
    async def page(request: Request) -> Response:
        """The playground."""
        text, media_type = read_page_file(request.url.path)
        return Response(text, media_type=media_type)

    # What the page loads. The policy in middleware.py lets it load nothing from elsewhere.
    for path in PAGE_FILES.keys() - {"/"}:
        app.add_api_route(path, page, methods=["GET", "HEAD"], include_in_schema=False)

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", responses={200: {"model": Health}, 503: {"model": Health}})
    async def health() -> JSONResponse:
        """200 while requests are taken."""
        states = {name: "failed" if model.engine.failed else "ok" for name, model in registry.models.items()}
        healthy = not registry.draining and "failed" not in states.values()
        status = "shutting_down" if registry.draining else "ok"
        return JSONResponse({"status": status, "models": states}, 200 if healthy else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(registry.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def add_openai_routes(app: FastAPI, registry: ModelRegistry) -> None:
    """OpenAI's interface: models, completions, chat."""

    def model_entry(model: ServedModel) -> Model:
        return Model(id=model.name, created=model.created)

    @app.get("/v1/models", response_model=ModelList)
    async def models() -> ModelList:
        """What is served."""
        return ModelList(data=[model_entry(model) for model in registry.models.values()])

    @app.get("/v1/models/{model}", response_model=Model)
    async def model(model: str) -> Model:
        """One of them."""
        return model_entry(registry.find(model))

    async def respond(task: GenerationTask, http: Request) -> Response:
        if task.stream:
            return await event_stream(stream_response(task, registry, http))
        return await full_response(task, registry, http)

    @app.post("/v1/completions", responses={200: {"model": TextCompletion, "content": EVENT_STREAM}})
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue a prompt, or several. With `stream`, server-sent events."""
        model = registry.find(body.model)
        return await respond(
            await off_loop(body_size(request), parse_completion, body, model, registry.limits), request
        )

    @app.post("/v1/chat/completions", responses={200: {"model": ChatCompletion, "content": EVENT_STREAM}})
    async def chat(body: ChatBody, request: Request) -> Response:
        """The next turn of a conversation. With `stream`, server-sent events."""
        model = registry.find(body.model)
        return await respond(await off_loop(body_size(request), parse_chat, body, model, registry.limits), request)


def add_playground_routes(app: FastAPI, registry: ModelRegistry, inspector: MemoryInspector) -> None:
    """What the page calls beside OpenAI's interface.

    In the answer of /playground/models "inspect" is the most tokens of a text that /playground/inspect takes.
    """

    @app.get("/playground/models")
    async def playground_models() -> dict[str, Any]:
        """The models and their memory."""
        summaries = [model.summary() for model in registry.models.values()]
        return {"models": summaries, "inspect": registry.limits.inspect_tokens}

    @app.post("/playground/generate", response_class=Response, responses={200: {"content": EVENT_STREAM}})
    async def generate(body: GenerateBody, request: Request) -> Response:
        """Tokens with their surprisal, as server-sent events."""
        model = registry.find(body.model)
        task = await off_loop(body_size(request), parse_generation, body, model, registry.limits)
        return await event_stream(stream_generation(task, registry, request))

    @app.post("/playground/inspect")
    async def inspect(body: InspectBody, request: Request) -> dict[str, Any]:
        """What the memory did with a text."""
        return await inspector.inspect(registry.find(body.model), body.tokens, request)


class EventStream(Response):
    """Server-sent events from a generator, which is closed however the response ends.

    Starlette's StreamingResponse leaves its generator open where the client goes away; its rows would stay in use.
    """

    media_type = "text/event-stream"

    def __init__(self, first: str, events: AsyncIterator[str]) -> None:
        self.first, self.events = first, events
        self.status_code, self.background = 200, None
        self.init_headers({"X-Accel-Buffering": "no"})  # nginx would else collect events before it sends them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events):  # pyright: ignore[reportArgumentType]
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self.first.encode(), "more_body": True})
            async for event in self.events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def event_stream(events: AsyncIterator[str]) -> Response:
    """A response of events. An ApiError before the first of them is raised, and so has a status of its own.

    ClientDisconnected where there is no event.
    """
    first = await anext(events, None)
    if first is None:
        raise ClientDisconnected
    return EventStream(first, events)


def document_errors(app: FastAPI, secured: bool) -> Callable[[], dict[str, Any]]:
    """The OpenAPI document as the server really is: validation answers 400, and it may want a token."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        for path, methods in document["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)  # FastAPI's own status for what validation refuses
                if secured and path not in PUBLIC_PATHS:
                    operation["security"] = [{"bearer": []}]
        if secured:
            schemes = document["components"].setdefault("securitySchemes", {})
            schemes["bearer"] = {"type": "http", "scheme": "bearer"}
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        return document

    return openapi
