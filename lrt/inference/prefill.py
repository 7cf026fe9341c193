"""Prefill: a prompt into a State, token by token or by parallel sweeps that say how far they have converged.

Exact recurrence is the fixed point of h = F(tokens, shift(h)). A strided Gauss-Seidel sweep recomputes the positions
0::g, 1::g, … g-1::g, each class from all that was written before it; n sweeps leave the first n·g positions exact, and
in a model that contracts all of them soon within a tolerance (docs/contract.md, section 4).

A row gives up when its present rate says, twice in a row, that the sweeps to go cost more than token by token. It is
then computed from its start, so that nothing of the sweeps stays: the result is bit for bit that of `exact`. Where the
costs say so from the beginning it is not swept at all (`cost_model.py`).

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
from lrt.inference.cost_model import ALL_SWEPT, Calibration, block_shares, fallback
from lrt.inference.prompt import Prompt
from lrt.inference.sweeps import SweepState, put_rows, select_rows, sweep_until_settled
from lrt.model.config import ModelConfig
from lrt.model.execution import EAGER, Execution
from lrt.model.state import State
from lrt.model.transformer import LatentRecurrentTransformer

PrefillMode = Literal["exact", "converged", "fast", "one_sweep"]
PathOutput = tuple[Tensor, State, list[Certificate]]
"""Hidden states (B, T, D) of rows of a common length T, the state, and how each row was computed."""
PREFILL_MODES = get_args(PrefillMode)
TOLERANCES: dict[PrefillMode, float] = {"converged": 1e-5, "fast": 1e-3}
"""Of the modes that sweep until converged (docs/contract.md, section 4)."""


class PrefillPath(Protocol):
    """One of the functions that compute some rows."""

    def __call__(self, model: LatentRecurrentTransformer, prompt: Prompt, state: State) -> PathOutput: ...


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
    mode: PrefillMode = "converged",
    lengths: Tensor | None = None,
    calibration: Calibration | None = None,
) -> Prefilled:
    """Compute tokens (B, T) behind what `state` holds; row b has lengths[b] of them (B,), the rest is padding.

    `exact`: token by token. `converged`: sweeps until within 1e-5, row by row; `fast`: until within 1e-3; either is
    exact where that is cheaper (a short prompt, a model without recurrence) or where the sweeps do not contract.
    `one_sweep`: one sweep, for comparison. A state whose slots are reused takes a long prompt in chunks. Gives no
    gradients. A state made by `in_place` is used up, any other stays as it was. Raises ValueError, before any work, on
    an empty prompt or one that the state cannot hold.

    Sweeps run the blocks that the memory needs, and the others at their end; each time all of them where
    `state.execution` says so of passes that only the memory is wanted of (the plain reference).
    """
    if mode not in PREFILL_MODES:
        raise ValueError(f"prefill is {mode!r}; choose one of {', '.join(PREFILL_MODES)}")
    prompt = check_prompt(model, tokens, state, lengths)
    calibration = calibration or fallback(tokens.device)
    with torch.no_grad():
        current = state.writable()
        needed = max(prompt.starts) + prompt.length
        if needed > current.slots and not current.reusable:  # only padding stands out
            current = current.resized(needed)
        hidden, current, certificates = prefill_in_chunks(model, prompt, current, mode, calibration)
        current = current.crop(prompt.ends)  # forgets the padding, which was written as well
        if current.slots != state.slots:
            current = current.resized(state.slots)
        report = PrefillReport(mode, tolerance(mode, model), tuple(certificates))
        return Prefilled(prompt.last_position(hidden), hidden, dataclasses.replace(current, write=state.write), report)


def tolerance(mode: PrefillMode, model: LatentRecurrentTransformer) -> float | None:
    """The residual below which a row has converged; None where the mode asks for none.

    Never less than the spacing of the weights' type at 1: sweeps of a bfloat16 model go on to differ by rounding. The
    benchmark's LRT stays at 2e-3 from the sixth sweep on, so that 1e-3 would always end in token by token, which in
    bfloat16 is no nearer to float32.
    """
    limit = TOLERANCES.get(mode)
    return None if limit is None else max(limit, torch.finfo(model.embedding.weight.dtype).eps)


def check_prompt(model: LatentRecurrentTransformer, tokens: Tensor, state: State, lengths: Tensor | None) -> Prompt:
    """The prompt, or a ValueError that says what is wrong with it."""
    if tokens.dim() != 2 or tokens.shape[1] <= 0 or tokens.shape[0] != state.batch:
        raise ValueError(
            f"the prompt has shape {tuple(tokens.shape)}; give ({state.batch} rows of the state, at least one token): "
            "BOS will do"
        )
    refuse_thoughts(model.config)
    batch, width = tokens.shape
    counts = [width] * batch if lengths is None else [int(n) for n in lengths.tolist()]
    if len(counts) != batch or min(counts) < 1 or max(counts) > width:
        raise ValueError(f"lengths are {counts}; give each of the {batch} rows 1 to {width} tokens")
    if state.documents is not None:
        raise ValueError("a state with packed documents cannot be prefilled; make one without")
    starts: list[int] = state.lengths.tolist()
    longest = max(s + n for s, n in zip(starts, counts, strict=True))
    if longest > state.slots and (not state.reusable):
        raise ValueError(
            f"a prompt that ends at position {longest} exceeds the {state.slots} slots of this state (context "
            f"{model.config.context}); shorten it, or use a model in which every layer has a sliding window"
        )
    tokens = tokens[:, : max(counts)]
    if min(counts) < max(counts):  # padding may be any number
        inside = torch.arange(max(counts), device=tokens.device) < torch.tensor(counts).to(tokens).unsqueeze(1)
        tokens = tokens.where(inside, 0)
    low, high = (int(t) for t in tokens.aminmax())
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(
            f"token {low if low < 0 else high} is not in the vocabulary of {model.config.vocab_size}; use its tokenizer"
        )
    return Prompt(tokens, counts, starts)


def refuse_thoughts(config: ModelConfig) -> None:
    """ValueError for a model of latent thoughts, whose State counts other positions than tokens."""
    if config.thoughts != 0:
        raise ValueError(
            "prompts of a model with latent thoughts are decoded token by token only; use generate or score"
        )


def prefill_in_chunks(
    model: LatentRecurrentTransformer, prompt: Prompt, state: State, mode: PrefillMode, calibration: Calibration
) -> PathOutput:
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
        return prefill_at_once(model, prompt, state, mode, calibration)
    hidden = state.memory.new_zeros(prompt.rows, prompt.length, model.config.width)
    by_row: list[list[Certificate]] = [[] for _ in prompt.lengths]
    for begin in range(0, prompt.length, size):
        rows = [i for i, n in enumerate(prompt.lengths) if n > begin]
        chunk = prompt.select(rows).columns(begin, begin + size)
        new, part, certificates = prefill_at_once(model, chunk, select_rows(state, rows), mode, calibration)
        hidden[rows, begin : begin + chunk.length] = new
        state = put_rows(state, rows, part)
        for row, certificate in zip(rows, certificates, strict=True):
            by_row[row].append(certificate)
    return hidden, state, [merge_certificates(certificates) for certificates in by_row]


def exact_reason(
    model: LatentRecurrentTransformer,
    mode: PrefillMode,
    length: int,
    rows: int,
    calibration: Calibration,
    execution: Execution = EAGER,
) -> str | None:
    """Why a prompt of `length` is computed token by token, among so many rows; None where it is not.

    `execution` is that of the State that it goes into.
    """
    if not model.config.stored_sources:
        return None  # one forward
    if mode == "exact":
        return "asked for"
    shares = ALL_SWEPT if mode == "one_sweep" else block_shares(model.config, execution)
    longest = calibration.break_even(calibration.plan(mode), rows, shares)
    return f"token by token is cheaper than sweeps up to {longest:.0f} tokens" if length <= longest else None


def prefill_at_once(
    model: LatentRecurrentTransformer, prompt: Prompt, state: State, mode: PrefillMode, calibration: Calibration
) -> PathOutput:
    """A prompt that the state's slots hold at once: each row on the path that `mode` and the costs choose."""
    if not model.config.stored_sources:
        return forward_once(model, prompt, state)
    reasons = [exact_reason(model, mode, n, prompt.rows, calibration, state.execution) for n in prompt.lengths]
    exact = [i for i, reason in enumerate(reasons) if reason is not None]
    swept = [i for i, reason in enumerate(reasons) if reason is None]
    # Costs are those of the whole batch, so that all exact rows have one reason.
    paths: tuple[tuple[list[int], PrefillPath], ...] = (
        (exact, partial(decode_prompt, reason=reasons[exact[0]] or "" if exact else "")),
        (swept, partial(sweep_prompt, mode=mode, calibration=calibration)),
    )
    hidden = state.memory.new_zeros(prompt.rows, prompt.length, model.config.width)
    certificates: dict[int, Certificate] = {}
    for rows, path in paths:
        if rows:
            some = prompt.select(rows)
            hidden[rows, : some.length], part, parts = path(model, some, select_rows(state, rows))
            state = put_rows(state, rows, part)
            certificates |= dict(zip(rows, parts, strict=True))
    return hidden, state, [certificates[row] for row in range(prompt.rows)]


