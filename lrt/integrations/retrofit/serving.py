"""A retrofitted folder over HTTP: transformers' own server, as far as it answers for this one model."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import transformers
from transformers.utils.import_utils import is_serve_available

from lrt.integrations.retrofit.modeling import RetrofitForCausalLM

ANSWERS, MODELS = ("/v1/chat/completions", "/v1/completions", "/health"), "/v1/models"
ROUTES = (*ANSWERS, MODELS)
"""What is served. transformers' other routes load whatever model a request names, or unload this one."""


def transformers_app(folder: Path, device: str) -> Any:
    """The application (ASGI) of transformers' server, with the model loaded, under the folder's name as written here.

    ValueError where what it needs is not installed.
    """
    if not is_serve_available():
        raise ValueError(
            "a retrofitted folder is served by transformers, which needs more for it; install it with "
            "pip install 'transformers[serving]'"
        )
    from fastapi.routing import APIRoute
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState

    # It looks a model's class up among transformers' own, whatever is registered with the Auto classes.
    library: Any = transformers
    library.RetrofitForCausalLM = RetrofitForCausalLM
    manager, state = ModelManager(device=device, force_model=str(folder)), GenerationState()
    # Of speech, decisions and the like there is none; which of them a version has differs.
    handlers: dict[str, Any] = {name: None for name in inspect.signature(build_server).parameters if "handler" in name}
    handlers["chat_handler"] = ChatCompletionHandler(model_manager=manager, generation_state=state)
    handlers["completion_handler"] = CompletionHandler(model_manager=manager, generation_state=state)
    app = build_server(manager, **handlers, generation_state=state)
    routes = app.router.routes
    routes[:] = [route for route in routes if isinstance(route, APIRoute) and route.path in ANSWERS]
    # Older versions list what lies in the Hub's cache, and fail where there is none.
    about = {"id": str(folder), "object": "model", "created": 0, "owned_by": "local"}
    app.add_api_route(MODELS, lambda: {"object": "list", "data": [about]})
    return app
