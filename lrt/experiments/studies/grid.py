"""A study as data: a YAML file that names what a cell runs and, per edition, the axes whose product the cells are.

    kind: tracking                      # what a cell runs: a name in kinds.KINDS
    editions:
      tiny:
        seeds: [0, 1, 2]
        base: {steps: 500, model: {depth: 2, width: 64}}
        axes:
          task: {parity: {task: parity}, mod5: {task: mod5, steps: 2000}}
          model: {lrt: {}, transformer: {model: {memory: {injection: none}}}}

A cell's fields are the base with those of its choice on every axis laid over it, axis by axis, and its seed. `minutes`
says how long a cell takes about; it decides nothing. `without` lists choices that are left out: [mod5, transformer].
`seeds` among a choice's fields: it runs only with those of the edition's. A finished cell is known by a hash of its
fields, so that a changed field is another cell; `minutes` and `seeds` are none of them.

`sweep: {axis: rate, by: val_live_bpb}`: all choices of that axis run with the first seed; with the others, only the one
whose result `by` was lowest there, for each combination of the other axes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Fields = dict[str, Any]
HERE = Path(__file__).parent
KEYS = {"seeds", "base", "axes", "without", "sweep"}


@dataclass(frozen=True)
class Sweep:
    """An axis all of whose choices run with the first seed only."""

    axis: str
    by: str
    """The number of a result that is to be low."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    choices: tuple[str, ...]
    """Its choice on every axis, in order."""
    seed: int
    fields: Fields
    """All that decides it, as plain data."""
    minutes: float
    """How long it takes, about, on the edition's hardware."""

    @property
    def name(self) -> str:
        return "/".join((*self.choices, str(self.seed)))

    @property
    def key(self) -> str:
        """A hash of the fields: a result of other fields is another cell's."""
        # Committed results carry this hash: neither its form nor the fields' order in it may change.
        return hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Study:
    """The cells of one edition of a study."""

    name: str
    edition: str
    kind: str
    axes: tuple[str, ...]
    cells: tuple[Cell, ...]
    sweep: Sweep | None = None

    def apart_from_sweep(self, cell: Cell) -> tuple[str, ...]:
        """A cell's choices on the axes that are not swept."""
        swept = self.sweep.axis if self.sweep else None
        return tuple(choice for axis, choice in zip(self.axes, cell.choices, strict=True) if axis != swept)

    @property
    def results(self) -> str:
        """The name of its file of results."""
        return f"{self.name}.{self.edition}.jsonl"


def known_studies() -> tuple[str, ...]:
    """The studies that come with the library."""
    return tuple(sorted(path.stem for path in HERE.glob("*.yaml")))


def editions(study: str) -> tuple[str, ...]:
    """The editions of a study that comes with the library."""
    return tuple(yaml.safe_load((HERE / f"{study}.yaml").read_text())["editions"])


def read_study(study: str, edition: str) -> Study:
    """A study by its name, or from a file of one's own. ValueError that names what is wrong."""
    # A file of one's own may have the name of a shipped study, given with its suffix.
    path = HERE / f"{study}.yaml" if study in known_studies() else Path(study)
    if path.suffix != ".yaml":
        raise ValueError(f"unknown study {study!r}; choose one of {', '.join(known_studies())}, or give a .yaml file")
    data = yaml.safe_load(path.read_text())
    if not isinstance(data, dict) or set(data) != {"kind", "editions"} or edition not in data["editions"]:
        raise ValueError(
            f"{path} has no edition {edition!r}; a study has `kind` and `editions`, here "
            f"{', '.join(data.get('editions', ())) if isinstance(data, dict) else 'neither'}"
        )
    content = data["editions"][edition]
    if not set(content) <= KEYS or not {"seeds", "axes"} <= set(content):
        raise ValueError(
            f"{path}: edition {edition} has {', '.join(content)}; it needs seeds and axes, and may have "
            f"{', '.join(sorted(KEYS - {'seeds', 'axes'}))}"
        )
    sweep = Sweep(**content["sweep"]) if "sweep" in content else None
    if sweep is not None and sweep.axis not in content["axes"]:
        raise ValueError(
            f"{path}: edition {edition} sweeps over {sweep.axis}, which is none of its axes: "
            f"{', '.join(content['axes'])}"
        )
    return Study(path.stem, edition, data["kind"], tuple(content["axes"]), tuple(make_cells(content)), sweep)


def make_cells(edition: dict[str, Any]) -> list[Cell]:
    """The product of the axes and the seeds; seeds are the outermost, so that a study that is stopped has one whole."""
    left_out = [set(choices) for choices in edition.get("without", ())]
    known = {name for axis in edition["axes"].values() for name in axis}
    unknown = set().union(*left_out) - known
    if unknown:
        raise ValueError(
            f"`without` has {', '.join(map(repr, sorted(unknown)))}, which is no choice; the choices are "
            f"{', '.join(sorted(known))}"
        )
    cells = []
    for seed, *choices in itertools.product(edition["seeds"], *(axis.items() for axis in edition["axes"].values())):
        names = tuple(name for name, _ in choices)
        if any(excluded <= set(names) for excluded in left_out):
            continue
        fields: Fields = {"seed": seed}
        # YAML reads `lrt: ` as None: a choice that changes nothing.
        for over in (edition.get("base", {}), *(fields or {} for _, fields in choices)):
            fields = merge_fields(fields, over)
        # Neither decides a run: they are no fields of it, and not in its key.
        minutes = float(fields.pop("minutes", 0))
        seeds = fields.pop("seeds", edition["seeds"])
        if not set(seeds) & set(edition["seeds"]):
            raise ValueError(f"{'/'.join(names)} has seeds {seeds}, none of the edition's")
        if seed in seeds:
            cells.append(Cell(names, seed, fields, minutes))
    return cells


def merge_fields(under: Fields, over: Fields) -> Fields:
    """Fields with those of `over` in the place of, or beside, those of `under`; nested ones likewise."""
    merged = dict(under)
    for name, value in over.items():
        old = merged.get(name)
        merged[name] = merge_fields(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
