"""How a model is best prefilled on a device: the stride of the sweeps, how many they take, what a call costs.

A call that computes n positions takes time ∝ overhead + n. The overhead, counted in positions, is the one number of a
device: 12 to 24 were measured for a d6 on one and two CPU cores, where reading the weights dominates. On a GPU, where
launches do, a thousand is taken until it is measured there. Token by token, a batch of many rows on a CPU costs little
more than one forward, so that sweeps do not pay there.

Measured by `calibrate.py`, kept in calibration.json beside a checkpoint's files and not among them: it is a fact of a
device too. So a checkpoint does not need it, and its manifest does not list it. There is one entry per device, which
names the weights by their fingerprint and is ignored for others. Without one `fallback` serves: the same on every
machine, never wrong, only slower.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lrt.model.config import ModelConfig
from lrt.model.execution import EAGER, Execution
from lrt.model.fingerprint import fingerprint
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.utils.files import replace_atomically

FILE = "calibration.json"
FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """How one mode is swept."""

    groups: int
    """Stride g of the Gauss-Seidel sweeps."""
    sweeps: int
    """How many a typical prompt takes."""


class BlockShares(NamedTuple):
    """How a prefill runs the blocks: three shares, together 1."""

    below: float
    """Of those that depend on no memory and lie below the others: once."""
    swept: float
    """In every sweep."""
    above: float
    """Of those above the memory's highest layer: twice."""


ALL_SWEPT = BlockShares(0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Calibration:
    """What decides between sweeps and token by token. All costs are in positions; `length` and `rows` are counts."""

    overhead: float
    """A call's fixed cost, counted in positions."""
    plans: dict[str, Plan]
    """By mode: converged and fast."""
    device: str = ""
    """Where it was measured; empty where it was not."""
    model: str = ""
    """Fingerprint of the model that it was measured with."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    def exact_cost(self, length: int, rows: int) -> float:
        """The cost of `length` positions of `rows` rows token by token."""
        return length * (self.overhead + rows)

    def sweep_cost(self, length: int, rows: int, groups: int, share: float = 1.0) -> float:
        """The cost of one sweep over them that runs a `share` of the blocks: a call per class, and all positions."""
        return share * (min(groups, length) * self.overhead + length * rows)

    def pass_cost(self, length: int, rows: int, share: float) -> float:
        """The cost of a `share` of the blocks over them, in one call."""
        return share * (self.overhead + length * rows)

    def plan(self, mode: str) -> Plan:
        """The plan of a mode; one sweep has the stride of `converged`."""
        return Plan(self.plans["converged"].groups, 1) if mode == "one_sweep" else self.plans[mode]

    def break_even(self, plan: Plan, rows: int, shares: BlockShares = ALL_SWEPT) -> float:
        """The length up to which token by token costs no more than the sweeps; infinite for many rows on a CPU.

        Where `exact_cost` meets `plan.sweeps` times `sweep_cost`, and `pass_cost` of what runs once and twice, solved
        for the length.
        """
        swept, passes = plan.sweeps * shares.swept, shares.below + 2 * shares.above  # forwards
        saved = self.overhead + rows - (swept + passes) * rows  # per position, by sweeping it
        return (swept * plan.groups + passes) * self.overhead / saved if saved > 0 else math.inf


def swept_blocks(config: ModelConfig, execution: Execution) -> range:
    """The blocks that a sweep runs, counted from 0, loop after loop: those that the memory needs and that need it, or
    all."""
    if execution.blocks == "all":
        return range(config.kv_layers)
    return range(config.blocks_below_memory, config.memory_blocks)


def block_shares(config: ModelConfig, execution: Execution = EAGER) -> BlockShares:
    """How a prefill runs the blocks."""
    swept, count = swept_blocks(config, execution), config.kv_layers
    return BlockShares(swept.start / count, len(swept) / count, 1 - swept.stop / count)


def fallback(device: torch.device) -> Calibration:
    """The calibration of an unmeasured model: WhiteMatter's g = 16 (arXiv:2608.18486), a device's typical overhead."""
    overhead = 1000.0 if device.type == "cuda" else 16.0  # launches on a GPU; reading the weights on a CPU
    return Calibration(overhead, {"converged": Plan(16, 7), "fast": Plan(16, 4)})


def device_name(device: torch.device) -> str:
    """What a calibration is good for: a GPU by name, a CPU by its instructions and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    kind = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
    return f"{platform.machine()} {kind}, {torch.get_num_threads()} threads"


def read_calibration(folder: str | Path, model: LatentRecurrentTransformer) -> Calibration:
    """The calibration beside a checkpoint for this model and its device; `fallback` where there is none.

    Raises ValueError where the file is damaged, OSError where it cannot be read.
    """
    device = model.embedding.weight.device
    measured = _read_entries(Path(folder) / FILE).get(device_name(device))
    # An entry of other weights is of no use: how fast a model contracts is a fact of its weights.
    return measured if measured and measured.model == fingerprint(model) else fallback(device)


def write_calibration(folder: str | Path, calibration: Calibration) -> None:
    """Keep a calibration beside a checkpoint, in the place of an older one for its device. Raises as reading does."""
    file = Path(folder) / FILE
    entries = {**_read_entries(file), calibration.device: calibration}
    data = {"format": FORMAT, "entries": [entry.to_dict() for entry in entries.values()]}
    replace_atomically(file, json.dumps(data, indent=2) + "\n")


def _read_entries(file: Path) -> dict[str, Calibration]:
    """By device; none without a file. ValueError where it is damaged, OSError where it cannot be read."""
    if not file.exists():
        return {}
    try:
        data = json.loads(file.read_text())
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r}, this version reads {FORMAT}")
        return {entry["device"]: _parse_entry(entry) for entry in data["entries"]}
    # Not OSError: a file that cannot be read (permissions, a lost disk) may be whole, and must not be deleted for it.
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no calibration ({error!r}); delete it, and run `lrt calibrate` again") from error


def _parse_entry(entry: dict[str, Any]) -> Calibration:
    """A calibration from its JSON. ValueError, KeyError or TypeError where it is none, or costs make no sense."""
    plans = {mode: Plan(**plan) for mode, plan in entry.pop("plans").items()}
    calibration = Calibration(plans=plans, **entry)
    if {"converged", "fast"} - plans.keys() or min(min(p.groups, p.sweeps) for p in plans.values()) < 1:
        raise ValueError(f"plans {plans}, of which each needs at least one group and one sweep")
    if not (math.isfinite(calibration.overhead) and calibration.overhead >= 0):
        raise ValueError(f"an overhead of {calibration.overhead}")
    return calibration
