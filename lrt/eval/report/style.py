"""How every figure looks: a colour per family of models, the text's colour, and the file that it is saved as."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

GREY = "#8c8c8c"
"""Of the Transformer, which others are compared with, and of reference lines."""
FAMILIES = {
    "transformer": GREY,
    "token shift": "#e69f00",
    "lrt": "#0072b2",
    "loop": "#009e73",
    "ponder": "#d55e00",
    "chunked": "#56b4e9",
    "middle recurrence": "#cc79a7",
}
"""Family -> its colour in every figure: Okabe and Ito's, which colour-blind eyes tell apart, and grey."""
ALIASES = {"short convolution": "token shift", "control": "token shift"}
"""How names of other families begin, and whose colour they have: controls that read earlier embeddings."""
MARKERS = "osD^vPX<>*"
"""Of several models of one family."""
MIDTONE, BLACK = "#767b83", "#000000"
"""Text that is read on white and on GitHub's dark page alike, and text for paper."""
ENDINGS = {".svg": MIDTONE, ".png": MIDTONE, ".pdf": BLACK}
"""What a figure is saved as, by the ending of its file -> the colour of its text."""
DOTS_PER_INCH = 200
"""Of a PNG."""


def family_of(name: str) -> str:
    """The family that a model's name begins with; every other name is a variant of the LRT."""
    lower = name.lower().replace("_", " ")
    known = {**{family: family for family in FAMILIES}, **ALIASES}
    return next((known[start] for start in known if lower.startswith(start)), "lrt")


def colour_of(name: str) -> str:
    """The colour of a model by its name."""
    return FAMILIES[family_of(name)]


def markers_of(names: Sequence[str]) -> dict[str, str]:
    """A marker per name, another for each model of one family."""
    seen: dict[str, int] = {}
    markers = {}
    for name in names:
        family = family_of(name)
        markers[name] = MARKERS[seen.get(family, 0) % len(MARKERS)]
        seen[family] = seen.get(family, 0) + 1
    return markers


def run_colours(families: Mapping[str, str]) -> dict[str, str]:
    """A colour per run (name -> family): the first run of a family has the family's, further ones those left over."""
    left = [colour for family, colour in FAMILIES.items() if family not in families.values()]
    colours: dict[str, str] = {}
    for name, family in families.items():
        own = FAMILIES[family]
        colours[name] = own if own not in colours.values() or not left else left.pop(0)
    return colours


def figure_style(ink: str) -> dict[Any, Any]:
    """Settings of matplotlib: text and frames in one colour, no box, text as text, and the same ids each time."""
    inked = ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(inked, ink),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "axes.titlesize": 10,
        "font.size": 10,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "lrt",
    }


def check_figure(path: Path) -> None:
    """ValueError unless a figure can be saved as what its file's ending says."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"the figure's file is {path}; give one that ends in {', '.join(ENDINGS)}")


def save_figure(make: Callable[[], Figure], path: Path) -> None:
    """Draw into a file, transparent, as SVG, PNG or PDF by its ending. The same figure gives the same bytes.

    `make` is called within the style, which only then has an effect. ValueError for another ending.
    """
    check_figure(path)
    kind = path.suffix.lower()
    # No date and no version: else each call gives other bytes.
    unwanted = {".svg": "Date", ".png": "Software", ".pdf": "CreationDate"}
    with rc_context(figure_style(ENDINGS[kind])):
        make().savefig(path, format=kind[1:], transparent=True, dpi=DOTS_PER_INCH, metadata={unwanted[kind]: None})
