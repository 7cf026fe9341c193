"""What makes the site: the log, docstrings for autodoc, pinned packages, anchors. `make docs` is the build itself."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from support.pages import DOCS, ROOT, pages

ANCHOR = re.compile(r"\]\(([\w./-]*\.md)?#([\w-]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def extension(name: str) -> ModuleType:
    """A file of docs/_ext, which is on no path."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "_ext" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_entry_of_the_log_has_a_page():
    log_pages = extension("log_pages")
    text = (DOCS / "log.md").read_text(encoding="utf-8")
    entries = log_pages.entries(text)
    assert len(entries) == len(re.findall(r"^## ", text, re.MULTILINE)) > 40
    listed = log_pages.contents(text)
    assert all(f"\nlog/{entry.name}\n" in listed for entry in entries)
    assert sum(entry.page.count("](../") for entry in entries) >= 5  # figures, one folder up


def test_two_entries_of_one_name_are_refused():
    same = "# Log\n\n## 2026-01-01: a b\n\nx\n\n## 2026-01-01: a b\n\ny\n"
    with pytest.raises(ValueError, match="change a title"):
        extension("log_pages").entries(same)


@pytest.mark.parametrize(
    ("plain", "rst"),
    [
        ("the memory of `T` positions", "the memory of ``T`` positions"),
        ("all `T`s", "all ``T``\\ s"),
        ("mean |γ|, 2 * 3, m_ and U_k", "mean \\|γ\\|, 2 \\* 3, m\\_ and U_k"),
        ("a lone ` is text", "a lone ' is text"),
    ],
)
def test_plain_docstrings_are_no_markup(plain: str, rst: str):
    assert extension("plain_docstrings").to_rst([plain]) == [rst, ""]


def test_a_table_and_an_example_stay_as_they_stand():
    shown = extension("plain_docstrings").to_rst(["Text:", "", "    x <- x * m", "", ">>> f(`a`)", "1"])
    assert shown == ["Text:", "", "::", "", "      x <- x * m", "", ">>> f(`a`)", "1", ""]


def pins(file: Path) -> dict[str, str]:
    return dict(line.split("==") for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))


def test_the_site_is_built_with_pinned_packages():
    wanted = re.findall(r"^([\w-]+)>=", (DOCS / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    own, shared = pins(DOCS / "constraints.txt"), pins(ROOT / "constraints.txt")
    assert {name.lower() for name in wanted} <= {name.lower() for name in own}
    assert not own.keys() & shared.keys()


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub and the site make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_anchors_are_there(page: Path):
    for target, anchor in ANCHOR.findall(page.read_text(encoding="utf-8")):
        file = (page.parent / target) if target else page
        assert anchor in set(map(slug, HEADING.findall(file.read_text(encoding="utf-8")))), f"{file}#{anchor}"
