"""What a retrofitted model and its controls came to: a table, and a section of `lrt report`. Loads no model."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from lrt.eval.report.table import Table
from lrt.utils.json_lines import read_json_lines

FILE = "comparison.jsonl"
PATHWAY, SHIFT, PLAIN = "pathway", "token shift", "plain"
"""The model that was retrofitted, the same with the previous embedding alone, and without any pathway."""
Line = dict[str, Any]
"""What one of them came to, as `controls.train_with_controls` writes it."""
NOTE = (
    "The same decoder, trained on the same rows. Nats per learned token of the held-out rows, live. Difference: the "
    "pathway's less this one's, with the interval of 95 % over rows; negative is better. In equal time a control has "
    "as many more steps as the pathway's step takes longer."
)


def read_lines(folder: Path) -> list[Line]:
    """The lines of a comparison; none where there are none."""
    return read_json_lines(folder / FILE)


def mean_nats(line: Line) -> float:
    """Nats per learned token."""
    return sum(line["nats"]) / sum(line["learned"])


def difference(line: Line, other: Line) -> tuple[float, float, float] | None:
    """(nats per learned token of `line` less those of `other`, low, high): 95 % over rows drawn anew. None where they
    scored other rows, or one alone."""
    if line["learned"] != other["learned"] or len(line["learned"]) < 2:
        return None
    moved, tokens = np.subtract(line["nats"], other["nats"]), np.asarray(line["learned"])
    drawn = stats.bootstrap(
        (moved, tokens),
        lambda nats, count, axis=-1: nats.sum(axis) / count.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(moved.sum() / tokens.sum()), float(drawn.low), float(drawn.high)


def comparison_table(lines: Sequence[Line]) -> Table:
    """A row for each model, the pathway first."""
    pathway = next((line for line in lines if line["model"] == PATHWAY), None)
    body = []
    for line in lines:
        apart = None if pathway is None or line is pathway else difference(pathway, line)
        name = line["model"] if line["equal"] == "tokens" else f"{line['model']}, in equal time"
        body.append(
            [
                name,
                f"{line['steps']:,}",
                f"{line['tokens']:,}",
                f"{line['seconds']:,.0f}",
                f"{line['before']:.4f}",
                f"{mean_nats(line):.4f}",
                "" if apart is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*apart),
            ]
        )
    return Table("", ["model", "steps", "tokens", "seconds", "before", "after", "pathway less this"], body)


def section(folder: Path) -> str:
    """HTML of a comparison's folder for `lrt report`."""
    table = comparison_table(read_lines(folder))
    name = html.escape(folder.resolve().name)
    return f"<section><h2>{name}: a pathway and its controls</h2><p>{NOTE}</p>{table.html()}</section>"
