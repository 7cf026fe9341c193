"""Prefill: a prompt into a State, token by token or by parallel sweeps that say how far they have converged.

Exact recurrence is the fixed point of h = F(tokens, shift(h)). A strided Gauss-Seidel sweep recomputes the positions
0::g, 1::g, … g-1::g, each class from all that was written before it; n sweeps leave the first n·g positions exact, and
in a model that contracts all of them soon within a tolerance (contract, section 4). One that does not is computed
token by token.

Shapes: B rows, T prompt positions (rows right-padded to the longest), D width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from lrt.inference.certificate import Certificate, PrefillReport, merge_certificates
from lrt.inference.cost_model import Calibration, fallback
from lrt.inference.sweeps import Prompt, SweepState, among, back, settle
from lrt.model.config import ModelConfig
from lrt.model.state import State
from lrt.model.transformer import LatentRecurrentTransformer

Mode = Literal["exact", "converged", "fast", "one_sweep"]
Computed = tuple[Tensor, State, list[Certificate]]
"""Hidden states (B, T, D) of rows of a common length T, the state, and how each row was computed."""
MODES = get_args(Mode)
TOLERANCES: dict[Mode, float] = {"converged": 1e-5, "fast": 1e-3}
"""Of the modes that sweep until converged (contract, section 4)."""


class Path(Protocol):
    """A way to compute some rows."""

    def __call__(self, model: LatentRecurrentTransformer, prompt: Prompt, state: State) -> Computed: ...


@dataclass(frozen=True)
class Prefilled:
    """A prompt, computed."""

    hidden: Tensor
    """(B, 1, D): the final hidden state of each row's last position, which the head reads."""
    sequence: Tensor
    """(B, T, D): that of every position, zeros in padding: what scores a whole text."""
    state: State
    report: PrefillReport


def prefill(
    model: LatentRecurrentTransformer,
    tokens: Tensor,
    state: State,
    mode: Mode = "converged",
    lengths: Tensor | None = None,
    calibration: Calibration | None = None,
) -> Prefilled:
    """Compute tokens (B, T) behind what `state` holds; row b has lengths[b] of them (B,), the rest is padding.

    `exact`: token by token. `converged`: sweeps until within 1e-5, row by row; `fast`: until within 1e-3; either is
    exact where that is cheaper (a short prompt, a model without recurrence) or where the sweeps do not contract.
    `one_sweep`: one sweep, for comparison. A state whose slots are reused takes a long prompt in chunks. Gives no
    gradients. A state made by `in_place` is used up, any other stays as it was. Raises ValueError, before any work, on
    an empty prompt or one that the state cannot hold.
    """
    if mode not in MODES:
        raise ValueError(f"prefill is {mode!r}; choose one of {', '.join(MODES)}")
    prompt = check_prompt(model, tokens, state, lengths)
    chosen = calibration or fallback(tokens.device)
    with torch.no_grad():
        work = state.writable()
        needed = max(prompt.starts) + prompt.length
        if needed > work.slots and not work.reusable:  # only padding stands out
            work = work.resized(needed)
        hidden, work, rows = in_chunks(model, prompt, work, mode, chosen)
        work = work.crop(prompt.ends)
        if work.slots != state.slots:
            work = work.resized(state.slots)
        report = PrefillReport(mode, tolerance(mode, model), tuple(rows))
        return Prefilled(prompt.last(hidden), hidden, dataclasses.replace(work, write=state.write), report)


def tolerance(mode: Mode, model: LatentRecurrentTransformer) -> float | None:
    """The residual below which a row has converged; None where the mode asks for none.

    Never less than the spacing of the weights' type at 1: sweeps of a bfloat16 model go on to differ by rounding.
    """
    asked = TOLERANCES.get(mode)
    return None if asked is None else max(asked, torch.finfo(model.embedding.weight.dtype).eps)


