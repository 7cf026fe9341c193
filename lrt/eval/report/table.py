"""A table of text cells, and its three forms: Markdown for the README, HTML for pages, rich for the terminal."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table as RichTable


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

    def markdown(self) -> str:
        """With the title as a heading of the third level."""
        head, *body = self.cells()
        lines = ["| " + " | ".join(row) + " |" for row in (head, *body)]
        title = f"### {self.title}\n\n" if self.title else ""
        return title + "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])

    def html(self) -> str:
        """With the title as a heading of the third level; a wide table scrolls by itself."""
        head, *body = self.cells()
        title = f"<h3>{html.escape(self.title)}</h3>\n" if self.title else ""
        rows = "".join(f"<tr>{_row('td', row)}</tr>" for row in body)
        return (
            f'{title}<div class="scroll"><table><thead><tr>{_row("th", head)}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )

    def rich(self) -> RichTable:
        """For `Console.print`: the first column names the row, the others are numbers, to the right."""
        head, *body = self.cells()
        table = RichTable(title=escape(self.title) or None)
        for i, name in enumerate(head):
            table.add_column(escape(name), justify="left" if i == 0 else "right", no_wrap=True)
        for row in body:
            table.add_row(*map(escape, row))
        return table


def _row(tag: str, cells: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)


def markdown(tables: Sequence[Table]) -> str:
    """All of them that have rows."""
    return "\n\n".join(table.markdown() for table in tables if table.body)
