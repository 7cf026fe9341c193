"""One promise: what docs/serving.md shows works. Its commands and its Python run, with tiny models."""

from __future__ import annotations

import re
import shlex
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import tyro
from support.server import live, saved

from lrt.cli.serve import Serve
from lrt.serve.config import Limits
from lrt.serve.protocol import ChatBody, CompletionBody

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if not kind for line in block.splitlines()]


def test_the_python_blocks_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    block = "".join(block for kind, block in BLOCKS if kind == "python")
    with live(saved(tmp_path / "mine"), saved(tmp_path / "plain", seed=1)) as up:
        exec(compile(block.replace("http://127.0.0.1:8000", up.url), "docs/serving.md", "exec"), {})
    lines = capsys.readouterr().out
    assert lines.startswith("0 length ")
    assert "\n1 length " in lines


def test_commands_are_read_as_shown():
    command = next(line for line in COMMANDS if line.startswith("lrt serve"))
    parsed = tyro.cli(Serve, args=shlex.split(command)[2:])
    assert parsed.checkpoints == (Path("runs/mine"), Path("runs/plain"))
    load = next(line for line in COMMANDS if line.startswith("python "))
    assert (ROOT / shlex.split(load)[1]).is_file()
    for flag in ("--clients", "--seconds"):
        assert flag.removeprefix("--") + ":" in (ROOT / shlex.split(load)[1]).read_text()


def test_limits_and_parameters_are_all_there():
    for field in fields(Limits):
        if field.name != "inspect_tokens":
            assert f"`--limits.{field.name.replace('_', '-')}`" in PAGE, field.name
    for name in {*CompletionBody.model_fields, *ChatBody.model_fields}:
        described = f"`{name}`" in PAGE
        shaped = CompletionBody.model_fields.get(name) or ChatBody.model_fields[name]
        nothing = "None" in str(shaped.annotation) or "Literal" in str(shaped.annotation)
        assert described or nothing or name in ("model", "messages"), name


def test_examples_start_what_there_is():
    unit = (ROOT / "examples" / "lrt.service").read_text()
    (start,) = re.findall(r"^ExecStart=\S+ serve (.*)$", unit, re.MULTILINE)
    assert tyro.cli(Serve, args=shlex.split(start)).token_file == Path("%d/token")
    file = (ROOT / "examples" / "Containerfile").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", file, re.MULTILINE)
    parsed = tyro.cli(Serve, args=[*eval(entry)[2:], "/runs/mine"])
    assert (parsed.host, parsed.open) == ("0.0.0.0", False)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "serve" in extras
