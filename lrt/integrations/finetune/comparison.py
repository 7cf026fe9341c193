"""What a retrofitted model and its controls came to: a table, and a section of `lrt report`. Loads no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from markupsafe import Markup
from scipy import stats

from lrt.eval.report.render import section as page_section
from lrt.eval.report.table import Table
from lrt.utils.json_lines import read_json_lines

FILE = "comparison.jsonl"
PATHWAY, SHIFT, PLAIN = "pathway", "token shift", "plain"
"""The model that was retrofitted, the same with the previous embedding alone, and without any pathway."""
Equal = Literal["tokens", "wall_clock"]
"""What a control shares with the pathway's training."""
NOTE = (
    "The same decoder, trained on the same rows. Nats per learned token of the held-out rows, live. Difference: the "
    "pathway's less this one's, with the interval of 95 % over rows; negative is better. In equal time a control has "
    "as many more steps as the pathway's step takes longer, and sees rows again where they are not enough."
)
BATCH = 100
"""Resamples that are drawn at a time: of many rows they would fill the memory."""


@dataclass(frozen=True)
class Outcome:
    """What one of the models came to."""

    model: str
    """PATHWAY, SHIFT or PLAIN."""
    equal: Equal
    steps: int
    tokens: int
    """Seen in training."""
    seconds: float
    before: float
    """Nats per learned token of the held-out rows, live, before training."""
    nats: tuple[float, ...]
    """After it, of each row in sum."""
    learned: tuple[int, ...]
    """Learned tokens of each row."""

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Outcome:
        """Of a line of FILE."""
        return cls(**{**fields, "nats": tuple(fields["nats"]), "learned": tuple(fields["learned"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @property
    def after(self) -> float:
        """Nats per learned token."""
        return sum(self.nats) / sum(self.learned)


def read_outcomes(folder: Path) -> list[Outcome]:
    """Those of a comparison's folder; none where there are none."""
    return [Outcome.from_dict(line) for line in read_json_lines(folder / FILE)]


def difference(one: Outcome, other: Outcome) -> tuple[float, float, float] | None:
    """(nats per learned token of `one` less those of `other`, low, high): 95 % over rows drawn anew. None where they
    scored other rows, or one alone."""
    if one.learned != other.learned or len(one.learned) < 2:
        return None
    moved, tokens = np.subtract(one.nats, other.nats), np.asarray(one.learned)
    ends = stats.bootstrap(
        (moved, tokens),
        lambda nats, count, axis=-1: nats.sum(axis) / count.sum(axis),
        paired=True,
        vectorized=True,
        batch=BATCH,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(moved.sum() / tokens.sum()), float(ends.low), float(ends.high)


def comparison_table(outcomes: Sequence[Outcome]) -> Table:
    """A row for each model, the pathway first; what all began with is the title."""
    pathway = next((outcome for outcome in outcomes if outcome.model == PATHWAY), None)
    body = []
    for outcome in outcomes:
        apart = None if pathway is None or outcome is pathway else difference(pathway, outcome)
        body.append(
            [
                outcome.model if outcome.equal == "tokens" else f"{outcome.model}, equal time",
                f"{outcome.steps:,}",
                f"{outcome.tokens:,}",
                f"{outcome.seconds:,.0f}",
                f"{outcome.after:.4f}",
                "" if apart is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*apart),
            ]
        )
    title = f"Nats per learned token, live; {outcomes[0].before:.4f} before training" if outcomes else ""
    return Table(title, ["model", "steps", "tokens", "seconds", "nats", "pathway less this"], body)


def section(folder: Path) -> Markup:
    """HTML of a comparison's folder for `lrt report`."""
    table = comparison_table(read_outcomes(folder)).html()
    (made,) = page_section(f"{folder.resolve().name}: a pathway and its controls", [NOTE], [table])
    return made
