"""One table, three forms: the same cells in each, escaped, and no column that is empty."""

from __future__ import annotations

import io

from rich.console import Console
from support.page import Page

from lrt.eval.report.table import Table, markdown

TABLE = Table("A <title>", ["model", "empty", "live"], [["[bold]lrt[/bold] & co", "", "1.25"], ["  zeroed", "", ""]])


def test_markdown() -> None:
    assert TABLE.markdown() == (
        "### A <title>\n\n| model | live |\n|---|---|\n| [bold]lrt[/bold] & co | 1.25 |\n|   zeroed |  |"
    )
    assert markdown([Table("", ["a"], []), Table("", ["a"], [["1"]])]) == "| a |\n|---|\n| 1 |"


def test_html() -> None:
    text = TABLE.html()
    assert text.startswith("<h3>A &lt;title&gt;</h3>")
    assert Page(text).cells == ["[bold]lrt[/bold] & co", "1.25", "  zeroed"]
    assert "<th>model</th><th>live</th>" in text
    assert "<h3>" not in Table("", ["a"], [["1"]]).html()


def test_rich() -> None:
    out = io.StringIO()
    Console(file=out, width=60).print(TABLE.rich())
    assert "A <title>" in out.getvalue()
    assert "[bold]lrt[/bold] & co" in out.getvalue()
    assert "empty" not in out.getvalue()
