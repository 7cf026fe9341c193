"""What benchmarks/gpu.py checks: the model, its kernels and its decoders on a device, against float64 on the CPU.

The reference is the oracle of the tests for texts of a few tokens, and the library itself in float64 on the CPU, which
the tests hold against the oracle, for texts that fill the kernels' tiles. Weights are numbers of bfloat16 in every
type, so that only arithmetic differs. A difference is the norm of it over the norm of what is expected.

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from support.attention import PLANS, G, H, random, with_gradients
from support.decoding import decoded, raggedly
from support.models import (
    configuration,
    difference,
    documents_of,
    gradient_differences,
    gradients,
    random_model,
    random_tokens,
    unaligned,
    weights_of,
)
from support.oracle import simulate
from torch import Tensor

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, refine, schedules
from lrt.experiments.bench.rows import Row
from lrt.inference.decoders import MODES, decoder
from lrt.model import blockwise_attention
from lrt.model.cross_entropy import ROWS, summed_nats, summed_nats_reference
from lrt.model.execution import EAGER, WHOLE, Execution
from lrt.schedules.parse import parse

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.02}
"""The largest difference allowed of one operation, by type. A wrong tile, mask or scale is some tenths."""
DEEPER = {torch.float64: 1.0, torch.float32: 1.0, torch.bfloat16: 5.0}
"""How much further a whole model may be off, by type: every layer and pass rounds."""
SLOPES = 3
"""How much further a model's gradients may be off than its values."""
VOCABULARY = 1000
"""Of the cross-entropy."""
LATER = 3
"""Steps by which a row begins after another where rows are decoded at positions of their own."""
Part = tuple[str, Callable[[float], Iterable[Row]]]
"""What is measured by itself, by name: given seconds, the rows."""


@dataclass(frozen=True)
class Checked:
    """Where and how much is checked."""

    device: str
    types: tuple[torch.dtype, ...]
    schedules: tuple[str, ...]
    cases: tuple[str, ...]
    """Names of `CASES`."""
    compiled: tuple[str, ...]
    """Of them those of which torch.compile's passes are checked too, and in float32 its decoder: a minute each."""


