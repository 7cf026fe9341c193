"""Measure, in some seconds, how a model is best prefilled here: which stride, how many sweeps, what a call costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lrt.inference.cost_model import Calibration, Plan, device_name
from lrt.inference.prefill import TOLERANCES, tolerance
from lrt.inference.sweeps import Prompt, SweepState
from lrt.model.fingerprint import fingerprint
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.utils.progress import bar

STRIDES = (4, 8, 16, 32)
LENGTH = 512
"""Tokens of the measured prompt, where the context has room for them."""
LONGEST = 16
"""A stride that has not converged after so many sweeps is passed over."""
PAIRS = 5
"""Times are ratios of calls made in turn, which a busy machine slows alike; of several, the median."""
STEPS = 32
"""Tokens decoded one after another to time a call with one position: in a row, as what the caches hold matters."""


def own_text(model: LatentRecurrentTransformer, first: int, length: int, seed: int = 0) -> Tensor:
    """Tokens (1, length) that the model itself continues `first` with: a typical prompt, without any data."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([[first]], device=model.embedding.weight.device)
    with torch.no_grad():
        state, drawn = model.empty_state(1, length).in_place(), [tokens]
        for t in range(length - 1):
            hidden, state = model(drawn[-1], range(t, t + 1), state)
            chances = model.logits(hidden[:, -1]).float().softmax(-1).cpu()
            drawn.append(torch.multinomial(chances, 1, generator=generator).to(tokens))
    return torch.cat(drawn, 1)


def calibrate(model: LatentRecurrentTransformer, tokens: Tensor, progress: bool = True) -> Calibration:
    """The calibration of a model on its device, measured with one prompt (1, T): `own_text`, or text like yours."""
    if tokens.dim() != 2 or tokens.shape[0] != 1 or tokens.shape[1] < 2 * STRIDES[0]:
        raise ValueError(
            f"the prompt has shape {tuple(tokens.shape)}; give one row of at least {2 * STRIDES[0]} tokens"
        )
    if len(model.config.stored_sources) == 0:
        raise ValueError(
            "nothing recurs in this model, so that there is nothing to calibrate: it is prefilled in one forward"
        )
    length, device = tokens.shape[1], tokens.device
    strides = [g for g in STRIDES if 2 * g <= length]
    costs: dict[str, dict[Plan, float]] = {mode: {} for mode in TOLERANCES}
    with torch.no_grad(), bar("calibrating", len(strides) + 1, progress) as tell:
        overhead = call_overhead(model, tokens)
        tell(1)
        for groups in strides:
            taken, ratio = sweeps_taken(model, tokens, groups)
            for mode, sweeps in taken.items():
                costs[mode][Plan(groups, sweeps)] = sweeps * ratio
            tell(1, f"stride {groups}")
    # What did not converge takes as many sweeps as make everything exact: token by token is then cheaper.
    never = Plan(16, max(1, length // 16))
    plans = {mode: min(found, key=found.__getitem__, default=never) for mode, found in costs.items()}
    return Calibration(overhead, plans, device_name(device), fingerprint(model))


def call_overhead(model: LatentRecurrentTransformer, tokens: Tensor) -> float:
    """The fixed cost of a call, in positions: from the times of calls with one position and of one with all."""
    length = tokens.shape[1]
    steps = min(STEPS, length)
    _, state = model(tokens, range(length), model.empty_state(1, length).in_place())

    def one_by_one() -> None:
        current = state
        for t in range(length - steps, length):
            _, current = model(tokens[:, t : t + 1], range(t, t + 1), current)

    def at_once() -> None:
        model(tokens, range(length), state)

    # Per position: single = overhead + 1, whole = overhead / length + 1; their ratio q gives the overhead.
    q = statistics.median(seconds(one_by_one, tokens) / seconds(at_once, tokens) for _ in range(PAIRS)) * length / steps
    return max(0.0, length * (q - 1) / max(1.0, length - q))


def sweeps_taken(model: LatentRecurrentTransformer, tokens: Tensor, groups: int) -> tuple[dict[str, int], float]:
    """(sweeps until each mode has converged, those that do; the time of a sweep over that of a plain forward)."""
    length = tokens.shape[1]
    state = model.empty_state(1, length, tokens=tokens).in_place()
    flight = SweepState.of(model, Prompt(tokens, [length], [0]), state)
    other = model.empty_state(1, length).in_place()
    limits = {mode: tolerance(mode, model) for mode in TOLERANCES}
    taken: dict[str, int] = {}
    ratios: list[float] = []
    for sweep in range(1, min(LONGEST, length // groups) + 1):
        spent = seconds(lambda: flight.sweep(model, groups, 0), tokens)
        ratios.append(spent / seconds(lambda: model(tokens, range(length), other), tokens))
        ((residual,), _, _) = flight.measure()
        if sweep > 1:
            reached = [mode for mode, limit in limits.items() if limit is not None and residual <= limit]
            taken = {**dict.fromkeys(reached, sweep), **taken}
        if len(taken) == len(TOLERANCES):
            break
    return taken, statistics.median(ratios)


def seconds(work: Callable[[], object], like: Tensor) -> float:
    """What a call takes on the device of `like`."""
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
    begin = time.perf_counter()
    work()
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
    return time.perf_counter() - begin
