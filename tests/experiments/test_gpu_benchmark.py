"""The card's benchmark in its small form on a CPU: whole, section by section, and awake to wrong kernels."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lrt.experiments.bench.rows import Row
from lrt.model import blockwise_attention
from lrt.model.blockwise_attention import CPU, Kernel

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ("--device", "cpu", "--size", "small")


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    """benchmarks/gpu.py."""
    before = [*sys.path]
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("gpu")
    sys.path[:] = before


def read(out: Path) -> dict[str, Any]:
    """gpu.json, which is strict JSON: no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads((out / "gpu.json").read_text(), parse_constant=refuse)


@pytest.mark.slow
def test_the_small_form_runs_every_section(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert gpu.main(["--out", str(tmp_path), *SMALL]) == 0
    written, printed = read(tmp_path), capsys.readouterr()
    assert written["state"] == "done"
    assert {"hardware", "memory_bytes", "code", "size", "minutes", "line"} <= set(written)
    sections = written["sections"]
    assert list(sections) == list(gpu.SECTIONS)
    text = (tmp_path / "gpu.md").read_text()
    for name, section in sections.items():
        assert section["state"] == "ok", (name, section["errors"], section["failed"])
        assert section["rows"], name
        assert section["table"] in text
        assert section["table"] in printed.out
        assert f" {name} 1/" in printed.err  # a line of progress
    checks = {name for name, section in sections.items() if section["checks"]}
    assert checks == {"oracle", "kernels", "ranks"}
    steps = {row["name"] for row in sections["steps"]["rows"]}
    assert any("bfloat16, uncompiled: lrt-shared: settled" in name for name in steps)
    assert any("float32, uncompiled: recommended, 2x32: " in name for name in steps)
    decoded = {row["name"]: row for row in sections["decode"]["rows"]}
    assert set(decoded) == {f"{n} rows, fused: {model}" for n in (1, 8) for model in ("lrt", "transformer")}
    assert all(row["ms_per_token"] > 0 for row in decoded.values())
    prefilled = {row["name"].split(", ")[1]: row for row in sections["prefill"]["rows"]}
    assert prefilled["token by token"]["calls"] == 32
    assert prefilled["one plain forward"]["forwards"] == prefilled["one plain forward"]["over plain"] == 1


def wrong_forward(*arguments: Any) -> tuple[Any, ...]:
    out, *rest = CPU.forward(*arguments)
    return out * 1.001, *rest


def wrong_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = CPU.backward(*arguments)
    return dq, dk, dv.roll(1, 2)


WRONG = {
    "forward": dataclasses.replace(CPU, forward=wrong_forward),
    "backward": dataclasses.replace(CPU, backward=wrong_backward),
}


@pytest.mark.parametrize("kernel", WRONG.values(), ids=WRONG)
def test_a_wrong_kernel_is_noticed(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kernel: Kernel
):
    monkeypatch.setattr(blockwise_attention, "choose_kernel", lambda q, masked: kernel)
    assert gpu.main(["--out", str(tmp_path), *SMALL, "--only", "kernels"]) == 1
    section = read(tmp_path)["sections"]["kernels"]
    assert section["state"] == "failed"
    assert {f"attention by another, {t}, heads" for t in ("float32", "float64")} <= set(section["failed"])
    assert not any("cross-entropy" in name for name in section["failed"])
    printed = capsys.readouterr().out
    assert "MISSED" in printed
    assert "something FAILED" in printed


def test_a_wrong_model_is_noticed(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """The sections of the oracle see what no kernel's own check does: here, a mask that hides nothing."""
    checks = gpu.gpu_checks
    checked = checks.Checked("cpu", (torch.float32,), ("interleaved(2)",), ("all of these",), ())
    parts = dict(checks.model_parts(checked))
    assert all(row.holds for part in parts.values() for row in part(1.0))
    monkeypatch.setattr("lrt.inference.fused_step.visible_keys", lambda q, k, *_: (k >= 0) & (k <= q))
    assert [row.holds for row in parts["all of these, float32: decoding"](1.0)] == [False]


def rows(*values: float, then: BaseException | None = None) -> Callable[[float], Iterator[Row]]:
    """A part that gives these checks, and then raises."""

    def part(limit: float) -> Iterator[Row]:
        for value in values:
            yield Row(f"is {value}", value, at_most=1, measure="difference")
        if then is not None:
            raise then

    return part


def with_sections(monkeypatch: pytest.MonkeyPatch, gpu: ModuleType, **sections: list[Any]) -> None:
    parts = {name: (1, lambda plan, each=each: each) for name, each in sections.items()}
    monkeypatch.setattr(gpu, "SECTIONS", parts)


def test_an_error_is_noted_and_the_next_goes_on(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = [("first", rows(0.5, then=RuntimeError("no such kernel"))), ("second", rows(float("nan")))]
    with_sections(monkeypatch, gpu, broken=broken, right=[("third", rows(0.25))])

    def refuse(plan: object) -> list[Any]:
        raise ValueError("no such model")

    monkeypatch.setitem(gpu.SECTIONS, "hopeless", (1, refuse))
    assert gpu.main(["--out", str(tmp_path), *SMALL]) == 1
    sections = read(tmp_path)["sections"]
    assert sections["hopeless"]["errors"] == {"all of it": "ValueError: no such model"}
    assert sections["broken"]["state"] == "error"
    assert sections["broken"]["errors"] == {"first": "RuntimeError: no such kernel"}
    assert [row["difference"] for row in sections["broken"]["rows"]] == [0.5, "nan"]
    assert sections["broken"]["failed"] == ["is nan"]
    assert sections["right"]["state"] == "ok"
    assert "- first: RuntimeError: no such kernel" in (tmp_path / "gpu.md").read_text()


def test_a_stopped_run_keeps_what_it_had_and_goes_on(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = ["--out", str(tmp_path), *SMALL]
    stopped = [("part", rows(0.5, then=KeyboardInterrupt()))]
    with_sections(monkeypatch, gpu, done=[("part", rows(0.25))], stopped=stopped, later=[("part", rows(0.125))])
    assert gpu.main(words) == 130
    written = read(tmp_path)
    assert written["state"] == "interrupted"
    assert [(name, s["state"], len(s["rows"])) for name, s in written["sections"].items()] == [
        ("done", "ok", 1), ("stopped", "interrupted", 1),
    ]  # fmt: skip
    assert "is 0.25" in (tmp_path / "gpu.md").read_text()
    assert gpu.main(words) == 2
    assert "is there already; give --go-on" in capsys.readouterr().err
    again = [("part", rows(2.0))]  # what was done is not measured again
    with_sections(monkeypatch, gpu, done=again, stopped=[("part", rows(0.5, 0.75))], later=[("part", rows(0.125))])
    assert gpu.main([*words, "--go-on"]) == 0
    written = read(tmp_path)
    assert written["state"] == "done"
    assert [len(section["rows"]) for section in written["sections"].values()] == [1, 2, 1]


def test_a_lost_card_is_left_for_a_new_process(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started: list[list[str]] = []

    def replace_process(_: str, words: list[str]) -> None:
        started.append(words)
        raise SystemExit(0)

    monkeypatch.setattr(gpu, "is_lost", lambda device: True)
    monkeypatch.setattr(os, "execv", replace_process)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), *SMALL])
    broken = [("part", rows(0.5, then=RuntimeError("illegal memory access")))]
    with_sections(monkeypatch, gpu, broken=broken, right=[("part", rows(0.25))])
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), *SMALL])
    assert started[0][1:] == [str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path), *SMALL, "--go-on"]
    assert read(tmp_path)["sections"]["broken"]["state"] == "error"
    assert gpu.main([*started[0][2:]]) == 1  # the error stays one
    assert read(tmp_path)["sections"]["right"]["state"] == "ok"


