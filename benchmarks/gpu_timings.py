"""What benchmarks/gpu.py times on a device: steps, FLOP/s, peak memory, decoding, prefill. Ratios of alternated rounds.

Each function of a `Timed` gives parts, which are run one by one, each within about so many seconds.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from lrt import LatentRecurrentTransformer, ModelConfig
from lrt.experiments.bench.attention import DTYPES, AttentionBench
from lrt.experiments.bench.decode import STEPS, decode_greedily
from lrt.experiments.bench.prefill import prefill_work
from lrt.experiments.bench.rows import Row
from lrt.experiments.bench.steps import TrainingSteps, widen
from lrt.experiments.bench.train import MODELS, TrainBench
from lrt.experiments.rivals import rivals
from lrt.inference.calibrate import LENGTH, calibrate
from lrt.inference.certificate import Certificate
from lrt.inference.decoders import decoder
from lrt.model import checkpoint
from lrt.schedules.flops import training_flops
from lrt.schedules.parse import parse
from lrt.utils.device import memory_bytes, peak_flops
from lrt.utils.timing import FEWEST, Work, alternate
from lrt.utils.torch_private import cudagraph_skips

Part = tuple[str, Callable[[float], Iterable[Row]]]
"""What is measured by itself, by name: given seconds, the rows."""
Precision = Literal["float32", "bfloat16"]
Compile = Literal["always", "never"]
PAIR = {"lrt": "recommended", "transformer": "transformer"}
"""What is decoded, by its name among the rivals."""
DEVICE_BYTES = 6 << 30
"""Memory of the device for each row of the steps' batches: what a row takes at the full size, with room to spare."""
MATMUL = 4096
"""Rows and columns of the product that says what the device does at most."""


@dataclass(frozen=True)
class Shape:
    """A model and its batch."""

    depth: int
    width: int
    context: int
    batch: int
    vocab_size: int

    def config(self, family: str) -> ModelConfig:
        """A family of the rivals at this size."""
        base = ModelConfig.from_depth(self.depth, width=self.width, context=self.context, vocab_size=self.vocab_size)
        return rivals(self.depth)[family].model(base)


