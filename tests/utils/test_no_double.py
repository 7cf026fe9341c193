"""On a device that has no float64, such as an Apple GPU, all works and gives the CPU's numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lrt.utils.device import double, has_float64

ROOT = Path(__file__).parents[2]
REFUSAL = """
from support.no_double import DEVICE as device, Lending
import torch
with Lending():
    x = torch.ones(3).to(device)
    assert x.cpu().double().sum().item() == 3
    for attempt in (
        lambda: x.double(),
        lambda: x.sum(dtype=torch.float64),
        lambda: torch.ones(3, dtype=torch.float64, device=device),
        lambda: torch.ones(3, dtype=torch.float64).to(device),
        lambda: torch.tensor([1.0], dtype=torch.float64, device=device),
        lambda: x + torch.ones(3),
    ):
        try:
            attempt()
        except (TypeError, RuntimeError) as error:
            print(error)
"""


def program(*arguments: str) -> str:
    """The output of Python on the lent device, which lasts as long as its process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    ran = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def walk(folder: Path, *names: str) -> dict[str, Any]:
    return json.loads(program("-m", "support.no_double_walk", str(folder), *names).splitlines()[-1])


def flat(numbers: Any) -> list[float]:
    return [n for part in numbers for n in flat(part)] if isinstance(numbers, list) else [numbers]


def check(numbers: dict[str, Any]) -> None:
    for name, (device, cpu) in numbers.items():
        assert flat(device) == pytest.approx(flat(cpu), rel=1e-5), name


def test_the_lent_device_refuses_what_it_should():
    refusals = program("-c", REFUSAL).splitlines()
    assert len(refusals) == 6
    assert sum("has no torch.float64" in line for line in refusals) == 5


@pytest.mark.slow
def test_training_scoring_and_generating(tmp_path):
    names = ["train", "score", "generate", "prefill"]
    numbers = walk(tmp_path, *names)
    assert list(numbers) == names
    check(numbers)


@pytest.mark.slow
def test_every_public_way(tmp_path):
    numbers = walk(tmp_path)
    assert len(numbers) == 12
    check(numbers)


def test_only_devices_known_to_have_it_are_asked():
    assert has_float64(torch.device("cpu"))
    assert has_float64(torch.device("cuda"))
    assert not has_float64(torch.device("mps"))
    assert double(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float64
