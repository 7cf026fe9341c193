"""Draw a text, each token on the colour of what recurrence gained: `python docs/draw_text_gain.py RUN DATA FILE.svg`.

RUN is a trained LRT, DATA the folder that it was trained on. The text is the beginning of the first document of its
validation split. Every token stands on a light box of its own, so that the picture can be read on a light page and on a
dark one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch

import lrt
from lrt.data.prepared import Prepared
from lrt.model.cross_entropy import token_nats

CHARACTER, LINE, SIZE = 7.8, 20, 13
"""Width of a character, height of a line and size of the font, in pixels."""
COLUMNS, LINES = 80, 16
"""Characters of a line, and lines that are drawn."""
STRONGEST = 2.0
"""Bits from which on the colour gets no stronger."""
NEUTRAL, GAIN, LOSS = (244, 246, 248), (86, 180, 233), (230, 159, 0)
"""Sky blue and orange of Okabe and Ito: told apart by colour-blind eyes."""


class Chip(NamedTuple):
    """A piece of a token that lies within one line."""

    text: str
    row: int
    column: int
    gain: float
    """Bits that recurrence gained on the token."""


def chips(pieces: list[str], gains: list[float]) -> Iterator[Chip]:
    """The text cut at the ends of its lines, from where its first line begins."""
    row = column = 0
    for piece, gain in zip(pieces, gains, strict=True):
        for number, part in enumerate(piece.replace("\t", "    ").split("\n")):
            if number:
                row, column = row + 1, 0
            if column + len(part) > COLUMNS:
                row, column = row + 1, 0
            if part:
                yield Chip(part, row, column, gain)
            column += len(part)


def colour(gain: float) -> str:
    """Of a box: from neutral to the colour of a gain or a loss."""
    end, strength = (GAIN if gain > 0 else LOSS), min(1.0, abs(gain) / STRONGEST)
    mixed = (round(a + (b - a) * strength) for a, b in zip(NEUTRAL, end, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def box(chip: Chip) -> str:
    """A token's box and its text, stretched to the box whatever the reader's font is."""
    x, y, width = chip.column * CHARACTER, chip.row * LINE, len(chip.text) * CHARACTER
    shape = f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LINE - 2}" fill="{colour(chip.gain)}"/>'
    if chip.text.isspace():
        return shape
    text = f'<text x="{x:.1f}" y="{y + 13}" textLength="{width:.1f}" xml:space="preserve">{escape(chip.text)}</text>'
    return shape + text


def draw(pieces: list[str], gains: list[float]) -> str:
    """An SVG of the first lines of a text."""
    drawn = [chip for chip in chips(pieces, gains) if chip.row < LINES]
    height = (max(chip.row for chip in drawn) + 1) * LINE
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {COLUMNS * CHARACTER:.0f} {height}" font-size="{SIZE}" '
        'font-family="ui-monospace, Menlo, Consolas, monospace" fill="#1f2328" role="img" '
        'aria-label="A text, each token coloured by the bits that recurrence gained on it">'
    )
    return "\n".join([head, *map(box, drawn), "</svg>\n"])


def measure(run: Path, data: Path) -> tuple[list[str], list[float]]:
    """The text's tokens, and the bits that each costs less live than in one pass in which nothing recurs."""
    (model, tokenizer), split = lrt.load(run), Prepared.open(data).split("val")
    ids = [int(token) for token in split.tokens[: min(model.config.context - 1, split.offsets[1])]]
    tokens = torch.tensor([[tokenizer.bos, *ids]])
    with torch.no_grad():
        hidden = lrt.refine(model, tokens[:, :-1], lrt.schedules.plain()).hidden
        off = token_nats(model, hidden, tokens[:, 1:])
    gains = (off - lrt.score(model, tokens)) / math.log(2)
    return [tokenizer.decode([token]) for token in ids], gains[0].tolist()


def main(run: Path, data: Path, out: Path) -> None:
    """Measure and draw."""
    out.write_text(draw(*measure(run, data)), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
