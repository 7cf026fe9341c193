"""lrt: latent recurrence in transformers, exact wherever it runs.

>>> import torch
>>> import lrt
>>> config = lrt.ModelConfig(depth=2, width=32, heads=2, vocab_size=64, context=16)
>>> model = lrt.LatentRecurrentTransformer(config)
>>> tokens = torch.randint(64, (3, 12))
>>> lrt.refine(model, tokens, lrt.schedules.interleaved(2)).hidden.shape  # in passes, as it is trained
torch.Size([3, 12, 32])
>>> lrt.score(model, tokens).shape  # live, token by token: what a user gets, in nats
torch.Size([3, 11])
>>> torch.stack([*lrt.generate(model, tokens, max_new_tokens=4)], dim=1).shape
torch.Size([3, 4])

`import lrt` imports nothing heavy: each name is imported where it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers and editors; tests/test_public_api.py holds the two lists together
    from lrt import schedules as schedules
    from lrt.data.records import register_source as register_source
    from lrt.eval.ablations import register_ablation as register_ablation
    from lrt.eval.run_folder import Run as Run
    from lrt.eval.scoring import evaluate as evaluate
    from lrt.eval.scoring import score as score
    from lrt.experiments.state_tracking.tasks import register_task as register_task
    from lrt.inference.engine import Engine as Engine
    from lrt.inference.generation import generate as generate
    from lrt.inference.language_model import LanguageModel as LanguageModel
    from lrt.inference.language_model import load as load
    from lrt.inference.prefill import prefill as prefill
    from lrt.inference.request import Request as Request
    from lrt.inference.sampling import Sampling as Sampling
    from lrt.inference.session import Session as Session
    from lrt.integrations.retrofit.convert import retrofit as retrofit
    from lrt.model.checkpoint import save as save
    from lrt.model.config import ModelConfig as ModelConfig
    from lrt.model.memory import register_combination as register_combination
    from lrt.model.memory import register_injection as register_injection
    from lrt.model.memory_config import MemoryConfig as MemoryConfig
    from lrt.model.state import State as State
    from lrt.model.transformer import LatentRecurrentTransformer as LatentRecurrentTransformer
    from lrt.schedules.base import schedule as schedule
    from lrt.schedules.refinement import refine as refine
    from lrt.training.config import RunConfig as RunConfig
    from lrt.training.start import train as train

    __version__: str

__all__ = [
    "Engine",
    "LanguageModel",
    "LatentRecurrentTransformer",
    "MemoryConfig",
    "ModelConfig",
    "Request",
    "Run",
    "RunConfig",
    "Sampling",
    "Session",
    "State",
    "__version__",
    "evaluate",
    "generate",
    "load",
    "prefill",
    "refine",
    "register_ablation",
    "register_combination",
    "register_injection",
    "register_source",
    "register_task",
    "retrofit",
    "save",
    "schedule",
    "schedules",
    "score",
    "train",
]

HOMES = {
    "lrt.data.records": ("register_source",),
    "lrt.eval.ablations": ("register_ablation",),
    "lrt.eval.run_folder": ("Run",),
    "lrt.eval.scoring": ("evaluate", "score"),
    "lrt.experiments.state_tracking.tasks": ("register_task",),
    "lrt.inference.engine": ("Engine",),
    "lrt.inference.generation": ("generate",),
    "lrt.inference.language_model": ("LanguageModel", "load"),
    "lrt.inference.prefill": ("prefill",),
    "lrt.inference.request": ("Request",),
    "lrt.inference.sampling": ("Sampling",),
    "lrt.inference.session": ("Session",),
    "lrt.integrations.retrofit.convert": ("retrofit",),
    "lrt.model.checkpoint": ("save",),
    "lrt.model.config": ("ModelConfig",),
    "lrt.model.memory_config": ("MemoryConfig",),
    "lrt.model.memory": ("register_combination", "register_injection"),
    "lrt.model.state": ("State",),
    "lrt.model.transformer": ("LatentRecurrentTransformer",),
    "lrt.schedules.base": ("schedule",),
    "lrt.schedules.refinement": ("refine",),
    "lrt.training.config": ("RunConfig",),
    "lrt.training.start": ("train",),
}
"""Module -> the public names that it defines. `schedules` and `__version__` are in no module."""


def __getattr__(name: str) -> Any:
    """A public name, imported now; the next use finds it in the module."""
    if name == "schedules":
        return importlib.import_module("lrt.schedules")
    if name == "__version__":
        distribution = importlib.import_module("lrt.utils.imports").DISTRIBUTION
        return importlib.import_module("importlib.metadata").version(distribution)
    home = next((module for module, names in HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'lrt' has no attribute {name!r}")
    globals()[name] = public = getattr(importlib.import_module(home), name)
    return public


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
