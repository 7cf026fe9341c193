"""Which schedule reaches how far, at what cost, and what state it teaches: the figure of docs/state-tracking.md.

    OMP_NUM_THREADS=1 python benchmarks/choosing.py --figure docs/choosing.svg

Left, of a random model of 2 layers whose windows hold 4 positions, in float64: how many positions from the start of a
row are exact, how many positions on a changed token is felt, and the training FLOPs over plain's. Right: the study's
recipe for parity under four of them, one seed, cut to 150 steps of 64 rows of at most 16 bits, and the loss of the
trained models on fresh rows of 64 bits where the memory holds what n hops brought (`lrt.eval.hops`). Prints both; a few
minutes of one core.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lrt import LatentRecurrentTransformer, ModelConfig, refine, schedules
from lrt.eval.hops import HopCurve, hops_of_rows
from lrt.eval.report.style import GREY, MARKERS, save_figure
from lrt.experiments.state_tracking.measure import held_out_generator, sample_rows
from lrt.experiments.state_tracking.training import train_tracking
from lrt.experiments.studies.state_tracking import recipe
from lrt.schedules.flops import training_flops

MODEL = ModelConfig(depth=2, width=16, heads=2, vocab_size=7, context=64, window_pattern="S", window=4)
LENGTH = 60
"""Positions of the rows on which reach is measured: longer than any reach but the whole row's."""
SAME, CHANGED = 1e-10, 1e-13
"""Differences of hidden states below which they are exact, and above which a token is felt."""
REACHING = (
    *("plain()", "multi_refinement(1)", "interleaved(2)", "settled(1, 1, 1)", "multi_refinement(3)"),
    *("strided(8, 2)", "settled(1, 8, 1)", "strided(16, 2)", "sequential()"),
)
"""The rows of the table, in its order."""
TRAINED = {
    "interleaved(2)": "interleaved(2)",
    "multi_refinement(3)": "multi_refinement(3)",
    "settled(1, 8, 1)": "settled(1, 8, 1), rows of 16",
    "sequential()": "sequential",
}
"""Schedule -> the study's model."""
SHORT = {"steps": 150, "rows": 64, "longest": 16}
"""What the recipe is cut to, so that a model takes half a minute."""
ROWS, BITS = 100, 64
BLUES = ("#8ec6ec", "#3f9fd8", "#0072b2", "#00548a")
"""All of them train the LRT, whose colour is blue: the further a schedule reaches, the darker."""


class Reach(NamedTuple):
    """How far a schedule carries a state, and its cost."""

    exact: int
    """Positions from the start of a row."""
    felt: int
    """Positions that a changed token moves, at most."""
    cost: float
    """Training FLOPs over those of `plain()`."""


@torch.no_grad()
def measure_reach(schedule: str) -> Reach:
    """Of a random model: no exact equality is by chance, and no parameter is at zero."""
    torch.manual_seed(0)
    model = LatentRecurrentTransformer(MODEL).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(MODEL.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    run = schedules.parse(schedule)
    hidden = refine(model, tokens, run).hidden
    off = (hidden - refine(model, tokens, schedules.sequential()).hidden).abs().amax(-1)[0]
    places = torch.arange(LENGTH // 3)
    others = tokens.repeat(len(places), 1)  # a row for each place, with another token there
    others[places, places] = (others[places, places] + 1) % MODEL.vocab_size
    moved = (refine(model, others, run).hidden - hidden).abs().amax(-1) > CHANGED
    felt = max(int(row.nonzero().max()) - place for place, row in enumerate(moved))
    cost = training_flops(MODEL, run, LENGTH) / training_flops(MODEL, schedules.plain(), LENGTH)
    return Reach(int((off < SAME).long().cumprod(0).sum()), felt, cost)


def measure_hops(name: str, seed: int = 0) -> HopCurve:
    """Train the study's model `name` on parity, and measure it on fresh rows."""
    run = dataclasses.replace(recipe("parity", name), seed=seed, **SHORT)
    model = train_tracking(run).model
    generator = held_out_generator("hops", run.source.name, BITS, seed)
    return hops_of_rows(model, *sample_rows(model, run.source, ROWS, BITS, generator))


def draw_reach(ax: Axes, reach: Mapping[str, Reach], colours: Mapping[str, str]) -> None:
    """A bar per schedule, the cheapest way to each reach at a glance: dark exact, light felt, and the cost beside."""
    for place, (name, one) in enumerate(reach.items()):
        colour = colours.get(name, GREY)
        ax.barh(place, one.felt, 0.72, color=colour, alpha=0.3)
        ax.barh(place, one.exact, 0.36, color=colour)
        whole = one.exact == LENGTH
        label = f"× {one.cost:.1f}" + (", one token after another" if whole else "")
        ax.text(1.08, place, label, va="center", fontsize=8, transform=ax.get_yaxis_transform())
    ax.set_yticks(range(len(reach)), list(reach))
    ax.invert_yaxis()
    ticks = [1, 2, 4, 8, 16, 32]
    ax.set(xscale="log", xlim=(0.8, LENGTH))
    ax.set_xticks([*ticks, LENGTH], [*map(str, ticks), "all"])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("positions: exact (dark), felt (light)")


def draw_losses(ax: Axes, curves: Mapping[str, HopCurve], colours: Mapping[str, str]) -> None:
    """Nats per token by hops of the trained models; the dotted line is guessing."""
    for marker, (name, curve) in zip(MARKERS, curves.items(), strict=False):
        losses = [(point.hops, point.nats) for point in curve.points]
        ax.plot(
            *zip(*losses, strict=True), f"{marker}-", color=colours[name], markersize=3, label=f"{name}: {live(curve)}"
        )
    ax.axhline(torch.tensor(2.0).log().item(), color=GREY, linewidth=0.8, linestyle=":")
    ticks = [0, 1, 2, 4, 8, 16, 32, BITS - 1]
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xticks(ticks, list(map(str, ticks)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(-0.2, 1.2 * BITS)
    ax.set(xlabel="hops that the memory has made (63: live)", ylabel="nats per answer")
    ax.legend(fontsize=8)


def live(curve: HopCurve) -> str:
    """What a legend says of a trained model."""
    return f"live {curve.live:.2f}"


def make_figure(reach: Mapping[str, Reach], curves: Mapping[str, HopCurve]) -> Figure:
    """Reach and cost of schedules, and the losses of what four of them taught."""
    colours = dict(zip(TRAINED, BLUES, strict=True))
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    draw_reach(left, reach, colours)
    left.set_title("How far a schedule carries a state, at what training FLOPs (plain = 1)", fontsize=9)
    draw_losses(right, curves, colours)
    right.set_title("Parity of 64 bits: what four of them taught", fontsize=9)
    return figure


def main(figure: Path = Path("choosing.svg"), only: Sequence[str] = tuple(TRAINED)) -> None:
    """Measure, print and draw. `only`: the schedules to train under."""
    reach = {name: measure_reach(name) for name in REACHING}
    for name, one in reach.items():
        print(f"{name:22} exact {one.exact:3} felt {one.felt:3} costs {one.cost:.2f}", flush=True)
    curves = {}
    for name in only:
        curves[name] = measure_hops(TRAINED[name])
        losses = "  ".join(f"{point.hops}: {point.nats:.3f}" for point in curves[name].points)
        print(f"{name:22} {losses}  {curves[name].verdict}", flush=True)
    save_figure(lambda: make_figure(reach, curves), figure)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
