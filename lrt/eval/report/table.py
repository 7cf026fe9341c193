"""A table of a study: for the terminal and the README in Markdown, for `lrt report` as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Text cells under a head, with a title (empty for none). Columns in which no row has anything are left out."""

    title: str
    head: Sequence[str]
    body: Sequence[Sequence[str]]

    def shown(self) -> list[list[str]]:
        """The head, then the rows, without empty columns."""
        kept = [i for i in range(len(self.head)) if any(row[i] for row in self.body)]
        return [[row[i] for i in kept] for row in (self.head, *self.body)]

    def markdown(self) -> str:
        head, *body = self.shown()
        lines = ["| " + " | ".join(row) + " |" for row in (head, *body)]
        title = f"### {self.title}\n\n" if self.title else ""
        return title + "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def markdown(tables: Sequence[Table]) -> str:
    """All of them that have rows."""
    return "\n\n".join(table.markdown() for table in tables if table.body)