def test_what_there_is_no_time_for_is_named(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with_sections(monkeypatch, gpu, one=[("first", rows(0.5)), ("second", rows(0.25))])
    assert gpu.main(["--out", str(tmp_path), *SMALL, "--minutes", "1e-9"]) == 0
    section = read(tmp_path)["sections"]["one"]
    assert (section["state"], section["left_out"]) == ("cut short", ["first", "second"])
    assert "left out, the time was over: second" in (tmp_path / "gpu.md").read_text()


def test_one_card_is_no_failure(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    parts = gpu.gpu_ranks.rank_parts("cuda", (2, 32, 32), ("float32",))
    with_sections(monkeypatch, gpu, ranks=parts)
    assert gpu.main(["--out", str(tmp_path), *SMALL]) == 0
    section = read(tmp_path)["sections"]["ranks"]
    assert (section["state"], section["not_here"]) == ("not here", ["one card: FSDP2 with NCCL takes two"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "there is no CUDA here"),
        (("--device", "nowhere"), "device 'nowhere' cannot be used here"),
        ((*SMALL, "--only", "speed"), "--only has speed; choose of oracle, kernels, steps"),
        ((*SMALL, "--minutes", "0"), "--minutes is 0.0; give a number above 0"),
    ],
)
def test_a_mistake_is_a_sentence(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...], message: str,
):  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
