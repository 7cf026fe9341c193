"""`lrt calibrate` and `lrt bench train|attention|inference|equality`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lrt.experiments.bench.options import AttentionOptions, TrainOptions

if TYPE_CHECKING:
    from lrt.experiments.bench.rows import Row


def print_rows(rows: Sequence[Row], about: dict[str, Any], as_json: bool) -> None:
    """Rows on standard output: one line of JSON, or a table under the hardware."""
    from lrt.experiments.bench.rows import hardware_title, print_json, print_table

    if as_json:
        print_json(rows, about)
    else:
        print_table(rows, hardware_title(about))


@dataclass(frozen=True)
class Calibrate:
    """Measure how a model is best prefilled on this device, and keep that beside its checkpoint."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run's."""
    text: Path | None = None
    """A UTF-8 text like your prompts. None: what the model itself writes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def run(self) -> None:
        import torch

        from lrt.inference import cost_model
        from lrt.inference.calibrate import LENGTH, calibrate, sample_text
        from lrt.model import checkpoint
        from lrt.utils.device import choose_device

        folder = checkpoint.verify(self.checkpoint)
        model, tokenizer = checkpoint.load(folder, choose_device(self.device))
        length = min(LENGTH, model.config.context)
        if self.text is None:
            tokens = sample_text(model, tokenizer.bos, length)
        else:
            ids = [tokenizer.bos, *tokenizer.encode(self.text.read_text(encoding="utf-8"))][:length]
            tokens = torch.tensor([ids], device=model.embedding.weight.device)
        measured = calibrate(model, tokens)
        cost_model.write_calibration(folder, measured)
        print(f"{folder / cost_model.FILE}: {measured.device}; a call costs {measured.overhead:.1f} positions more")
        for mode, plan in measured.plans.items():
            edge = measured.break_even(plan, 1, cost_model.block_shares(model.config))
            print(f"  {mode:10} stride {plan.groups}, {plan.sweeps} sweeps; token by token up to {edge:.0f} tokens")


@dataclass(frozen=True)
class Inference:
    """What the engine promises, as ratios measured in one run, each beside its target."""

    checkpoints: tyro.conf.Positional[Path]
    """A folder with a pair of runs, lrt/ and transformer/; benchmarks/inference_models.py trains one."""
    data: Path | None = None
    """The folder that `lrt prepare` wrote for them. None: data/ in the same folder."""
    only: tuple[str, ...] = ()
    """Sections to measure. None: all."""
    rounds: int = 10
    """Alternated rounds per timing."""
    json: bool = False
    """Print one JSON object instead of a table."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def run(self) -> None:
        from lrt.experiments.bench import inference
        from lrt.utils.device import choose_device
        from lrt.utils.provenance import hardware

        data, device = self.data or self.checkpoints / "data", choose_device(self.device)
        sections = inference.choose_sections(self.only)
        pair = inference.read_pair(self.checkpoints, data, device, self.rounds)
        rows = [row for section in sections for row in section(pair)]
        print_rows(rows, {"calibration": pair.calibration.to_dict(), "hardware": hardware(device)}, self.json)


@dataclass(frozen=True)
class BenchEquality:
    """Count the tokens in which forked, cropped, rewound, saved, split and batched texts differ from those alone."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run's."""
    text: Path | None = None
    """A UTF-8 text, pieces of which are the prompts. None: what the model itself writes."""
    new_tokens: int = 64
    """Tokens compared per prompt and path."""
    json: bool = False
    """Print one JSON object instead of a table."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def run(self) -> None:
        from lrt.experiments.bench import equality
        from lrt.inference.calibrate import sample_text
        from lrt.model import checkpoint
        from lrt.utils.device import choose_device
        from lrt.utils.provenance import hardware

        device = choose_device(self.device)
        model, tokenizer = checkpoint.load(self.checkpoint, device)
        if self.text is None:
            ids: list[int] = sample_text(model, tokenizer.bos, model.config.context)[0].tolist()
        else:
            ids = tokenizer.encode(self.text.read_text(encoding="utf-8"))
        prompts = equality.split_prompts(ids, model.config.context - self.new_tokens)
        if len(prompts) == 0:
            raise ValueError(f"{len(ids)} tokens of text are too few; give at least {equality.LENGTHS[0]}")
        print_rows(equality.equality_rows(model, prompts, self.new_tokens), {"hardware": hardware(device)}, self.json)


class BenchTrain(TrainOptions):
    __doc__ = TrainOptions.__doc__

    def run(self) -> None:
        from lrt.experiments.bench.train import TrainBench

        TrainBench(**vars(self)).run()


class BenchAttention(AttentionOptions):
    __doc__ = AttentionOptions.__doc__

    def run(self) -> None:
        from lrt.experiments.bench.attention import AttentionBench

        AttentionBench(**vars(self)).run()


Suite = (
    Annotated[BenchTrain, tyro.conf.subcommand("train", prefix_name=False)]
    | Annotated[BenchAttention, tyro.conf.subcommand("attention", prefix_name=False)]
    | Annotated[Inference, tyro.conf.subcommand("inference", prefix_name=False)]
    | Annotated[BenchEquality, tyro.conf.subcommand("equality", prefix_name=False)]
)


@dataclass(frozen=True)
class Bench:
    """Measure this machine, and what the library promises on it."""

    suite: Annotated[Suite, tyro.conf.arg(name="")]
    """What to measure."""

    def run(self) -> None:
        from lrt.utils.device import choose_device

        dataclasses.replace(self.suite, device=choose_device(self.suite.device)).run()
