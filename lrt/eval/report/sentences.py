"""What results say, in a sentence: first in each section of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lrt.eval.report.text import ROUNDING
from lrt.eval.runs import Run, ScoredOn

NEGLIGIBLE = 1e-6
"""Bits per byte: smaller differences are rounding."""
FELT = 0.01
"""Of the newest memory's effect: below it an older one is not said to reach. `reach` says it in words."""


def ranking(runs: Sequence[Run], texts: Mapping[ScoredOn, str]) -> list[str]:
    """Of each text, which run is best live, and how far behind the others are."""
    sentences = []
    for on, label in texts.items():
        live = {run.name: score.values["live_bpb"] for run in runs for score in run.scores if is_live(score, on)}
        if live:
            sentences.append(ranking_sentence(live, label))
    return sentences


def is_live(score: Any, on: ScoredOn) -> bool:
    """Whether a score is of this text, and has a live one."""
    return score.on == on and "live_bpb" in score.values


def ranking_sentence(live: Mapping[str, float], label: str) -> str:
    """The best of live scores, and each other's distance to it."""
    best, *others = sorted(live, key=live.__getitem__)
    start = f"{best} has {live[best]:.4f} live bits per byte" + (", the best" if others else "")
    behind = [f"{name} is {difference_text(live[name] - live[best], live[best])} behind" for name in others]
    return f"{'; '.join([start, *behind])} ({label})."


def difference_text(bpb: float, base: float) -> str:
    """Bits per byte, and per cent of a base."""
    return f"{bpb:.4f} ({100 * bpb / base:.1f} %)"


def losses(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The mean loss of the last twentieth of each run."""
    ends = {name: [line["loss"] for line in lines[-max(1, len(lines) // 20) :]] for name, lines in curves.items()}
    means = ", ".join(f"{name} {math.fsum(values) / len(values):.3f}" for name, values in ends.items())
    return [f"Training loss at the end, in nats per token: {means}. Schedules weigh passes differently."]


def worth(name: str, values: Mapping[str, Any]) -> str:
    """What recurrence is worth to a run: bits per byte that it loses with nothing recurrent read."""
    row = values["differences"]["off - live"]
    if abs(row["bpb"]) <= NEGLIGIBLE:
        return f"Nothing recurs in {name}."
    verb = "is worth" if row["bpb"] > 0 else "costs"
    sure = ""
    if row["low"] is not None:
        excludes = "excludes" if row["low"] > 0 or row["high"] < 0 else "holds"
        sure = f"; the 95 % interval {excludes} zero"
    return f"Recurrence {verb} {abs(row['bpb']):.4f} bits per byte to {name}{sure}."


def replaced(name: str, values: Mapping[str, Any]) -> str:
    """What a run loses where its memory is zeroed."""
    live, zeroed = values["live_bpb"], values.get("live_bpb_memory_zero")
    if zeroed is None:
        return f"{name} has no memory to replace."
    change = "worse" if zeroed >= live else "better"
    return f"Without its memory {name} is {difference_text(abs(zeroed - live), live)} {change}, in bits per byte."


def helped(name: str, values: Mapping[str, Any]) -> str:
    """How many tokens of the text recurrence makes likelier."""
    gains = [off - live for off, live in zip(values["off"], values["live"], strict=True)]
    if max(map(abs, gains)) < ROUNDING:
        return f"Nothing recurs in {name}: live and off are one."
    part = sum(gain > 0 for gain in gains) / len(gains)
    return f"Recurrence makes {100 * part:.0f} % of the tokens likelier to {name}, by {mean_of(gains):+.3f} bits each."


def mean_of(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def settled(name: str, values: Mapping[str, Any]) -> str:
    """The verdict of a sweep curve, with what 64 refinements come to."""
    points = values["curves"].get("1") or values["curves"][1]
    last = points[-1]
    return f"{name}: {values['verdict']}; {last['refinements']} refinements give {last['bpb']:.4f} bits per byte."


def reach(name: str, points: Sequence[Mapping[str, Any]]) -> str:
    """How many tokens back a memory moves the next token at least FELT as much as the newest one does."""
    newest = points[0]["kl"]
    if newest <= 0:
        return f"No memory of {name} moves its next token."
    farthest = max(point["back"] for point in points if point["kl"] >= FELT * newest)
    tokens = "1 token" if farthest == 1 else f"{farthest} tokens"
    return f"The memory of {name} reaches {tokens} back: older ones move the next token less than a hundredth as much."


def core_sentence(run: Run) -> str:
    """CORE of a run under true recurrence."""
    core = run.values("core")
    return f"{run.name} has {core['score'][core['modes'][0]]:+.4f} on {core['name']}; 0 is chance, 1 is all right."
