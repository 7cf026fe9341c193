"""Results as people look at them: a table in the terminal and one self-contained HTML file. Reads JSON only."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#123456"  # stands for the page's text colour: replaced by currentColor, so that figures follow light and dark


def figure(draw: Callable[[Axes], None], title: str, wide: bool = True) -> str:
    """An inline SVG of what `draw` puts on an axis, in the page's own text colour."""

    def make() -> Figure:
        made = Figure(figsize=(6.4, 3.6 if wide else 2.6))
        draw(made.subplots())
        made.tight_layout()
        return made

    return inline(make, title)


def inline(make: Callable[[], Figure], title: str) -> str:
    """A figure as an inline SVG, in the page's own text colour: `make` draws it in the page's style."""
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


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """An HTML table of text cells."""
    titles = "".join(f"<th>{html.escape(t)}</th>" for t in head)
    lines = ["".join(f"<td>{html.escape(c)}</td>" for c in row) for row in body]
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table></div>'


def number(value: float | None) -> str:
    """Four places; nothing is less than nothing, and what is not known is a dash."""
    return "–" if value is None else f"{value:.4f}".replace("-0.0000", "0.0000")


def figure_row(*figures: tuple[Callable[..., None], str], caption: str) -> str:
    """Figures side by side, with one caption."""
    inside = "".join(f"<div>{figure(draw, title)}</div>" for draw, title in figures)
    return f'<figure><div class="pair">{inside}</div><figcaption>{html.escape(caption)}</figcaption></figure>'
