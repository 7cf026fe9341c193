"""The parts of a report's page: figures as inline SVG, and one HTML file that loads nothing."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#123456"
"""Stands for the page's text colour. The SVG says currentColor in its place, so that figures follow light and dark."""


def figure_svg(draw: Callable[[Axes], None], title: str, wide: bool = True) -> str:
    """An inline SVG of what `draw` puts on an axis, in the page's own text colour."""

    def make() -> Figure:
        figure = Figure(figsize=(6.4, 3.6 if wide else 2.6))
        draw(figure.subplots())
        figure.tight_layout()
        return figure

    return inline_svg(make, title)


def inline_svg(make: Callable[[], Figure], title: str) -> str:
    """A figure as an inline SVG. `make` is called within the page's style, which only then has an effect.

    The same figure gives the same bytes: ids come from a fixed salt, and no date is written.
    """
    style: dict[Any, Any] = {
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "svg.fonttype": "none",
        "svg.hashsalt": "lrt",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
        "legend.frameon": False,
        "axes.facecolor": "none",
    }
    with rc_context(style):
        out = io.StringIO()
        make().savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>lrt: report</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --back: #fdfdfb; --ink: #1d1d1b; --line: #d5d5d0; }
@media (prefers-color-scheme: dark) { :root { --back: #17181a; --ink: #e4e4e0; --line: #3c3d40; } }
body { background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto;
       max-width: 60rem; padding: 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; font-size: .9rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: pre; }
figure { margin: 1.5rem 0; } figcaption { font-size: .9rem; opacity: .8; }
svg { max-width: 100%; height: auto; }
pre { background: color-mix(in srgb, var(--ink) 6%, transparent); padding: 1rem; overflow-x: auto;
      white-space: pre-wrap; }
@media print { body { margin: 0; } details { display: none; } }
</style></head><body>
{body}
</body></html>
"""


def render_page(parts: Sequence[str], style: str = "") -> str:
    """The page that holds these parts; `style` goes into its head."""
    return PAGE.replace("</head>", style + "</head>").replace("{body}", "\n".join(parts))


def number(value: float | None) -> str:
    """Four places. What rounds to zero has no sign, and what is not known is a dash."""
    return "–" if value is None else f"{value:.4f}".replace("-0.0000", "0.0000")


def figure_row(*figures: tuple[Callable[[Axes], None], str], caption: str) -> str:
    """Figures side by side, each a function that draws it and its title, with one caption."""
    inside = "".join(f"<div>{figure_svg(draw, title)}</div>" for draw, title in figures)
    return f'<figure><div class="pair">{inside}</div><figcaption>{html.escape(caption)}</figcaption></figure>'
