"""Draw the figures of docs/concepts.md: `python docs/draw_concepts.py RUN DATA FOLDER`.

RUN is a trained LRT, DATA the folder that it was trained on. Every figure is computed, none is drawn by hand: passes
come from the schedules, distances from the model on one window of held-out text. T positions, D width.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from torch import Tensor

import lrt
from lrt.data.prepared import Prepared
from lrt.data.windows import windows
from lrt.schedules.base import Schedule

INK = "#6e7781"
"""Of text and lines: readable on white and on black."""
BLUE, PALE, ORANGE = "#0072b2", "#a6cee3", "#e69f00"
"""Told apart by colour-blind eyes."""
STYLE = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "font.size": 10,
    "svg.hashsalt": "lrt",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.framealpha": 0,
}
SHOWN = 12
"""Positions of a drawn schedule."""
SWEEPS = 12
"""Sweeps of the drawn convergence."""


def drawn_schedules() -> dict[str, Schedule]:
    """What is drawn, by how it is written."""
    names = ("plain()", "interleaved(2)", "settled(1, 1, 1)", "chunked(4)", "strided(4, 1)")
    return {name: eval(name, dict(vars(lrt.schedules))) for name in names}


def draw_passes(ax: Axes, name: str, schedule: Schedule) -> None:
    """A row per pass: pale is computed without loss or gradient, blue with both."""
    passes = schedule.passes(SHOWN)
    for row, p in enumerate(passes):
        for t in range(SHOWN):
            fill = "none" if t not in p.positions else BLUE if p.loss_weight else PALE
            ax.add_patch(
                plt.Rectangle((t + 0.06, row + 0.06), 0.88, 0.88, facecolor=fill, edgecolor=INK, linewidth=0.6)
            )
    ax.set(xlim=(0, SHOWN), ylim=(len(passes), 0), aspect="equal", xticks=[], yticks=[])
    ax.set_title(name, fontsize=10, family="monospace", loc="left")
    ax.set_frame_on(False)


def draw_schedules() -> None:
    """All of them below each other, as high as they have passes."""
    shown = drawn_schedules()
    heights = [len(schedule.passes(SHOWN)) for schedule in shown.values()]
    _, axes = plt.subplots(
        len(shown), 1, figsize=(5, 0.38 * sum(heights) + 2), height_ratios=heights, gridspec_kw={"hspace": 0.6}
    )
    for ax, (name, schedule) in zip(axes, shown.items(), strict=True):
        draw_passes(ax, name, schedule)
    axes[-1].set_xlabel("positions of the text →")


def after_sweeps(model: lrt.LatentRecurrentTransformer, tokens: Tensor) -> list[Tensor]:
    """Hidden states (T, D) after a plain pass and 0, 1, 2, … full sweeps."""
    with torch.no_grad():
        return [lrt.refine(model, tokens, lrt.schedules.multi_refinement(n)).hidden[0] for n in range(SWEEPS)]


def relative(a: Tensor, b: Tensor) -> np.ndarray:
    """(T,) the distance of a's rows from b's, over the size of b's."""
    return ((a - b).norm(dim=-1) / b.norm(dim=-1)).numpy()


def draw_sweeps(ax: Axes, swept: list[Tensor], live: Tensor) -> None:
    """The distance from live at each position, sweep by sweep."""
    image = np.stack([relative(h, live) for h in swept]).clip(1e-7)
    shown = ax.imshow(image[:, :64], aspect="auto", norm=LogNorm(1e-6, 1), cmap="cividis", interpolation="nearest")
    ax.set(xlabel="position", ylabel="sweeps behind the first pass", yticks=range(0, SWEEPS, 2))
    bar = plt.colorbar(shown, ax=ax)
    bar.set_label("distance from live")
    bar.outline.set_edgecolor(INK)


def draw_certificate(ax: Axes, swept: list[Tensor], live: Tensor) -> None:
    """What a prefill can see (the last move) beside what it cannot (the distance)."""
    moves = [float((b - a).norm() / b.norm()) for a, b in pairwise(swept)]
    away = [float((h - live).norm() / live.norm()) for h in swept]
    ax.semilogy(range(1, SWEEPS), moves, color=BLUE, marker="o", label="the sweep's move: measured in a prefill")
    ax.semilogy(range(SWEEPS), away, color=ORANGE, marker="s", label="the distance from live: not known there")
    ax.axhline(1e-5, color=INK, linestyle=":", linewidth=1)
    ax.annotate("converged: 1e-5", (0, 1.4e-5))
    ax.set(xlabel="sweeps behind the first pass", ylabel="over the size of the state")
    ax.legend()


def draw_gap(ax: Axes, model: lrt.LatentRecurrentTransformer, tokens: Tensor) -> None:
    """The loss after n sweeps beside the live one."""
    targets = tokens[0, 1:]
    with torch.no_grad():
        losses = [
            float(torch.nn.functional.cross_entropy(model.logits(h[None])[0, :-1].float(), targets))
            for h in after_sweeps(model, tokens)
        ]
    live = float(lrt.score(model, tokens).mean())
    ax.plot(losses, color=BLUE, marker="o", label="in parallel, by sweeps")
    ax.axhline(live, color=ORANGE, label="live")
    ax.set(xlabel="sweeps behind the first pass", ylabel="nats per token (lower is better)")
    ax.legend()


def save(folder: Path, name: str) -> None:
    """The current figure as FOLDER/concept-NAME.svg, the same bytes each time."""
    plt.savefig(folder / f"concept-{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close()


def main(run: Path, data: Path, folder: Path) -> None:
    """Draw all of them."""
    model, _ = lrt.load(run)
    model.eval()
    whole = next(windows(Prepared.open(data).split("val"), model.config.context, 1).batches(1)).tokens
    with torch.no_grad():
        live = lrt.refine(model, whole, lrt.schedules.sequential()).hidden[0]
    swept = after_sweeps(model, whole)
    with plt.rc_context(STYLE):
        draw_schedules()
        save(folder, "schedules")
        for name, draw in (("sweeps", draw_sweeps), ("certificate", draw_certificate)):
            draw(plt.subplots(figsize=(6.4, 3.2))[1], swept, live)
            save(folder, name)
        draw_gap(plt.subplots(figsize=(6.4, 3.2))[1], model, whole)
        save(folder, "gap")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
