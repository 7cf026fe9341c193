"""A retrofitted folder over HTTP, by transformers' own server: OpenAI's interface at /v1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers.cli.serve import Serve
from transformers.utils.import_utils import is_serve_available

from lrt.integrations.retrofit.modeling import RetrofitForCausalLM


def serve_folder(folder: Path, host: str, port: int, device: str) -> None:
    """Serve until it is stopped, under the folder's name as it is written here.

    ValueError where what transformers' server needs is not installed, and where it cannot listen there.
    """
    if not is_serve_available():
        raise ValueError(
            "a retrofitted folder is served by transformers, which needs more for it; install it with "
            "pip install 'transformers[serving]'"
        )
    # Its server looks a model's class up among transformers' own, whatever is registered with the Auto classes.
    library: Any = transformers
    library.RetrofitForCausalLM = RetrofitForCausalLM
    try:
        Serve(force_model=str(folder), host=host, port=port, device=device)
    except SystemExit as error:  # uvicorn's, which has said why
        raise ValueError(f"cannot listen on {host} port {port}; choose another with --port") from error
