"""Measure, in some seconds, how a model is best prefilled here: which stride, how many sweeps, what a call costs.

Times are ratios of calls made in turn, which a busy machine slows alike; of several, the median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lrt.inference.cost_model import Calibration, Plan, device_name
from lrt.inference.prefill import TOLERANCES, tolerance
from lrt.inference.prompt import Prompt
from lrt.inference.sweeps import SweepState
from lrt.model.fingerprint import fingerprint
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.utils.progress import bar

STRIDES = (4, 8, 16, 32)
LENGTH = 512
"""Tokens of the measured prompt, where the context has room for them."""
LONGEST = 16
"""A stride that has not converged after so many sweeps is passed over."""
PAIRS = 5
"""Ratios of which the median counts."""
STEPS = 32
"""Tokens decoded one after another to time a call with one position: in a row, as what the caches hold matters."""


def sample_text(model: LatentRecurrentTransformer, first: int, length: int, seed: int = 0) -> Tensor:
    """Tokens (1, length) that the model itself continues `first` with: a typical prompt, without any data."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.tensor([[first]], device=model.embedding.weight.device)]
    with torch.no_grad():
        state = model.empty_state(1, length).in_place()
        for t in range(length - 1):
            hidden, state = model(tokens[-1], range(t, t + 1), state)
            probabilities = model.logits(hidden[:, -1]).float().softmax(-1).cpu()
            tokens.append(torch.multinomial(probabilities, 1, generator=generator).to(tokens[0]))
    return torch.cat(tokens, 1)


def calibrate(model: LatentRecurrentTransformer, tokens: Tensor, progress: bool = True) -> Calibration:
    """The calibration of a model on its device, measured with one prompt (1, T): `sample_text`, or text like yours.

    ValueError where the prompt is too short, or where nothing recurs.
    """
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
    # By mode: the plans that converge, with their cost in plain forwards.
    costs: dict[str, dict[Plan, float]] = {mode: {} for mode in TOLERANCES}
    with torch.no_grad(), bar("calibrating", len(strides) + 1, progress) as advance:
        overhead = call_overhead(model, tokens)
        advance(1)
        for groups in strides:
            for mode, (sweeps, cost) in count_sweeps(model, tokens, groups).items():
                costs[mode][Plan(groups, sweeps)] = cost
            advance(1, f"stride {groups}")
    # What did not converge takes as many sweeps as make everything exact: token by token is then cheaper.
    never = Plan(16, max(1, length // 16))
    plans = {mode: min(by_plan, key=by_plan.__getitem__, default=never) for mode, by_plan in costs.items()}
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
    ratio = statistics.median(time_call(one_by_one, tokens) / time_call(at_once, tokens) for _ in range(PAIRS))
    q = ratio * length / steps
    return max(0.0, length * (q - 1) / max(1.0, length - q))


def count_sweeps(model: LatentRecurrentTransformer, tokens: Tensor, groups: int) -> dict[str, tuple[int, float]]:
    """By mode, of those that converge: after how many sweeps, and their time over that of a plain forward."""
    length = tokens.shape[1]
    plain_state = model.empty_state(1, length).in_place()
    passes: dict[str, tuple[int, int]] = {}  # by mode, the sweeps, and how often the blocks above the memory's ran
    ratios: dict[str, list[float]] = {"sweep": [], "upper": []}

    def time_ratio(kind: str, function: Callable[[], object]) -> None:
        seconds = time_call(function, tokens)
        ratios[kind].append(seconds / time_call(lambda: model(tokens, range(length), plain_state), tokens))

    for mode in TOLERANCES:
        limit = tolerance(mode, model)
        assert limit is not None
        state = model.empty_state(1, length, tokens=tokens).in_place()
        rows, finished = SweepState.of(model, Prompt(tokens, [length], [0]), state), 0
        for sweep in range(1, min(LONGEST, length // groups) + 1):
            time_ratio("sweep", partial(rows.sweep, model, groups, (sweep - 1) * groups))
            if due := rows.due(limit):
                time_ratio("upper", partial(rows.finish, model, due))
                finished += 1
            (row,) = rows.certificates(groups, "calibrating")
            if row.within(limit):
                passes[mode] = sweep, finished
                break
    sweep, upper = (statistics.median(r) if r else 0.0 for r in ratios.values())
    return {mode: (sweeps, sweeps * sweep + finished * upper) for mode, (sweeps, finished) in passes.items()}


def time_call(function: Callable[[], object], like: Tensor) -> float:
    """Seconds that a call takes on the device of `like`."""
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
    begin = time.perf_counter()
    function()
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
    return time.perf_counter() - begin