@dataclass(frozen=True)
class Timings:
    """Where and how much is timed."""

    device: str
    steps: Shape
    large: Shape
    """For FLOP/s: as large as a small card holds."""
    modes: tuple[tuple[Precision, Compile], ...]
    """Precision and compilation of the steps, in turn; FLOP/s and memory are measured in the first."""
    decode: tuple[str, ...]
    """Names of decoders."""
    batches: tuple[int, ...]
    """Rows decoded at once."""
    prompt: int
    """Tokens of the prefilled prompt."""
    dtype: torch.dtype
    """Of decoding and prefill."""
    rounds: int
    """Of any timing, at most."""
    trained: str | None = None
    """A checkpoint to prefill with; None: the recommended LRT as it is initialised."""

    def rows(self, shape: Shape) -> int:
        """Rows of a batch: a power of two that the device has memory for, at most the shape's."""
        memory = memory_bytes(self.device) if torch.device(self.device).type == "cuda" else None
        fit = shape.batch if memory is None else max(1, memory // DEVICE_BYTES)
        return min(shape.batch, 2 ** int(math.log2(fit)))

    def bench(self, shape: Shape, precision: Precision, compiled: Compile) -> TrainBench:
        """`lrt bench train` at a shape."""
        batch = self.rows(shape)
        return TrainBench(
            only=("passes",), modules=False, recompute=(), depth=shape.depth, width=shape.width, context=shape.context,
            batch=batch, vocab_size=shape.vocab_size, compile=compiled, precision=precision, rounds=self.rounds,
            device=self.device, progress=False,
            training=TrainingSteps(
                sizes=(f"{shape.depth}x{shape.width}",), context=shape.context, batch=batch, vocab_size=shape.vocab_size
            ),
        )  # fmt: skip


def in_mode(row: Row, mode: str) -> Row:
    """A row that says the mode it was measured in."""
    return dataclasses.replace(row, name=f"{mode}: {row.name}")


def attention_parts(timings: Timings) -> list[Part]:
    """One layer's attention over schedules' passes: by pieces, by masks and, on CUDA, by FlexAttention."""
    shape = timings.steps
    config = shape.config("transformer")
    parts: list[Part] = []
    precisions: dict[Precision, None] = dict.fromkeys(precision for precision, _ in timings.modes)
    for precision in precisions:
        bench = AttentionBench(
            ("interleaved(2)", "settled(0, 1, 1)"), shape.context, timings.rows(shape), config.heads,
            head_size=config.head_dim, precision=precision, rounds=timings.rounds, device=timings.device,
        )  # fmt: skip

        def run(limit: float, bench: AttentionBench = bench) -> Iterator[Row]:
            for row in bench.rows(limit, progress=False):
                yield in_mode(row, bench.precision)

        parts.append((f"time of attention, {precision}", run))
    return parts


def step_parts(timings: Timings) -> list[Part]:
    """Schedules over plain, and whole steps of the recommended LRT and its control over the Transformer's, by mode."""
    parts: list[Part] = []
    for precision, compiled in timings.modes:
        mode = f"{precision}, {'compiled' if compiled == 'always' else 'uncompiled'}"
        bench = timings.bench(timings.steps, precision, compiled)
        for kind in ("passes", "training"):

            def run(limit: float, bench: TrainBench = bench, kind: str = kind, mode: str = mode) -> Iterator[Row]:
                for row in dataclasses.replace(bench, only=(kind,)).rows(limit):
                    yield in_mode(row, mode)

            parts.append((f"{kind}, {mode}", run))
    return parts


def flops_parts(timings: Timings) -> list[Part]:
    """MFU of a model that fills the device, and what the device makes of one large product in the same type."""
    precision, compiled = timings.modes[0]
    return [("FLOP/s", partial(flops_rows, timings, precision, compiled))]


def flops_rows(timings: Timings, precision: Precision, compiled: Compile, limit: float) -> Iterator[Row]:
    """FLOP/s of steps, over the data sheet's (`mfu`), and over what a product of two square matrices reaches."""
    shape, top = timings.large, peak_flops(timings.device)
    bench = dataclasses.replace(timings.bench(shape, precision, compiled), schedules=("settled(0, 1, 1)",))
    size = MATMUL if torch.device(timings.device).type == "cuda" else MATMUL // 16
    a, b = (torch.randn(size, size, device=timings.device).to(DTYPES[precision]) for _ in range(2))
    product = alternate({"": lambda: a @ b}, timings.rounds, 2, timings.device, "", False, limit / 4)[""]
    best = 2 * size**3 / product.median
    yield Row(f"a product of {size} x {size}, {precision}", best, measure="FLOP/s", figures=of_peak(best, top, best))
    config = ModelConfig.from_depth(
        shape.depth, width=shape.width, context=shape.context, vocab_size=shape.vocab_size, memory=MODELS["lrt-shared"]
    )
    for row in bench.rows(0.75 * limit):
        flops = training_flops(config, parse(str(row.figures["schedule"])), shape.context)
        rate = flops * float(row.figures["tokens_per_second"] or 0)
        name = f"{shape.depth} layers of {shape.width}, {precision}: {row.name}"
        yield Row(name, rate, measure="FLOP/s", figures=of_peak(rate, top, best), about=dict(row.figures))


def of_peak(rate: float, top: float | None, best: float) -> dict[str, float | str | None]:
    """FLOP/s over the data sheet's, None where no sheet is known, and over the product's."""
    return {"mfu": None if top is None else rate / top, "of_product": rate / best}


def memory_parts(timings: Timings) -> list[Part]:
    """The peak of each schedule, with nothing, blocks and passes recomputed."""
    precision, compiled = timings.modes[0]
    bench = dataclasses.replace(
        timings.bench(timings.steps, precision, compiled), recompute=("blocks", "passes"), rounds=1
    )

    def run(limit: float) -> Iterator[Row]:
        for row in bench.rows(limit):
            figures = {"peak_bytes": row.figures["peak_bytes"]}
            yield Row(row.name, float(row.figures["peak_ratio"] or 0), measure="peak over plain", figures=figures)

    return [(f"peak memory, {precision}", run)]


def decode_parts(timings: Timings) -> list[Part]:
    """Milliseconds per token, LRT and Transformer of as many parameters in turn, for each number of rows."""
    return [(f"decoding, {batch} rows", partial(decode_rows, timings, batch)) for batch in timings.batches]


def decode_rows(timings: Timings, batch: int, limit: float) -> Iterator[Row]:
    """A row for each model and decoder: its time over the Transformer's in the same decoder.

    `compiled` runs CUDA graphs on CUDA; how often torch left them is said beside it, and is to be 0.
    """
    shape = timings.steps
    shape = dataclasses.replace(shape, context=max(shape.context, STEPS + 1))
    configs = widen({name: shape.config(family) for name, family in PAIR.items()})
    works: dict[tuple[str, str], Work] = {}
    before = cudagraph_skips()
    for name, config in configs.items():
        torch.manual_seed(0)
        model = LatentRecurrentTransformer(config).to(timings.device, timings.dtype).eval()
        for mode in timings.decode:
            works[name, mode] = decode_greedily(decoder(model, model.empty_state(batch, STEPS + 1), mode), batch)
    names = {key: ", ".join(key) for key in works}
    measured = alternate({names[k]: w for k, w in works.items()}, timings.rounds, 2, timings.device, "", False, limit)
    for (name, mode), key in names.items():
        seconds = measured[key].median / STEPS
        figures = {"ms_per_token": 1000 * seconds, "tokens_per_second": batch / seconds}
        ratio = measured[key].ratio(measured[names["transformer", mode]])
        title, about = f"{batch} rows, {mode}: {name}", {"rounds": len(measured[key].seconds)}
        yield Row(title, *ratio, measure="over the transformer", figures=figures, about=about)
    if torch.device(timings.device).type == "cuda" and "compiled" in timings.decode and before is not None:
        left = (cudagraph_skips() or 0) - before
        yield Row(f"{batch} rows, compiled: graphs that torch did not record", left, at_most=0, measure="graphs")


def prefill_parts(timings: Timings) -> list[Part]:
    """A prompt by sweeps, in one plain forward, and token by token."""
    return [(f"prefill of {timings.prompt} tokens", partial(prefill_rows, timings))]


def prefill_rows(timings: Timings, limit: float) -> Iterator[Row]:
    """Each way over one plain forward, with its forwards, its time, and how many times faster than token by token."""
    if timings.trained is None:
        torch.manual_seed(0)
        config = dataclasses.replace(timings.steps.config("recommended"), context=timings.prompt)
        model = LatentRecurrentTransformer(config).to(timings.device, timings.dtype).eval()
    else:
        model = checkpoint.load(timings.trained, timings.device)[0].to(timings.dtype).eval()
    length = min(timings.prompt, model.config.context)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(timings.device)
    calibration = calibrate(model, tokens[:, :LENGTH], progress=False)
    work = prefill_work(model, tokens, calibration, calibration.plan("fast").groups, 1)
    with torch.no_grad():
        certificates = {mode: work[mode]() for mode in ("fast", "converged")}
        quick = {name: work[name] for name in ("plain", "fast", "converged")}
        times = alternate(quick, timings.rounds, 1, timings.device, "", False, limit / 4)
        # Token by token takes far longer: the fewest rounds, beside candidates of its own.
        slow = alternate({n: work[n] for n in ("exact", *quick)}, FEWEST, 0, timings.device, "", False, limit / 2)
    forwards = {"plain": 1.0, "exact": 1.0, **{mode: c.forwards for mode, c in certificates.items()}}
    calls = {"plain": 1, "exact": length, **{mode: calls_of(c) for mode, c in certificates.items()}}
    for name in ("plain", "fast", "converged", "exact"):
        timing, base = (slow[name], slow["plain"]) if name == "exact" else (times[name], times["plain"])
        figures = {
            "forwards": forwards[name],
            "calls": calls[name],
            "ms": 1000 * timing.median,
            "times_faster_than_exact": slow["exact"].ratio(slow[name])[0],
        }
        about = {} if name not in certificates else certificates[name].to_dict()
        title = {"plain": "one plain forward", "exact": "token by token"}.get(name, name)
        yield Row(f"{length} tokens, {title}", *timing.ratio(base), measure="over plain", figures=figures, about=about)


def calls_of(certificate: Certificate) -> int:
    """How often the model is called one after another: once per class of each sweep, once per token where exact."""
    exact = certificate.tokens if certificate.path in ("exact", "fallback") else 0
    return exact + (certificate.groups or 0) * certificate.sweeps
