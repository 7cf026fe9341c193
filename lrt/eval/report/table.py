"""A table of text cells, and its forms: rich for the terminal, Markdown, HTML, CSV, LaTeX and JSON."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from markupsafe import Markup

TableFormat = Literal["text", "json", "csv", "md", "latex"]
"""What `--format` takes. text is for reading: drawn on a terminal, Markdown elsewhere; the others are for files."""
PROGRAMS: tuple[TableFormat, ...] = ("json", "csv", "latex")
"""Forms that programs read, so that nothing else may stand beside them on standard output."""
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$", "–": "--",
    "γ": r"$\gamma$", "σ": r"$\sigma$", "²": r"$^2$",
}  # fmt: skip
"""Characters that LaTeX reads otherwise, or not at all."""
MINUS = re.compile(r"(?<![\w.])-(?=\d)")
"""A sign, which LaTeX sets shorter than a minus unless it is told."""


@dataclass(frozen=True)
class Table:
    """Text cells under a head, with a title (empty for none). Columns in which no row has anything are left out."""

    title: str
    head: Sequence[str]
    body: Sequence[Sequence[str]]

    def cells(self) -> list[list[str]]:
        """The head, then the rows, without empty columns."""
        shown = [i for i in range(len(self.head)) if any(row[i] for row in self.body)]
        return [[row[i] for i in shown] for row in (self.head, *self.body)]

    def transposed(self) -> Table:
        """Rows as columns: what a table of many columns and few rows looks like in a narrow terminal."""
        (corner, *names), *rows = zip(*self.cells(), strict=True)
        return Table(self.title, [corner, *names], rows)

    def markdown(self) -> str:
        """With the title as a heading of the third level."""
        head, *body = self.cells()
        lines = ["| " + " | ".join(row) + " |" for row in (head, *body)]
        title = f"### {self.title}\n\n" if self.title else ""
        return title + "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])

    def html(self) -> Markup:
        """With the title as a heading of the third level; a wide table scrolls by itself, beside the first column."""
        from lrt.eval.report.render import render  # loads Jinja2

        head, *body = self.cells()
        return render("table", title=self.title, head=head, body=body)

    def rich(self) -> RichTable:
        """For `Console.print`: the first column names the row, the others are numbers, to the right."""
        head, *body = self.cells()
        table = RichTable(title=escape(self.title) or None)
        for i, name in enumerate(head):
            table.add_column(escape(name), justify="left" if i == 0 else "right", no_wrap=True)
        for row in body:
            table.add_row(*map(escape, row))
        return table

    def text(self) -> str:
        """The rich form as plain text, as wide as it has to be."""
        out = io.StringIO()
        Console(file=out, width=10_000).print(self.rich())
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def csv(self) -> str:
        """The head and the rows, comma-separated; without the title, which would be no row."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(self.cells())
        return out.getvalue().rstrip("\n")

    def json(self) -> str:
        """A list with an object for each row, by the names of the columns."""
        return json.dumps(self.rows(), indent=1, ensure_ascii=False)

    def rows(self) -> list[dict[str, str]]:
        """Each row by the names of its columns."""
        head, *body = self.cells()
        return [dict(zip(head, row, strict=True)) for row in body]

    def latex(self) -> str:
        """A tabular with the rules of booktabs, the title as a comment above it."""
        head, *body = [[latex_text(cell) for cell in row] for row in self.cells()]
        lines = [" & ".join(row) + r" \\" for row in (head, *body)]
        columns = "l" + "r" * (len(head) - 1)
        title = [f"% {line}" for line in self.title.splitlines()]
        rules = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
        return "\n".join(
            ["% needs \\usepackage{booktabs}", *title, rf"\begin{{tabular}}{{{columns}}}", *rules, r"\end{tabular}"]
        )


def latex_text(text: str) -> str:
    """Text as LaTeX sets it."""
    return MINUS.sub("$-$", "".join(LATEX.get(character, character) for character in text))


FORMS: dict[TableFormat, Callable[[Table], str]] = {
    "text": Table.markdown,
    "json": Table.json,
    "csv": Table.csv,
    "md": Table.markdown,
    "latex": Table.latex,
}
"""What `--format` names -> a table in that form, off a terminal."""


def print_table(table: Table, form: TableFormat, console: Console) -> None:
    """Print a table. As text on a terminal that is too narrow for it, rows become columns where these fit."""
    if form != "text" or not console.is_terminal:
        print(FORMS[form](table), file=console.file)
        return
    turned = table.transposed()
    wide, narrow = (console.measure(t.rich(), options=console.options.update(width=10_000)) for t in (table, turned))
    fits = wide.maximum <= console.width or narrow.maximum > console.width
    console.print((table if fits else turned).rich())


def print_tables(tables: Sequence[Table], form: TableFormat, console: Console) -> None:
    """Print those that have rows, a line apart. As JSON a list with the title and the rows of each; in CSV each of
    several below a line with its title, behind a #."""
    tables = [table for table in tables if table.body]
    if form == "json":
        content = [{"title": table.title, "rows": table.rows()} for table in tables]
        print(json.dumps(content, indent=1, ensure_ascii=False), file=console.file)
        return
    for number, table in enumerate(tables):
        if number > 0:
            print(file=console.file)
        if form == "csv" and len(tables) > 1:
            print(f"# {table.title}", file=console.file)
        print_table(table, form, console)


@contextmanager
def aside(form: TableFormat) -> Iterator[None]:
    """What is printed in the block goes to standard error where standard output is for a program to read."""
    with redirect_stdout(sys.stderr) if form in PROGRAMS else nullcontext():
        yield


def markdown(tables: Sequence[Table]) -> str:
    """All of them that have rows."""
    return "\n\n".join(table.markdown() for table in tables if table.body)
