"""Figures as inline SVG, alone and side by side, for pages that load nothing."""

from __future__ import annotations

import html
import io
from collections.abc import Callable

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lrt.eval.report.render import render
from lrt.eval.report.style import figure_style

INK = "#123456"
"""Stands for the page's text colour. The SVG says currentColor in its place, so that figures follow light and dark."""
Draw = Callable[[Axes], None]


def figure_svg(draw: Draw, title: str, height: float = 3.6) -> Markup:
    """An inline SVG of what `draw` puts on an axis, in the page's own text colour, `height` inches high."""

    def make() -> Figure:
        figure = Figure(figsize=(6.4, height), layout="constrained")
        draw(figure.subplots())
        return figure

    return inline_svg(make, title)


def inline_svg(make: Callable[[], Figure], title: str) -> Markup:
    """A figure as an inline SVG. `make` is called within the page's style, which only then has an effect.

    The same figure gives the same bytes: ids come from a fixed salt, and no date is written.
    """
    out = io.StringIO()
    with rc_context(figure_style(INK)):
        make().savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1))


def figure_row(*figures: tuple[Draw, str], caption: str = "", height: float = 3.6) -> Markup:
    """Figures side by side, each a function that draws it and its title, with one caption."""
    return render("figures", figures=[figure_svg(draw, title, height) for draw, title in figures], caption=caption)