def forward_once(model: LatentRecurrentTransformer, prompt: Prompt, state: State) -> PathOutput:
    """One plain forward: exact where nothing recurs."""
    hidden, state = model(prompt.tokens, prompt.positions(range(prompt.length)), state)
    certificates = [Certificate("exact", "one forward: nothing recurs", n) for n in prompt.lengths]
    return prompt.zero_padding(hidden), state, certificates


def decode_prompt(model: LatentRecurrentTransformer, prompt: Prompt, state: State, reason: str) -> PathOutput:
    """Token by token: the reference that every other path is held against. A row leaves after its last token."""
    hidden = state.memory.new_zeros(prompt.rows, prompt.length, model.config.width)
    rows, whole, part, begin = list(range(prompt.rows)), state, prompt, 0
    for end in sorted(set(prompt.lengths)):
        for column in range(begin, end):
            positions = part.positions(range(column, column + 1))
            new, state = model(part.tokens[:, column : column + 1], positions, state)
            hidden[rows, column] = new[:, 0]
        whole, begin = put_rows(whole, rows, state), end
        rows = [i for i in rows if prompt.lengths[i] > end]
        if rows:
            part, state = prompt.select(rows), select_rows(whole, rows)
    return hidden, whole, [Certificate("exact", reason, n) for n in prompt.lengths]


