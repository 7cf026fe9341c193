"""What results say, in a sentence: first in each section of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lrt.eval.results import Result
from lrt.eval.runs import Run, ScoredOn

NEGLIGIBLE = 1e-6
"""Bits per byte: smaller differences are rounding."""
ROUNDING = 0.01
"""Bits by which scores of a token differ at most where nothing recurs."""
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
    if "live_bpb_memory_zero" not in values:
        return f"{name} has no memory to replace."
    return f"Without its memory {name} is {without_memory(values)}, in bits per byte."


def without_memory(values: Mapping[str, Any]) -> str:
    """How much worse, or better, a run is with its memory zeroed."""
    live, zeroed = values["live_bpb"], values["live_bpb_memory_zero"]
    return f"{difference_text(abs(zeroed - live), live)} {'worse' if zeroed >= live else 'better'}"


def scored(name: str, values: Mapping[str, Any]) -> str:
    """Live bits per byte, what training sees beside it, and what the memory is worth."""
    parts = [f"{name} has {values['live_bpb']:.4f} bits per byte, live"]
    if (gap := values.get("gap")) is not None:
        apart = f"{abs(gap):.4f}"
        order = f"{apart} {'more' if gap > 0 else 'less'} than in parallel"
        parts.append("the same in parallel" if float(apart) == 0 else order)
    if "live_bpb_memory_zero" in values:
        parts.append(f"without its memory {without_memory(values)}")
    return "; ".join(parts) + "."


def rounded(name: str, values: Mapping[str, Any]) -> str:
    """What bfloat16 costs: by its arithmetic, and by errors that go round the recurrence."""
    control, live = (row["bpb"] for row in values["differences"].values())
    return (
        f"bfloat16 costs {name} {control + live:+.4f} bits per byte, live: {control:+.4f} by its arithmetic, "
        f"{live:+.4f} by errors that go round the recurrence."
    )


def survived(name: str, values: Mapping[str, Any]) -> str:
    """The verdict of a curve of hops."""
    return f"{name}: {values['verdict']}."


def helped(name: str, values: Mapping[str, Any]) -> str:
    """How many tokens of the text recurrence makes likelier, and what it gives a token on average, of all of them."""
    gains = [off - live for off, live in zip(values["off"], values["live"], strict=True)]
    if max(map(abs, gains)) < ROUNDING:
        return f"Nothing recurs in {name}: live and off are one."
    part = sum(gain > 0 for gain in gains) / len(gains)
    return (
        f"Recurrence makes {100 * part:.0f} % of the tokens likelier to {name}; on average a token gains "
        f"{mean_of(gains):+.3f} bits."
    )


def mean_of(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def settled(name: str, values: Mapping[str, Any]) -> str:
    """The verdict of a sweep curve, with what 64 refinements come to."""
    points = values["curves"].get("1") or values["curves"][1]
    last = points[-1]
    return f"{name}: {values['verdict']}; {last['refinements']} refinements give {last['bpb']:.4f} bits per byte."


def reach(name: str, points: Sequence[Mapping[str, Any]]) -> str:
    """How many tokens back a memory moves the next token at least FELT as much as the newest one does."""
    tokens = tokens_back(points)
    if tokens is None:
        return f"No memory of {name} moves its next token."
    return f"The memory of {name} reaches {tokens} back: older ones move the next token less than a hundredth as much."


def tokens_back(points: Sequence[Mapping[str, Any]]) -> str | None:
    """How far a memory reaches, in words; None where it moves nothing."""
    if not points or points[0]["kl"] <= 0:
        return None
    farthest = max(point["back"] for point in points if point["kl"] >= FELT * points[0]["kl"])
    return "1 token" if farthest == 1 else f"{farthest} tokens"


def core_sentence(name: str, values: Mapping[str, Any]) -> str:
    """CORE of a run under true recurrence."""
    score = values["score"][values["modes"][0]]
    return f"{name} has {score:+.4f} on {values['name']}; 0 is chance, 1 is all right."


def readable(name: str, values: Mapping[str, Any]) -> str:
    """How much of the state a linear probe reads, beside chance and what the token's own embedding gives."""
    accuracy, best = values["accuracy"], values["source"]
    control = next(iter(accuracy))  # the token's embedding comes first
    return (
        f"From the {best} of {name} a linear probe reads {share_text(accuracy[best])} of the state of "
        f"{values['state']} right after every token; the {control} gives {share_text(accuracy[control])}, chance is "
        f"{share_text(values['chance'])}."
    )


def share_text(part: float) -> str:
    return f"{100 * part:.1f} %"


SENTENCES: dict[str, Callable[[str, Mapping[str, Any]], str]] = {
    "scores": scored,
    "bpb": worth,
    "bfloat16": rounded,
    "sweeps": settled,
    "hops": survived,
    "ablations": replaced,
    "memory": lambda name, values: reach(name, values["reach"]),
    "text": helped,
    "probe": readable,
    "core": core_sentence,
}
"""Kind of result -> (a run's name, its values) in a sentence."""


def sentence(name: str, result: Result) -> str:
    """What a result of any kind says of a run."""
    return SENTENCES[result.kind](name, result.values)


def in_short(name: str, results: Sequence[Result]) -> str | None:
    """What recurrence is worth to a run, whether it is stable, and how far it reaches, as far as these were measured.

    None where fewer than two of them were: then `sentence` says as much.
    """
    values = {result.kind: result.values for result in results}
    parts = []
    if "bpb" in values:
        parts.append(worth(name, values["bpb"]).removesuffix("."))
    if "sweeps" in values:
        parts.append(values["sweeps"]["verdict"])
    if "memory" in values and (tokens := tokens_back(values["memory"]["reach"])) is not None:
        parts.append(f"it reaches {tokens} back")
    return "; ".join(parts) + "." if len(parts) > 1 else None
