"""One table and its forms: the same cells in each, escaped, and no column that is empty."""

from __future__ import annotations

import csv
import io
import json

import pytest
from rich.console import Console
from support.page import Page

from lrt.eval.report.table import FORMS, Table, TableFormat, aside, markdown, print_table, print_tables

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


def test_csv_and_json_hold_the_cells_as_they_are() -> None:
    assert list(csv.reader(io.StringIO(TABLE.csv()))) == TABLE.cells()
    assert json.loads(TABLE.json()) == [
        {"model": "[bold]lrt[/bold] & co", "live": "1.25"},
        {"model": "  zeroed", "live": ""},
    ]


def test_latex_escapes_what_latex_reads() -> None:
    text = Table("title", ["a_b", "%"], [["x & y", "-0.5 [-1, +2] ± 3"], ["a-b", "1e-3"]]).latex()
    assert r"a\_b & \% \\" in text
    assert r"x \& y & $-$0.5 [$-$1, +2] $\pm$ 3 \\" in text
    assert r"a-b & 1e-3 \\" in text
    assert r"\begin{tabular}{lr}" in text


@pytest.mark.parametrize("form", [form for form in FORMS if form != "text"])
def test_a_form_for_files_is_printed_as_it_is(form: TableFormat) -> None:
    out = io.StringIO()
    print_table(TABLE, form, Console(file=out, width=10))
    assert out.getvalue() == FORMS[form](TABLE) + "\n"


def printed(tables: list[Table], form: TableFormat) -> str:
    out = io.StringIO()
    print_tables(tables, form, Console(file=out))
    return out.getvalue()


def test_several_tables_keep_their_titles_in_every_form() -> None:
    tables = [Table("one", ["a"], [["1"]]), Table("none", ["a"], []), Table("two", ["b"], [["2"]])]
    assert printed(tables, "csv") == "# one\na\n1\n\n# two\nb\n2\n"
    assert printed(tables[:1], "csv") == "a\n1\n"
    assert json.loads(printed(tables, "json")) == [
        {"title": "one", "rows": [{"a": "1"}]},
        {"title": "two", "rows": [{"b": "2"}]},
    ]
    assert printed(tables, "latex").count(r"\begin{tabular}") == 2
    assert printed(tables, "text") == markdown(tables) + "\n"


@pytest.mark.parametrize(("form", "where"), [("text", "out"), ("md", "out"), ("csv", "err"), ("json", "err")])
def test_what_is_said_beside_a_table_does_not_disturb_a_program(
    form: TableFormat, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with aside(form):
        print("3 cells to run")
    captured = capsys.readouterr()
    assert {"out": captured.out, "err": captured.err}[where] == "3 cells to run\n"
    assert captured.out + captured.err == "3 cells to run\n"


def test_a_file_gets_the_whole_width_and_a_narrow_terminal_rows_as_columns() -> None:
    wide = Table("", ["run", *(f"column {i}" for i in range(9))], [["lrt", *(f"cell {i}" for i in range(9))]])
    piped, terminal, broad = (io.StringIO() for _ in range(3))
    print_table(wide, "text", Console(file=piped, width=40))
    assert "column 8" in piped.getvalue()
    print_table(wide, "text", Console(file=terminal, width=40, force_terminal=True))
    rows = [line for line in terminal.getvalue().splitlines() if "column 8" in line]
    assert len(rows) == 1
    assert "cell 8" in rows[0]
    assert "…" not in terminal.getvalue()
    print_table(wide, "text", Console(file=broad, width=200, force_terminal=True))
    assert len([line for line in broad.getvalue().splitlines() if "column 8" in line and "column 0" in line]) == 1
