"""One promise: what README and the site show can be typed. Commands are read by the command line; Python runs.

Python that needs a network, a card or several machines begins with `# not run: …`, and is compiled alone. Pages whose
Python another test runs are named in `RUN_BY`.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.pages import DOCS, NOT_RUN, ROOT, Block, blocks, code_cells, commands, lrt_arguments, notebooks, pages
from support.registries import restored

from lrt.cli import verbs
from lrt.cli.main import load_plugins

RUN_BY = {
    "README.md": "test_readme.py",
    "docs/contract.md": "test_citations.py",
    "docs/extending.md": "test_extending_docs.py",
    "docs/huggingface.md": "test_hf_docs.py",
    "docs/inference.md": "test_inference_docs.py",
    "docs/notebook.md": "test_notebook_docs.py",
    "docs/pretrained.md": "test_pretrained_docs.py",
    "docs/serving.md": "test_serving_docs.py",
    "docs/tutorial.md": "test_tutorial.py",
}
"""Page -> the test that runs its Python, with what that needs."""
PYTHON = [block for page in pages() for block in blocks(page) if block.language == "python"]
SLOW = {"docs/state-tracking.md"}
"""Pages whose Python trains for half a minute."""
HERE = [
    pytest.param(block, marks=pytest.mark.slow if block.page in SLOW else (), id=block.page)
    for block in PYTHON
    if block.page not in RUN_BY
]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PAGES_WITH_COMMANDS = [page for page in pages() if commands(page)]


def label(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def tables() -> Iterator[None]:
    with restored():
        yield


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=label)
def test_commands_are_commands(page: Path, tables: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "examples" / "low_rank_injection.py", ".")  # a plugin, and a folder, that pages name
    Path("tasks").mkdir()
    for arguments in lrt_arguments(page):
        verbs.parse(load_plugins(arguments))


def test_there_are_commands() -> None:
    assert sum(len(list(lrt_arguments(page))) for page in pages()) > 80


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=label)
def test_other_programs_are_there(page: Path) -> None:
    """Targets of make, extras of pip, scripts and programs of python."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for line in commands(page):
        words = shlex.split(re.sub(r"^[A-Z_]+=\S+ ", "", line))
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", MAKEFILE, re.MULTILINE), line
        for listed in re.findall(r"latent-recurrent-transformer\[([\w,-]+)\]", line):
            assert set(listed.split(",")) <= set(extras), line
        if "-c" in words:
            compile(words[words.index("-c") + 1], line, "exec")
        scripts = [word for word in words if word.endswith(".py") and "/" in word]
        assert all((ROOT / script).is_file() for script in scripts), line


@pytest.mark.parametrize("block", HERE)
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = compile(block.text, block.page, "exec")
    if not NOT_RUN.match(block.text):
        exec(code, {"__name__": "page"})


def test_python_of_the_other_pages_is_run_elsewhere() -> None:
    shown = {block.page for block in PYTHON}
    assert set(RUN_BY) <= shown
    for page, test in RUN_BY.items():
        assert page.removeprefix("docs/") in (ROOT / "tests" / "docs" / test).read_text(encoding="utf-8"), page


@pytest.mark.parametrize("notebook", notebooks(), ids=label)
def test_a_notebook_is_stored_without_output_and_compiles(notebook: Path) -> None:
    """The build runs it. What it prints is never committed, so that it cannot be old."""
    assert '"outputs": []' in notebook.read_text(encoding="utf-8")
    assert not re.search(r'"output_type"|"execution_count": \d', notebook.read_text(encoding="utf-8"))
    for cell in code_cells(notebook):
        compile(cell, label(notebook), "exec")


def test_every_page_is_on_the_site() -> None:
    """Each stands in exactly one table of contents."""
    trees = re.compile(r"```\{toctree\}\n(.*?)```", re.DOTALL)
    listed = [
        (page.parent / line).resolve().relative_to(DOCS).as_posix()
        for page in (DOCS / "index.md", DOCS / "results.md", DOCS / "api" / "index.md")
        for tree in trees.findall(page.read_text(encoding="utf-8"))
        for line in tree.splitlines()
        if line and not line.startswith(":") and "*" not in line
    ]
    files = [*DOCS.glob("*.md"), *DOCS.glob("api/*.md"), *notebooks()]
    assert sorted(listed) == sorted(
        f.relative_to(DOCS).with_suffix("").as_posix() for f in files if f.stem != "index" or f.parent != DOCS
    )


def test_every_public_name_is_in_the_reference() -> None:
    import lrt

    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    named = set(re.findall(r"^\.\. auto\w+:: lrt\.(\w+)$", text, re.MULTILINE))
    assert named == set(lrt.__all__) - {"__version__"}
