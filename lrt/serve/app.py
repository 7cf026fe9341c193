"""The ASGI application: which address does what. Its own description is at /openapi.json."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import aclosing, asynccontextmanager
from importlib import metadata
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Receive, Scope, Send

from lrt.inference.jinja_template import JinjaTemplate
from lrt.serve.body import LARGE, body_route, body_size, off_loop
from lrt.serve.errors import ApiError, ClientDisconnected, install_handlers, unknown_model_error
from lrt.serve.middleware import PUBLIC_PATHS, RequestGuard
from lrt.serve.models import ServedModel, model_length, summary
from lrt.serve.page_files import PAGE_FILES, read_page_file
from lrt.serve.playground import MemoryInspector, parse_generation, stream_generation
from lrt.serve.protocol import (
    ChatBody,
    ChatCompletion,
    CompletionBody,
    Error,
    GenerateBody,
    GenerationBody,
    Health,
    InspectBody,
    LoadState,
    Model,
    ModelBody,
    ModelList,
    TextCompletion,
    Version,
)
from lrt.serve.registry import ModelRegistry
from lrt.serve.request_parsing import GenerationTask, parse_chat, parse_completion
from lrt.serve.responses import full_response, stream_response
from lrt.serve.structured import asked_shapes
from lrt.utils.imports import DISTRIBUTION

EVENT_SCHEMA = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
EVENT_STREAM = {"text/event-stream": {"schema": EVENT_SCHEMA}}
ERROR_DESCRIPTIONS = {
    400: "The request is wrong: the message says what, its limit and the fix.",
    401: "The token is missing or wrong.",
    403: "The host is not this machine, or the server has no token and the request needs one.",
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


def create_app(
    registry: ModelRegistry,
    tokens: Collection[str] = (),
    hosts: Collection[str] | None = None,
    origins: Sequence[str] = (),
) -> FastAPI:
    """The application over a registry, whose engines it starts and stops. `tokens`, `hosts`: see `RequestGuard`.

    origins: pages from there may ask this server (CORS); "*" stands for all.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        registry.start()
        try:
            yield
        finally:
            inspector.close()
            await registry.stop()

    registry.secured = len(tokens) > 0
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
    add_loading_routes(app, registry)  # before /v1/models/{model}
    add_openai_routes(app, registry)
    add_playground_routes(app, registry, inspector)
    app.openapi = document_errors(app, registry.secured)  # pyright: ignore[reportAttributeAccessIssue]
    # The guard counts these paths by name and all others together, so that nobody can grow the metrics.
    routes = list(app.openapi()["paths"])
    app.add_middleware(
        RequestGuard, limits=registry.limits, metrics=registry.metrics, tokens=tokens, hosts=hosts, routes=routes
    )
    if origins:  # outside the guard: a browser asks without the token first, and wants to read refusals too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    return app


