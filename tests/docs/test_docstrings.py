"""Examples in docstrings run: `>>>` is a doctest, and nothing else may look like code to be copied."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.registries import restored

import lrt

ROOT = Path(lrt.__file__).parent
UNRUN = re.compile(r"^\s*(```|(from|import) lrt\b)", re.MULTILINE)
"""A fence, or an import of lrt without `>>>` before it: code that no test would run."""


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring of a file: of modules, classes, functions, and below fields and constants."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():  # of a lambda it is an expression
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield statement.lineno, text


FILES = {file.relative_to(ROOT.parent).as_posix(): file for file in sorted(ROOT.rglob("*.py"))}
EXAMPLES = [name for name, file in FILES.items() if any(">>>" in text for _, text in docstrings(file))]


def test_no_docstring_holds_code_that_is_not_run() -> None:
    found = [f"{name}:{line}" for name, file in FILES.items() for line, text in docstrings(file) if UNRUN.search(text)]
    assert found == []


def test_the_face_has_an_example() -> None:
    assert "lrt/__init__.py" in EXAMPLES


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    with restored():
        yield


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)
    for line, text in docstrings(FILES[name]):
        example = parser.get_doctest(text, dict(vars(module)), f"{name}:{line}", str(FILES[name]), line - 1)
        if example.examples:
            runner.run(example, clear_globs=True)
    assert runner.tries > 0
    assert runner.failures == 0, "see the captured output"
