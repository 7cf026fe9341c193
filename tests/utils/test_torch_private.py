"""torch's private names are in one file, are there in the versions named here, and each has a way without it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import CORNER, assert_same, assert_same_gradients, configuration, gradients, random_model

import lrt
from lrt import ModelConfig, refine, schedules
from lrt.inference import fused_weights
from lrt.inference.decoders import MODES, decoder
from lrt.model import blockwise_attention
from lrt.utils import torch_private
from lrt.utils.torch_private import Missing, available

TRIED = ("2.9.1", "2.13.0")
"""Versions of torch that the whole suite was run on, or (the older ones) tests/model, tests/schedules and
tests/inference."""
OPERATORS = {name: value for name, value in vars(torch_private).items() if name.isupper()}


@pytest.mark.parametrize("name", OPERATORS)
def test_this_torch_has_them(name: str):
    assert available(OPERATORS[name]), f"torch {torch.__version__} lacks {OPERATORS[name]}; tried were {TRIED}"


def test_a_missing_operator_is_one_that_nobody_calls():
    missing = torch_private.operator("aten", "_not_an_operator")
    assert not available(missing)
    with pytest.raises(NotImplementedError, match=r"has no torch\.ops\.aten\._not_an_operator"):
        missing(1)


def test_no_other_file_uses_private_names():
    private = re.compile(r"\btorch(\.\w+)*\._[a-z]")
    for file in Path(lrt.__file__).parent.rglob("*.py"):
        if file.name == "torch_private.py":
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            assert not private.search(line), f"{file.name}:{number}: {line.strip()}"


def test_without_a_kernel_attention_is_plain_and_says_so(monkeypatch: pytest.MonkeyPatch):
    model = random_model(configuration(CORNER))
    tokens = torch.randint(model.config.vocab_size, (2, 16))
    schedule = schedules.interleaved(2)
    expected = refine(model, tokens, schedule).hidden
    wanted = gradients(model, expected)
    lacking = replace(blockwise_attention.CPU, operators=(Missing("a kernel"),))
    monkeypatch.setattr(blockwise_attention, "CPU", lacking)
    with pytest.warns(RuntimeWarning, match="lacks its attention kernel for cpu; plain attention is used"):
        hidden = refine(model, tokens, schedule).hidden
    assert_same(hidden, expected)
    assert_same_gradients(gradients(model, hidden), wanted)


def test_without_packed_products_weights_are_transposed(monkeypatch: pytest.MonkeyPatch):
    model = random_model(ModelConfig(depth=2, width=32, heads=2, vocab_size=31)).float()
    monkeypatch.setattr(torch_private, "PACK_LINEAR", Missing("packing"))
    assert not fused_weights.packs(model)
    assert not MODES["packed"].covers(model)
    with pytest.raises(ValueError, match="mode='packed' needs float32 on a CPU"):
        decoder(model, model.empty_state(1, 4), "packed")


class WithoutAdvice:
    """A compiler's configuration without the names of later versions."""


def test_without_the_compilers_hints_nothing_fails(monkeypatch: pytest.MonkeyPatch):
    compiler: Any = type("dynamo", (), {"config": WithoutAdvice()})()
    monkeypatch.setattr(torch, "_dynamo", compiler)
    torch_private.mark_static_address(torch.zeros(1))
    torch_private.mark_maybe_dynamic(torch.zeros(1), 0)
    with torch_private.recompile_limit(3):
        pass