@dataclass(frozen=True, eq=False)
class Case:
    """A model and a text."""

    config: ModelConfig
    tokens: Tensor
    """(B, T)."""
    documents: Tensor | None = None
    """(B, T), or None where a row is one document."""
    by_oracle: bool = True
    """Whether the text is short enough for the oracle."""

    @functools.cached_property
    def model(self) -> LatentRecurrentTransformer:
        """All weights random, in float64 on the CPU."""
        model = copy.deepcopy(random_model(self.config))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        return model

    def on(self, device: str, dtype: torch.dtype) -> LatentRecurrentTransformer:
        """The same model elsewhere."""
        return copy.deepcopy(self.model).to(device, dtype)

    def hidden(self, schedule: str) -> Tensor:
        """Hidden states (B, T, D) under a schedule."""
        parsed = parse(schedule)
        if not self.by_oracle:
            return refine(self.model, self.tokens, parsed, self.documents, execution=WHOLE).hidden
        documents = [None] * len(self.tokens) if self.documents is None else list(self.documents)
        passes = parsed.passes(self.tokens.shape[1])
        rows = zip(self.tokens, documents, strict=True)
        return torch.stack([simulate(weights_of(self.model), self.config, row, passes, d)[0] for row, d in rows])

    @functools.cache  # noqa: B019 - for all types alike; a case lives as long as the program
    def expected(self, schedule: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states under a schedule, and the gradients of a fixed function of them."""
        hidden = self.hidden(schedule)
        return hidden.detach(), gradients(self.model, hidden)

    @functools.cached_property
    def exact(self) -> Tensor:
        """Hidden states of the recurrence itself."""
        with torch.no_grad():
            return self.hidden(repr(schedules.sequential()))


def small_config(**choice: Any) -> ModelConfig:
    """Of the tests' own, with heads of 8 numbers, which is the least that the kernels on CUDA take."""
    return configuration({"injection": "both", "head_size": 8, **choice})


def wide_case(length: int, documents: Tensor | None = None) -> Case:
    """A text that fills tiles, with grouped heads and windows, too long for the oracle."""
    memory = MemoryConfig(source=(0, 2), combine="channels", projection="layerwise", initial="embedding")
    config = ModelConfig(
        depth=2, width=64, heads=2, kv_heads=1, vocab_size=31, context=length + LATER, window_pattern="SL",
        window=length // 5, memory=memory,
    )  # fmt: skip
    return Case(config, random_tokens(length=length), documents, by_oracle=False)


BEST = {"source": "(0,L)channels", "projection": "layerwise", "initial": "embedding"}
SHORT, LONG = 45, 250
"""Tokens of texts that are a little, and much, longer than a tile; no multiples of one."""
CASES: dict[str, Callable[[], Case]] = {
    "recommended": lambda: Case(small_config(**BEST), random_tokens()),
    "windows": lambda: Case(small_config(source="L", window_pattern="SL", depth=3), random_tokens()),
    "grouped heads": lambda: Case(
        small_config(source="(L,1,0)sum", kv_heads=1, value_embeddings="all"), random_tokens()
    ),
    "documents": lambda: Case(small_config(**BEST), random_tokens(), unaligned()),
    "all of these": lambda: Case(small_config(**BEST, kv_heads=1, window_pattern="SL"), random_tokens(), unaligned()),
    f"{SHORT} tokens": lambda: wide_case(SHORT),
    f"{LONG} tokens": lambda: wide_case(LONG),
    f"{LONG} tokens, documents": lambda: wide_case(LONG, documents_of((80, 170), (99, 101, 50))),
}


def difference_row(name: str, differences: dict[str, float], allowed: float) -> Row:
    """The largest of some differences, which is to be below `allowed`; nan counts as infinite."""
    finite = {case: d if math.isfinite(d) else math.inf for case, d in differences.items()}
    worst = max(finite, key=lambda case: finite[case])
    about = {"worst": worst, "compared": len(finite)}
    return Row(name, finite[worst], at_most=allowed, about=about, measure="difference")


def type_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def away(actual: Tensor, expected: Tensor) -> float:
    """The difference of what a device computed from what was computed in float64 on the CPU."""
    return difference(actual.detach().cpu().double(), expected)


COMPILED = Execution("always")
FLAT_MODES = tuple(mode for mode in MODES if mode != "compiled")
"""Decoders that start at once."""


def model_parts(checked: Checked) -> list[Part]:
    """Values and gradients of schedules, and decoding: parts for each case and type; then those that compile."""
    parts: list[Part] = []
    made = {name: functools.cache(CASES[name]) for name in checked.cases}  # when the first of its parts runs
    for name, case in made.items():
        for dtype in checked.types:
            parts.append(schedule_part(name, case, dtype, EAGER, checked))
            parts.append(decoding_part(name, case, dtype, FLAT_MODES, checked))
    for name in checked.compiled:
        for dtype in checked.types:
            if dtype != torch.float64:  # which nothing is trained in
                parts.append(schedule_part(f"{name}, compiled", made[name], dtype, COMPILED, checked))
        parts.append(decoding_part(f"{name}, compiled", made[name], torch.float32, ("compiled",), checked))
    return parts


def schedule_part(
    name: str, make: Callable[[], Case], dtype: torch.dtype, execution: Execution, checked: Checked
) -> Part:
    title = f"{name}, {type_name(dtype)}"
    return title, partial(schedule_checks, title, make, dtype, execution, checked)


def decoding_part(
    name: str, make: Callable[[], Case], dtype: torch.dtype, modes: Sequence[str], checked: Checked
) -> Part:
    title = f"{name}, {type_name(dtype)}: decoding"
    return title, partial(decoding_check, title, make, dtype, checked.device, modes)


def schedule_checks(
    name: str, make: Callable[[], Case], dtype: torch.dtype, execution: Execution, checked: Checked, _: float
) -> Iterator[Row]:
    """Two rows: hidden states and gradients under every schedule."""
    case = make()
    model, tokens = case.on(checked.device, dtype), case.tokens.to(checked.device)
    documents = None if case.documents is None else case.documents.to(checked.device)
    values, slopes = {}, {}
    for schedule in checked.schedules:
        hidden, grads = case.expected(schedule)
        actual = refine(model, tokens, parse(schedule), documents, execution=execution).hidden
        values[schedule] = away(actual, hidden)
        own = {n: g.cpu().double() for n, g in gradients(model, actual).items()}
        for parameter, differs in gradient_differences(own, grads).items():
            # A gate's or a scale's gradient is one sum over all positions that may cancel: bfloat16 has no digit of it.
            if dtype != torch.bfloat16 or grads[parameter].dim() > 1:
                slopes[f"{schedule}: {parameter}"] = differs
    allowed = TOLERANCES[dtype] * DEEPER[dtype]
    yield difference_row(f"{name}: values", values, allowed)
    yield difference_row(f"{name}: gradients", slopes, SLOPES * allowed)


def decoding_check(
    name: str, make: Callable[[], Case], dtype: torch.dtype, device: str, modes: Sequence[str], _: float
) -> Iterator[Row]:
    """A row: every decoder, rows together and, where no documents are packed, at positions of their own."""
    case = make()
    model, tokens = case.on(device, dtype), case.tokens.to(device)
    batch, length = tokens.shape
    documents = None if case.documents is None else case.documents.to(device)
    differences = {}
    for mode in modes:
        if not MODES[mode].covers(model):
            continue
        state = model.empty_state(batch, length, documents)
        differences[mode] = away(decoded(decoder(model, state, mode), tokens), case.exact)
        if documents is None:
            state = model.empty_state(batch, length + LATER)
            way = decoder(model, state, mode)
            differences[f"{mode}, ragged"] = away(raggedly(way, tokens, [0, LATER]), case.exact)
    yield difference_row(name, differences, TOLERANCES[dtype] * DEEPER[dtype])


def kernel_parts(checked: Checked) -> list[Part]:
    """Attention in pieces, and the fused cross-entropy. (The fused step is among the decoders.)"""
    parts: list[Part] = []
    for dtype in checked.types:
        name = type_name(dtype)
        parts.append((f"attention, {name}", partial(attention_checks, checked.device, dtype)))
        title = f"fused cross-entropy, {name}"
        parts.append((title, partial(entropy_check, title, checked.device, dtype, EAGER)))
    for dtype in checked.types if checked.compiled else ():
        title = f"fused cross-entropy, compiled, {type_name(dtype)}"
        parts.append((title, partial(entropy_check, title, checked.device, dtype, COMPILED)))
    return parts


def kernel_name(device: str, dtype: torch.dtype, masked: bool) -> str:
    """Which kernel the library chooses, by its name in `lrt.model.blockwise_attention`."""
    q = torch.empty(1, 1, 1, 8, device=device, dtype=dtype)
    kernel = blockwise_attention.choose_kernel(q, masked)
    return next((name for name, value in vars(blockwise_attention).items() if value is kernel), "another")


def attention_checks(device: str, dtype: torch.dtype, _: float) -> Iterator[Row]:
    """Output and gradients of every plan of pieces, against one softmax over all keys; heads alone, and grouped."""
    kernels = " and ".join(dict.fromkeys(kernel_name(device, dtype, masked) for masked in (False, True)))
    for groups, heads in ((H, "heads"), (G, "grouped heads")):
        differences = {}
        for plan, (n, sizes, pieces) in PLANS.items():
            exact = [random(H, n, 7), *(random(groups, m, seed) for seed, m in enumerate(sizes * 2))]
            exact = [x.detach().bfloat16().double().requires_grad_() for x in exact]
            inputs = [x.detach().to(device, dtype).requires_grad_() for x in exact]
            pairs = zip(
                with_gradients(lambda q, k, v, p=pieces: blockwise_attention.attend(q, k, v, p), inputs),
                with_gradients(lambda q, k, v, p=pieces: blockwise_attention.attend_reference(q, k, v, p), exact),
                strict=True,
            )
            for i, (actual, expected) in enumerate(pairs):
                differences[f"{plan}: {'values' if i == 0 else f'gradient {i}'}"] = away(actual, expected)
        yield difference_row(f"attention by {kernels}, {type_name(dtype)}, {heads}", differences, TOLERANCES[dtype])


def entropy_check(title: str, device: str, dtype: torch.dtype, execution: Execution, _: float) -> Iterator[Row]:
    """Nats and gradients of the fused cross-entropy over more rows than one block has."""
    config = ModelConfig(depth=1, width=32, heads=2, vocab_size=VOCABULARY)
    model = copy.deepcopy(random_model(config)).bfloat16().double()
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS + 100, config.width, generator=generator, dtype=torch.float64).bfloat16().double()
    targets = torch.randint(VOCABULARY, (len(hidden),), generator=generator)

    def nats(on: LatentRecurrentTransformer, summed: Callable[..., Tensor]) -> list[Tensor]:
        h = hidden.to(on.embedding.weight).requires_grad_()
        total = summed(on, h, targets.to(h.device))
        return [total, *torch.autograd.grad(total, [h, on.head.weight])]

    expected = nats(model, summed_nats_reference)
    fused = functools.partial(summed_nats, execution=execution)
    actual = nats(copy.deepcopy(model).to(device, dtype), fused)
    names = ("nats", "gradient of the hidden states", "gradient of the head")
    differences = {name: away(a, e) for name, a, e in zip(names, actual, expected, strict=True)}
    yield difference_row(title, differences, TOLERANCES[dtype])
