"""One promise: what documents and docstrings cite is there: sections, files, links, names, a walk's functions."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from lrt.utils import plugins

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "log.md")]
SOURCES = sorted((ROOT / "lrt").rglob("*.py"))
CITING = [*SOURCES, *sorted((ROOT / "lrt").rglob("*.yaml")), *sorted((ROOT / "tests").rglob("*.py"))]
CITING += [*sorted((ROOT / "benchmarks").glob("*.py")), *PAGES]
CITING.remove(Path(__file__))
SECTION = re.compile(r"\b(contract|spec)(?:\.md)?, sections? (\d+)(?: and (\d+))?", re.IGNORECASE)
LOOSE = re.compile(r"\b(?:contract|spec) \d|\b(?:contract|spec)'s \(|\bthe issue\b", re.IGNORECASE)
PATH = re.compile(r"(?<![\w/.-])(?:lrt|docs|tests|benchmarks|examples)/[\w./-]*\w")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
NAME = re.compile(r"(?<![\w/.-])lrt(?:\.[A-Za-z_]\w*)+(?!\.\w|\w)")
ITEM = re.compile(r"^\d+\. `(lrt/[\w/]+\.py)`: (.*)$", re.MULTILINE)


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def ids(files: list[Path]) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in files]


@pytest.mark.parametrize("document", ["contract", "spec"])
def test_cited_sections_exist(document: str):
    sections = set(re.findall(r"^## (\d+)\. ", text_of(ROOT / "docs" / f"{document}.md"), re.MULTILINE))
    cited = {
        (str(file.relative_to(ROOT)), number)
        for file in CITING
        for name, *numbers in SECTION.findall(text_of(file))
        for number in numbers
        if name.lower() == document and number
    }
    assert cited, "nothing cites it: the pattern is wrong"
    assert {(file, number) for file, number in cited if number not in sections} == set()


def test_citations_are_written_in_one_way():
    """`contract, section 4`: else the test above does not see them."""
    loose = {(str(file.relative_to(ROOT)), found) for file in CITING for found in LOOSE.findall(text_of(file))}
    assert loose == set()


@pytest.mark.parametrize("file", [*PAGES, *SOURCES], ids=ids([*PAGES, *SOURCES]))
def test_files_that_are_named_exist(file: Path):
    paths = {path for path in PATH.findall(text_of(file)) if not (ROOT / path).exists()}
    assert paths == set()


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_lead_somewhere(page: Path):
    assert {link for link in LINK.findall(text_of(page)) if not (page.parent / link).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_names_that_are_told_exist(page: Path):
    """`lrt.schedules.DEFAULT`: a module, or what one defines."""
    names = set(NAME.findall(text_of(page))) - {plugins.GROUP}  # of entry points, which is no module
    assert {name for name in names if not exists(name)} == set()


def exists(name: str) -> bool:
    """Whether a dotted name is a module of lrt, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (ROOT / Path(*parts[:end])).is_dir() or (ROOT / Path(*parts[:end])).with_suffix(".py").is_file():
            found = importlib.import_module(".".join(parts[:end]))
            break
    for attribute in parts[end:]:
        if not hasattr(found, attribute):
            return False
        found = getattr(found, attribute)
    return True


def test_a_walk_names_functions_that_are_there():
    items = ITEM.findall(text_of(ROOT / "docs" / "walks.md"))
    assert len(items) > 40
    for file, names in items:
        defined = set(re.findall(r"^ *(?:async )?def (\w+)", text_of(ROOT / file), re.MULTILINE))
        assert {name for name in re.findall(r"`([\w.]+)`", names) if name.split(".")[-1] not in defined} == set(), file


def test_the_contracts_names_work():
    (block,) = re.findall(r"```python\n(.*?)```", text_of(ROOT / "docs" / "contract.md"), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "docs/contract.md", "exec"), names)
    assert len(names["following"]) == 3  # type: ignore[arg-type]
