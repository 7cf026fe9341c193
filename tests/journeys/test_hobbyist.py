"""The hobbyist: the package from its wheel and no make, a book, a model of it that writes, answers and has a page."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright
from support.journey import Terminal
from support.page import QUIET
from support.pages import ROOT

from lrt.data.corpus import stdlib_files

BOOK_BYTES = 48_000
"""So little that the eight epochs of its text bound the training, and not the minutes."""


def install(into: Path) -> Path:
    """The program `lrt` of an environment with this package's wheel; its dependencies are borrowed from this one."""

    def start(*words: str | Path) -> str:
        return subprocess.check_output([sys.executable, *words], cwd=into, text=True, stderr=subprocess.STDOUT)

    start("-m", "build", "--wheel", "--no-isolation", "--outdir", into / "dist", ROOT)
    start("-m", "venv", "--without-pip", into / "environment")
    python = into / "environment/bin/python"
    start("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", *(into / "dist").glob("*.whl"))
    # Behind pip, which would otherwise find the lrt of this environment, and take it for the one to replace.
    (packages,) = (into / "environment/lib").glob("python3*/site-packages")
    borrowed = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    return into / "environment/bin/lrt"


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    """A folder with a book, and an `lrt` from the wheel."""
    text = "".join(file.read_text(encoding="utf-8") for file in stdlib_files()[:20])
    (tmp_path / "book.txt").write_text(text[:BOOK_BYTES], encoding="utf-8")
    return Terminal(tmp_path, [install(tmp_path)])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not on the PATH")
def test_a_book_becomes_a_model_that_writes_answers_and_has_a_page(terminal: Terminal):
    program = terminal.program[0]
    where = terminal.start([Path(program).with_name("python"), "-c", "import lrt; print(lrt.__file__)"])
    assert Path(where.strip()).is_relative_to(terminal.folder)
    shown = terminal.lrt("try", "book.txt", "--minutes", "30")
    assert "bits per byte live" in shown
    assert "runs/try/report.html" in shown
    assert (terminal.folder / "runs/try/report.html").is_file()
    written = terminal.lrt("sample", "runs/try/lrt", "--prompt", "import ", "--max-new-tokens", "12")
    assert written.startswith("import ")
    assert len(written.strip()) > len("import ")
    assert terminal.lrt("chat", "runs/try/lrt", "--max-new-tokens", "8", typed="hello\n/exit\n").strip()
    with terminal.serve("runs/try/lrt") as url:
        assert httpx.get(url).headers["content-type"].startswith("text/html")
        look_at(url)


def look_at(url: str) -> None:
    """Write on the page, by Chromium; nothing may be said on its console."""
    events: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", *QUIET])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.on("console", lambda message: events.append(message.text))
        page.on("pageerror", lambda error: events.append(str(error)))
        page.goto(url)
        page.fill("#prompt", "import os")
        page.fill("#max", "6")
        page.click("#go")
        expect(page.locator(".pane")).to_have_attribute("aria-busy", "false", timeout=60_000)
        assert page.locator(".text").inner_text().startswith("import os")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()
    assert events == []