def check_prompt(model: LatentRecurrentTransformer, tokens: Tensor, state: State, lengths: Tensor | None) -> Prompt:
    """The prompt, or a ValueError that says what is wrong with it."""
    if tokens.dim() != 2 or tokens.shape[1] <= 0 or tokens.shape[0] != state.batch:
        raise ValueError(
            f"the prompt has shape {tuple(tokens.shape)}; give ({state.batch} rows of the state, at least one token): "
            "BOS will do"
        )
    without_thoughts(model.config)
    batch, width = tokens.shape
    counted = [width] * batch if lengths is None else [int(n) for n in lengths.tolist()]
    if len(counted) != batch or min(counted) < 1 or max(counted) > width:
        raise ValueError(f"lengths are {counted}; give each of the {batch} rows 1 to {width} tokens")
    if state.documents is not None:
        raise ValueError("a state with packed documents cannot be prefilled; make one without")
    starts: list[int] = state.lengths.tolist()
    longest = max(s + n for s, n in zip(starts, counted, strict=True))
    if longest > state.slots and (not state.reusable):
        raise ValueError(
            f"a prompt that ends at position {longest} exceeds the {state.slots} slots of this state (context "
            f"{model.config.context}); shorten it, or use a model in which every layer has a sliding window"
        )
    tokens = tokens[:, : max(counted)]
    if min(counted) < max(counted):  # padding may be any number
        inside = torch.arange(max(counted), device=tokens.device) < torch.tensor(counted).to(tokens).unsqueeze(1)
        tokens = tokens.where(inside, 0)
    low, high = (int(t) for t in tokens.aminmax())
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(
            f"token {low if low < 0 else high} is not in the vocabulary of {model.config.vocab_size}; use its tokenizer"
        )
    return Prompt(tokens, counted, starts)


def without_thoughts(config: ModelConfig) -> None:
    """ValueError for a model of latent thoughts, whose State counts other positions than tokens."""
    if config.thoughts != 0:
        raise ValueError(
            "prompts of a model with latent thoughts are decoded token by token only; use generate or score"
        )


def in_chunks(
    model: LatentRecurrentTransformer, prompt: Prompt, state: State, mode: Mode, calibration: Calibration
) -> Computed:
    """All of a prompt; where slots are reused, as much at a time as leaves what the next position reads in place."""
    size = prompt.length
    if state.reusable and max(prompt.starts) + prompt.length > state.slots:  # padding is written as well
        size = state.slots - model.config.lookback
        if size < 1:
            raise ValueError(
                f"a state of {state.slots} slots is too short to be reused: window and delay need "
                f"{model.config.lookback} and a chunk one more; make a longer state"
            )
    if size >= prompt.length:
        return compute(model, prompt, state, mode, calibration)
    hidden = state.memory.new_zeros(prompt.rows, prompt.length, model.config.width)
    certificates: list[list[Certificate]] = [[] for _ in prompt.lengths]
    for begin in range(0, prompt.length, size):
        rows = [i for i, n in enumerate(prompt.lengths) if n > begin]
        part = prompt.select(rows).part(begin, begin + size)
        new, chunk, found = compute(model, part, among(state, rows), mode, calibration)
        hidden[rows, begin : begin + part.length] = new
        state = back(state, rows, chunk)
        for row, certificate in zip(rows, found, strict=True):
            certificates[row].append(certificate)
    return hidden, state, [merge_certificates(found) for found in certificates]


def by_tokens(
    model: LatentRecurrentTransformer, mode: Mode, length: int, rows: int, calibration: Calibration
) -> str | None:
    """Why a prompt of `length` is computed token by token, among so many rows; None where it is not."""
    if not model.config.stored_sources:
        return None  # one forward
    if mode == "exact":
        return "asked for"
    longest = calibration.break_even(calibration.plan(mode), rows)
    return f"token by token is cheaper than sweeps up to {longest:.0f} tokens" if length <= longest else None


