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

Scalars are read as in YAML 1.2: 1e-3 is a number, and yes, no, on and off are text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
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
    return tuple(read_yaml(HERE / f"{study}.yaml")["editions"])


def read_study(study: str, edition: str) -> Study:
    """A study by its name, or from a file of one's own. ValueError that names the file and what is wrong in it."""
    # A file of one's own may have the name of a shipped study, given with its suffix.
    path = HERE / f"{study}.yaml" if study in known_studies() else Path(study)
    if path.suffix != ".yaml":
        raise ValueError(f"unknown study {study!r}; choose one of {', '.join(known_studies())}, or give a .yaml file")
    data = read_yaml(path)
    if not isinstance(data, dict) or set(data) != {"kind", "editions"} or not isinstance(data["editions"], dict):
        raise ValueError(f"{path} is no study; at its top it has `kind` and `editions`, and nothing else")
    if edition not in data["editions"]:
        known = ", ".join(map(str, data["editions"]))
        raise ValueError(f"{path} has no edition {edition!r}; its `editions` are {known}")
    try:
        return make_study(path.stem, edition, str(data["kind"]), data["editions"][edition])
    except ValueError as error:
        raise ValueError(f"{path}: edition {edition}: {error}") from error


def make_study(name: str, edition: str, kind: str, content: Any) -> Study:
    """A study of an edition's content, as its file has it. ValueError that names the field that is wrong."""
    check_edition(content)
    sweep = Sweep(**content["sweep"]) if "sweep" in content else None
    return Study(name, edition, kind, tuple(content["axes"]), tuple(make_cells(content)), sweep)


class Loader(yaml.SafeLoader):
    """PyYAML's, which reads YAML 1.1, with the numbers and truth values of YAML 1.2."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> Any:
    """Plain data from a file. ValueError that names it where it is no YAML; OSError where it cannot be read."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{path} is no YAML: {place}{error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-13-01
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error


def check_edition(content: Any) -> None:
    """ValueError, naming the field, unless an edition has the form that the top of this file shows."""
    check_kind("the edition", content, dict, "fields")
    if not set(content) <= KEYS or not {"seeds", "axes"} <= set(content):
        raise ValueError(
            f"it has {', '.join(map(str, content)) or 'no fields'}; it needs seeds and axes, and may have "
            f"{', '.join(sorted(KEYS - {'seeds', 'axes'}))}"
        )
    check_seeds("seeds", content["seeds"])
    check_fields("base", content.get("base", {}))
    check_kind("axes", content["axes"], dict, "axes, each with choices")
    for axis, choices in content["axes"].items():
        check_kind(f"axes: {axis}", choices, dict, "choices, each with fields")
        for choice, fields in choices.items():
            check_kind(f"axes: {axis}: the choice {choice}", choice, str, "text; write it in quotes")
            check_fields(f"axes: {axis}: {choice}", fields or {})  # YAML reads `lrt: ` as None
    check_kind("without", content.get("without", []), list, "lists of choices")
    for choices in content.get("without", []):
        check_kind("without", choices, list, "lists of choices")
    if "sweep" in content:
        check_sweep(content["sweep"], content["axes"])


def check_sweep(sweep: Any, axes: dict[str, Any]) -> None:
    if not isinstance(sweep, dict) or set(sweep) != {"axis", "by"}:
        raise ValueError(f"sweep is {sweep!r}; it has `axis` and `by`")
    if sweep["axis"] not in axes:
        raise ValueError(f"it sweeps over {sweep['axis']}, which is none of its axes: {', '.join(axes)}")


def check_fields(where: str, fields: Any) -> None:
    """Those of a base or a choice, as far as every kind of study has them. What else they may be, its kind knows."""
    check_kind(where, fields, dict, "fields")
    for name in fields:
        check_kind(f"{where}: the field {name}", name, str, "a name")
    if "seeds" in fields:
        check_seeds(f"{where}: seeds", fields["seeds"])
    minutes = fields.get("minutes", 0)
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 <= minutes < float("inf"):
        raise ValueError(f"{where}: minutes is {minutes!r}; give a number of at least 0")


def check_seeds(where: str, seeds: Any) -> None:
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"{where} is {seeds!r}; give whole numbers from 0 on, such as [0, 1, 2]")


def check_kind(where: str, content: Any, kind: type, wanted: str) -> None:
    if not isinstance(content, kind):
        raise ValueError(f"{where} is {content!r}; it has to be {wanted}")


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