def add_server_routes(app: FastAPI, registry: ModelRegistry) -> None:
    """The page, health, version, metrics."""

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=Response, responses={200: {"content": {"text/html": {}}}})
    async def page(request: Request) -> Response:
        """The playground."""
        text, media_type = read_page_file(request.url.path)
        return Response(text, media_type=media_type)

    # What the page loads. The policy in middleware.py lets it load nothing from elsewhere.
    for path in PAGE_FILES.keys() - {"/"}:
        app.add_api_route(path, page, methods=["GET", "HEAD"], include_in_schema=False)

    @app.head("/health", include_in_schema=False)
    @app.head("/healthz", include_in_schema=False)
    @app.get("/health", responses={200: {"model": Health}, 503: {"model": Health}})
    @app.get("/healthz", responses={200: {"model": Health}, 503: {"model": Health}})
    async def health() -> JSONResponse:
        """200 while requests are taken."""
        states = {name: model_state(model) for name, model in registry.models.items()}
        healthy = not registry.draining and "failed" not in states.values()
        status = "shutting_down" if registry.draining else "ok"
        return JSONResponse({"status": status, "models": states}, 200 if healthy else 503)

    @app.get("/version", response_model=Version)
    async def version() -> Version:
        """Of this library."""
        return Version(version=metadata.version(DISTRIBUTION))

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(registry.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def model_state(model: ServedModel) -> str:
    """What /healthz says of a loaded model."""
    return "failed" if model.failed else "degraded" if model.impaired else "ok"


def add_openai_routes(app: FastAPI, registry: ModelRegistry) -> None:
    """OpenAI's interface: models, completions, chat."""

    async def entries() -> dict[str, Model]:
        listed = await registry.listed()
        return {
            one.name: Model(id=one.name, created=one.created, max_model_len=model_length(one.config)) for one in listed
        }

    @app.get("/v1/models", response_model=ModelList)
    async def models() -> ModelList:
        """What is served."""
        return ModelList(data=[*(await entries()).values()])

    @app.get("/v1/models/{model:path}", response_model=Model)
    async def model(model: str) -> Model:
        """One of them."""
        named, name = await entries(), registry.plain_name(model)
        if name not in named:
            raise unknown_model_error([*named])
        return named[name]

    async def respond(task: GenerationTask, http: Request) -> Response:
        if task.stream:
            return await event_stream(stream_response(task, registry, http))
        return await full_response(task, registry, http)

    @app.post("/v1/completions", responses={200: {"model": TextCompletion, "content": EVENT_STREAM}})
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue a prompt, or several. With `stream`, server-sent events."""
        async with registry.use(body.model) as model:
            task = await off_loop(parsing_size(body, request), parse_completion, body, model, registry.limits)
            return await respond(task, request)

    @app.post("/v1/chat/completions", responses={200: {"model": ChatCompletion, "content": EVENT_STREAM}})
    async def chat(body: ChatBody, request: Request) -> Response:
        """The next turn of a conversation. With `stream`, server-sent events."""
        async with registry.use(body.model) as model:
            foreign = isinstance(model.template, JinjaTemplate)  # which may take long over few messages
            size = LARGE if foreign else parsing_size(body, request)
            task = await off_loop(size, parse_chat, body, model, registry.limits)
            return await respond(task, request)


def add_loading_routes(app: FastAPI, registry: ModelRegistry) -> None:
    """Loading and unloading, for who has a token."""

    def check_secured() -> None:
        if not registry.secured:
            message = (
                "models are loaded and unloaded with a token only; start the server with --token-file or --api-key"
            )
            raise ApiError(403, message, code="no_token")

    @app.post("/v1/models/load", response_model=LoadState)
    async def load(body: ModelBody) -> LoadState:
        """Load a model, or load it anew where its checkpoint has changed. Running answers end on the old one."""
        check_secured()
        return LoadState(model=registry.plain_name(body.model), status=await registry.load(body.model))

    @app.post("/v1/models/unload", response_model=LoadState)
    async def unload(body: ModelBody) -> LoadState:
        """Take a model out of memory when its running answers have ended. The next request for it loads it again."""
        check_secured()
        await registry.unload(body.model)
        return LoadState(model=registry.plain_name(body.model), status="unloaded")


def parsing_size(body: GenerationBody, request: Request) -> int:
    """What `off_loop` counts for a body: a small grammar can take long to compile too."""
    return LARGE if asked_shapes(body) else body_size(request)


def add_playground_routes(app: FastAPI, registry: ModelRegistry, inspector: MemoryInspector) -> None:
    """What the page calls beside OpenAI's interface.

    In the answer of /playground/models "inspect" is the most tokens of a text that /playground/inspect takes.
    """

    @app.get("/playground/models")
    async def playground_models() -> dict[str, Any]:
        """The models and their memory."""
        summaries = [
            {**summary(one.name, one.config, registry.settings), "examples": one.examples}
            for one in await registry.listed()
        ]
        return {"models": summaries, "inspect": registry.limits.inspect_tokens}

    @app.post("/playground/generate", response_class=Response, responses={200: {"content": EVENT_STREAM}})
    async def generate(body: GenerateBody, request: Request) -> Response:
        """Tokens with their surprisal, as server-sent events."""
        async with registry.use(body.model) as model:
            task = await off_loop(body_size(request), parse_generation, body, model, registry.limits)
            return await event_stream(stream_generation(task, registry, request))

    @app.post("/playground/inspect")
    async def inspect(body: InspectBody, request: Request) -> dict[str, Any]:
        """What the memory did with a text."""
        async with registry.use(body.model) as model:
            return await inspector.inspect(model, body.tokens, request)


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