def sweep_prompt(
    model: LatentRecurrentTransformer, prompt: Prompt, state: State, mode: PrefillMode, calibration: Calibration
) -> PathOutput:
    """Sweeps; then, token by token from the start, the rows that do not converge."""
    # Source 0 of a position is its predecessor's token, whichever of the two is computed first.
    state = state.write_tokens(prompt.positions(range(prompt.length)), prompt.tokens)
    groups = calibration.plan(mode).groups
    limit = tolerance(mode, model)
    if limit is None:
        return sweep_once(model, prompt, state, groups)
    hidden, state, certificates = sweep_until_settled(model, prompt, state, groups, limit, calibration)
    failed = [i for i, certificate in enumerate(certificates) if certificate.path == "fallback"]
    if failed:
        again = prompt.select(failed)
        # Cropped to where they started: nothing of the sweeps stays.
        part = select_rows(state, failed).crop(torch.tensor(again.starts, device=prompt.tokens.device))
        hidden[failed, : again.length], part, _ = decode_prompt(model, again, part, "")
        state = put_rows(state, failed, part)
    return hidden, state, certificates


def sweep_once(model: LatentRecurrentTransformer, prompt: Prompt, state: State, groups: int) -> PathOutput:
    """One sweep of all blocks, whatever it leaves: to end at the source would save nothing."""
    sweeps = SweepState.of(model, prompt, state, range(model.config.kv_layers))
    sweeps.sweep(model, groups, 0)
    reason = "one sweep, not looked at"
    rows = [Certificate("single", reason, n, groups, 1, None, None, forwards=prompt.length / n) for n in prompt.lengths]
    return sweeps.hidden(), sweeps.state, rows