def compute(
    model: LatentRecurrentTransformer, prompt: Prompt, state: State, mode: Mode, calibration: Calibration
) -> Computed:
    """A prompt that the state's slots hold at once: each row on the path that `mode` and the costs choose."""
    if not model.config.stored_sources:
        return one_forward(model, prompt, state)
    reasons = [by_tokens(model, mode, n, prompt.rows, calibration) for n in prompt.lengths]
    single = [i for i, reason in enumerate(reasons) if reason is not None]
    paths: tuple[tuple[list[int], Path], ...] = (
        (single, partial(token_by_token, reason=reasons[single[0]] or "" if single else "")),
        ([i for i, r in enumerate(reasons) if r is None], partial(sweep_rows, mode=mode, calibration=calibration)),
    )
    hidden = state.memory.new_zeros(prompt.rows, prompt.length, model.config.width)
    certificates: dict[int, Certificate] = {}
    for rows, path in paths:
        if rows:
            some = prompt.select(rows)
            hidden[rows, : some.length], part, found = path(model, some, among(state, rows))
            state = back(state, rows, part)
            certificates |= dict(zip(rows, found, strict=True))
    return hidden, state, [certificates[row] for row in range(prompt.rows)]


def one_forward(model: LatentRecurrentTransformer, prompt: Prompt, state: State) -> Computed:
    """One plain forward: exact where nothing recurs."""
    hidden, state = model(prompt.tokens, prompt.positions(range(prompt.length)), state)
    return (
        prompt.inside(hidden),
        state,
        [Certificate("exact", "one forward: nothing recurs", n) for n in prompt.lengths],
    )


def token_by_token(model: LatentRecurrentTransformer, prompt: Prompt, state: State, reason: str) -> Computed:
    """Exact: the reference that every other path is held against. A row leaves after its last token."""
    hidden = state.memory.new_zeros(prompt.rows, prompt.length, model.config.width)
    rows, whole, part, begin = list(range(prompt.rows)), state, prompt, 0
    for end in sorted(set(prompt.lengths)):
        for column in range(begin, end):
            positions = part.positions(range(column, column + 1))
            new, state = model(part.tokens[:, column : column + 1], positions, state)
            hidden[rows, column] = new[:, 0]
        whole, begin = back(whole, rows, state), end
        rows = [i for i in rows if prompt.lengths[i] > end]
        if rows:
            part, state = prompt.select(rows), among(whole, rows)
    return hidden, whole, [Certificate("exact", reason, n) for n in prompt.lengths]


def sweep_rows(
    model: LatentRecurrentTransformer, prompt: Prompt, state: State, mode: Mode, calibration: Calibration
) -> Computed:
    """Sweeps; then, token by token from the start, the rows that do not converge."""
    # Source 0 of a position is its predecessor's token, whichever of the two is computed first.
    state = state.write_tokens(prompt.positions(range(prompt.length)), prompt.tokens)
    groups = calibration.plan(mode).groups
    limit = tolerance(mode, model)
    if limit is None:
        return single(model, prompt, state, groups)
    hidden, state, certificates = settle(model, prompt, state, groups, limit, calibration)
    failed = [i for i, certificate in enumerate(certificates) if certificate.path == "fallback"]
    if failed:
        again = prompt.select(failed)
        part = among(state, failed).crop(torch.tensor(again.starts, device=prompt.tokens.device))
        hidden[failed, : again.length], part, _ = token_by_token(model, again, part, "")
        state = back(state, failed, part)
    return hidden, state, certificates


def single(model: LatentRecurrentTransformer, prompt: Prompt, state: State, groups: int) -> Computed:
    """One sweep, whatever it leaves."""
    flight = SweepState.of(model, prompt, state)
    flight.sweep(model, groups, 0)
    reason = "one sweep, not looked at"
    rows = [Certificate("single", reason, n, groups, 1, None, None, forwards=prompt.length / n) for n in prompt.lengths]
    return flight.hidden(), flight.state, rows
