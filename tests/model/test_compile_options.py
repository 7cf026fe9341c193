"""How passes are compiled: one graph of static shapes, once per function."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lrt.model.recompute import compile_once


def test_a_graph_break_is_an_error_and_a_function_is_compiled_once(monkeypatch: pytest.MonkeyPatch):
    asked: list[dict[str, Any]] = []

    def compile_recorded(function: Any, **options: Any) -> Any:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_recorded)

    def double(x: int) -> int:
        return 2 * x

    assert compile_once(double) is compile_once(double)
    assert compile_once(double)(3) == 6
    assert asked == [{"fullgraph": True, "dynamic": False}]
