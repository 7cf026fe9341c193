"""How a model is fine-tuned: the flags of `lrt finetune`, and the numbers that `finetune` takes."""

from __future__ import annotations

from dataclasses import dataclass

from lrt.utils.validation import Limits, check_numbers

LIMITS = {
    "lora": Limits(0, 65536, whole=True),
    "lr": Limits(0, 1, above=True, optional=True),
    "pathway_rate": Limits(0, 1e6, above=True, optional=True),
    "gate_rate": Limits(0, 1e6, above=True, optional=True),
    "epochs": Limits(0, 1e6, above=True),
    "steps": Limits(1, 2**31, whole=True, optional=True),
    "batch": Limits(1, 2**20, whole=True),
    "accumulate": Limits(1, 2**20, whole=True),
    "length": Limits(8, 2**30, whole=True),
    "val": Limits(0.0001, 0.9),
}


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """Numbers of a fine-tuning."""

    lora: int = 0
    """Rank of the adapters that are trained in place of the weights; 0 trains all weights."""
    lr: float | None = None
    """The highest learning rate; it warms up over 3 % of the steps, and falls to zero. None: 2e-4 with adapters, 2e-5
    without."""
    pathway_rate: float | None = None
    """Of a retrofitted model: how many times as high the rate of the pathway is, which is new where the rest is not.
    None: 10."""
    gate_rate: float | None = None
    """The same of its gates and of γ alone. None: as --pathway-rate. T²MLR took 100 for its gates."""
    freeze: bool = False
    """Of a retrofitted model: train the pathway alone."""
    epochs: float = 1.0
    """How often every row is seen."""
    steps: int | None = None
    """Stop after so many steps."""
    batch: int = 8
    """Rows of a step on the device at a time."""
    accumulate: int = 1
    """Times that many are one step."""
    length: int = 1024
    """Tokens of a row at most; what is longer is cut."""
    packing: bool = False
    """Put several rows into one of --length; they do not read each other."""
    val: float = 0.05
    """The share of the rows that is held out and scored, live."""
    seed: int = 0
    """Decides which rows are held out, and their order."""


def check_options(options: FinetuneOptions) -> None:
    """ValueError, naming it, where a number makes no sense."""
    check_numbers(options, LIMITS)
