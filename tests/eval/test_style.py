"""Figures: a colour per family wherever it is drawn, and a file by its ending."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from support.page import pixels

from lrt.eval.report import style
from lrt.experiments.rivals import rivals

LIGHT, DARK = (1.0, 1.0, 1.0), to_rgb("#0d1117")
"""GitHub's pages."""


def luminance(colour: tuple[float, float, float]) -> float:
    """Relative luminance of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_is_read_on_white_and_on_a_dark_page():
    for page in (LIGHT, DARK):
        assert contrast(to_rgb(style.MIDTONE), page) > 4
    for colour in style.FAMILIES.values():
        assert all(contrast(to_rgb(colour), page) > 2 for page in (LIGHT, DARK))


def test_families_have_colours_of_their_own():
    assert len(set(style.FAMILIES.values())) == len(style.FAMILIES)
    for one, other in combinations(map(to_rgb, style.FAMILIES.values()), 2):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.2


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("transformer, rows of 512", "transformer"),
        ("token_shift", "token shift"),
        ("Token shift, 2 channels, layerwise", "token shift"),
        ("short convolution, width 4", "token shift"),
        ("loop 3", "loop"),
        ("chunked 64", "chunked"),
        ("settled(1, 8, 1)", "lrt"),
        ("recommended", "lrt"),
    ],
)
def test_a_name_says_its_family(name: str, family: str):
    assert style.family_of(name) == family
    assert style.colour_of(name) == style.FAMILIES[family]


def test_of_the_rivals_only_its_own_variants_look_like_the_lrt():
    own = {"shared", "layerwise", "recommended, shared", "recommended", "late"}
    assert {name for name in rivals(4) if style.family_of(name) == "lrt"} == own


def test_runs_of_one_family_differ():
    colours = style.run_colours({"a": "lrt", "b": "lrt", "plain": "transformer", "c": "lrt"})
    assert colours["a"] == style.FAMILIES["lrt"]
    assert colours["plain"] == style.FAMILIES["transformer"]
    assert len(set(colours.values())) == 4


def test_models_of_one_family_have_markers_of_their_own():
    markers = style.markers_of(["loop 2", "loop 3", "transformer"])
    assert markers["loop 2"] == markers["transformer"] != markers["loop 3"]


def make_figure() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().set_title("a title")
    return figure


def test_a_figure_is_saved_as_its_ending_says(tmp_path: Path):
    for name in ("a.svg", "b.SVG", "a.png", "a.pdf", "b.pdf"):
        style.save_figure(make_figure, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.SVG").read_text()
    assert ">a title</text>" in text
    assert style.MIDTONE in text
    assert pixels(tmp_path / "a.png")[:2] == (400, 200)
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()
    for name in ("a.jpeg", "a"):
        with pytest.raises(ValueError, match=r"give one that ends in \.svg, \.png, \.pdf"):
            style.save_figure(make_figure, tmp_path / name)
        assert not (tmp_path / name).exists()
