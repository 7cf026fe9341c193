"""`lrt doctor`: what it says of a machine, with what is missing made up; and once for real."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from lrt.cli.main import main
from lrt.experiments import doctor
from lrt.experiments.doctor import Check


def test_a_build_for_cuda_without_a_gpu_is_advised_of(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "gigabytes smaller" in doctor.check_torch("2.13.0", has_gpu=False).advice
    assert doctor.check_torch("2.13.0", has_gpu=True).advice == ""
    assert doctor.check_torch("2.13.0+cpu", has_gpu=False).advice == ""


def test_a_missing_compiler_is_advised_of(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "missing_compiler", lambda device: "no C++ compiler was found")
    assert doctor.check_compiler("cpu").state == "none: no C++ compiler was found"
    assert "g++" in doctor.check_compiler("cpu").advice
    monkeypatch.setattr(doctor, "missing_compiler", lambda device: None)
    assert doctor.check_compiler("cpu").advice == ""


@pytest.mark.parametrize(("free", "advised"), [(9 * 10**9, True), (11 * 10**9, False)])
def test_a_full_disk_is_advised_of(free: int, advised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 0, free))  # type: ignore[attr-defined]
    check = doctor.check_disk(tmp_path)
    assert check.state == f"{free / 1e9:.0f} GB free in {tmp_path}"
    assert bool(check.advice) == advised


def test_bfloat16_is_advised_where_it_is_faster(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "time_product", lambda a: 1.0 if a.dtype == torch.bfloat16 else 2.0)
    assert doctor.check_bfloat16("cpu") == Check(
        "bfloat16", "a product takes 0.50 of float32's time", "try lrt train --precision auto, which measures it"
    )
    monkeypatch.setattr(doctor, "time_product", lambda a: 1.0)
    assert doctor.check_bfloat16("cpu").advice == ""


def test_extras_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch):
    installed = ["torch>=2.9", "pytest>=9; extra == 'dev'"]
    lines = [*installed, 'no-such-package>=1 ; extra == "serve"', "no-other; extra == 'dev'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    assert doctor.missing_packages() == {"serve": ["no-such-package"], "dev": ["no-other"]}
    (check,) = doctor.check_extras()
    assert check.name == "extra serve"
    assert check.advice == "pip install 'latent-recurrent-transformer[serve]' if wanted"
    monkeypatch.setattr("importlib.metadata.requires", lambda name: installed)
    assert [*doctor.check_extras()] == [Check("extras", "all installed")]


def test_advice_stands_under_its_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "checks", lambda device: iter([Check("disk", "1 GB [free]", "write elsewhere")]))
    main(["doctor", "--device", "cpu"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["disk", "1", "GB", "[free]"]
    assert second.strip() == "→ write elsewhere"
    main(["doctor", "--device", "cpu", "--json"])
    assert json.loads(capsys.readouterr().out) == [
        {"name": "disk", "state": "1 GB [free]", "advice": "write elsewhere"}
    ]


@pytest.mark.slow
def test_speeds_are_measured(capsys: pytest.CaptureFixture[str]):
    main(["doctor", "--device", "cpu", "--json"])
    states = {check["name"]: check["state"] for check in json.loads(capsys.readouterr().out)}
    for name in ("training, transformer", "training, lrt", "decoding, lrt"):
        speed = re.match(r"([\d,]+) tokens/s", states[name])
        assert speed is not None, states[name]
        assert int(speed[1].replace(",", "")) > 10
