"""What is asked of `lrt fair`, and the cells of the study that it comes to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from lrt.data.prepared import Prepared
from lrt.experiments.rivals import rivals
from lrt.experiments.studies.grid import Fields, Study, make_study
from lrt.experiments.studies.language import BASELINE, build_model
from lrt.model.config import MODEL_LIMITS
from lrt.model.memory import INJECTIONS
from lrt.model.size import count_parameters
from lrt.schedules import library as schedules
from lrt.training import recipes
from lrt.utils.validation import Limits

Equal = Literal["tokens", "wall_clock", "both"]
TOKENS, WALL_CLOCK = "tokens", "wall-clock"
"""What may be equal, as cells and tables name it."""
LRT = "recommended"
"""The family that `lrt` stands for."""
HEAD = 32
"""Width of a head."""
LIMITS = {
    "minutes": Limits(0, 10**7, above=True),
    "seeds": Limits(1, 10**4, whole=True),
    "rates": Limits(0, 10**3, above=True),
    "depth": MODEL_LIMITS["depth"],
    "width": MODEL_LIMITS["width"],
    "context": dataclasses.replace(MODEL_LIMITS["context"], least=2),  # of one token there is no previous one
}
"""What is asked for may be."""


@dataclass(frozen=True)
class Plan:
    """What the minutes come to."""

    tokens: int
    """That each model is trained on, the Transformer's at equal time."""
    targets: int
    """Tokens of val and of test that each is scored on, at most."""
    parameters: int
    """That every model is widened to."""
    training: dict[str, float]
    """By model, minutes that one of its cells trains for at equal tokens."""
    scoring: dict[str, float]
    """By model, minutes that one of its cells is scored for."""

    def cell_minutes(self, equal: str, name: str) -> float:
        """What a cell takes: at equal time all train for as long as the Transformer."""
        return self.training[paced_by(equal, name)] + self.scoring[name]


def paced_by(equal: str, name: str) -> str:
    """Whose training says how long that of a model's cell takes."""
    return BASELINE if equal == WALL_CLOCK else name


@dataclass(frozen=True)
class Comparison:
    """What is asked for. ValueError for what cannot be compared."""

    models: tuple[str, ...] = ("transformer", "token-shift", "lrt")
    """Names of families, or of registered injections; the first is what the others are compared with."""
    seeds: int = 3
    """How many, from 0 on."""
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Factors on all learning rates."""
    equal: Equal = "tokens"
    """What the models have in common beside their parameters."""
    minutes: float = 30.0
    """How long all of it may take, about."""
    depth: int = 4
    """Blocks."""
    width: int = 128
    """Of a model; its heads are HEAD wide."""
    context: int = recipes.CONTEXT
    """Tokens of a row."""

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            value: Any = vars(self)[name]
            for number in value if isinstance(value, tuple) else (value,):
                if not limit.allow(number):
                    raise ValueError(f"--{name} is {number:g}; it must be {limit}")
        if self.width % HEAD != 0:
            raise ValueError(f"--width is {self.width}; it must be a multiple of {HEAD}, the width of a head")
        if not self.rates:
            raise ValueError("--rates names none; give at least one factor, such as 1")
        if len(set(map(rate_label, self.rates))) < len(self.rates):
            named = " ".join(map(rate_label, self.rates))
            raise ValueError(f"--rates is {named}; name each rate once, apart in its first six digits")
        if len(self.models) < 2 or len(set(self.labels)) < len(self.models):
            raise ValueError(f"--models is {' '.join(self.models)}; name at least two, each once")
        for name in self.models:
            family_fields(name, self.depth)

    @property
    def labels(self) -> tuple[str, ...]:
        """The models as tables name them."""
        return tuple(map(label, self.models))

    @property
    def batch_size(self) -> int:
        """Rows of a step: as many tokens as the demo's, where the context is not longer."""
        return max(1, recipes.DEMO_OPTIM.reference_batch // self.context)

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.context

    def groups(self) -> dict[str, tuple[str, ...]]:
        """What is equal -> the models that have cells of their own there."""
        groups = {"tokens": [TOKENS], "wall_clock": [WALL_CLOCK], "both": [TOKENS, WALL_CLOCK]}[self.equal]
        # Beside itself the Transformer is the same run at equal time.
        others = tuple(name for name in self.labels if name != BASELINE)
        return {equal: others if equal != groups[0] else self.labels for equal in groups}

    def make_study(self, data: Prepared, plan: Plan) -> Study:
        """Its cells on a prepared text, for as long as `plan` says."""
        groups = self.groups()
        content = {
            "seeds": list(range(self.seeds)),
            "sweep": {"axis": "rate", "by": "val_live_bpb"},
            "base": {"targets": plan.targets},
            "axes": {
                "equal": {equal: {"equal": equal.replace("-", "_")} for equal in groups},
                "rate": {rate_label(rate): {"rate": rate} for rate in self.rates},
                "model": {label(name): self.fields(name, data, plan.tokens, plan.parameters) for name in self.models},
            },
            "without": [[equal, name] for equal, own in groups.items() for name in self.labels if name not in own],
        }
        study = make_study("fair", "own", "fair", content)
        timed = [
            dataclasses.replace(cell, minutes=plan.cell_minutes(cell.choices[0], cell.choices[2]))
            for cell in study.cells
        ]
        return dataclasses.replace(study, cells=tuple(timed))

    def fields(self, name: str, data: Prepared, tokens: int, parameters: int) -> Fields:
        """A model's cell, apart from seed and rate, widened to so many parameters."""
        return {**self.plain_fields(name, data, tokens), "widened_to": parameters}

    def plain_fields(self, name: str, data: Prepared, tokens: int) -> Fields:
        """A model's cell as it is, before it is widened."""
        optim = {k: v for k, v in dataclasses.asdict(recipes.DEMO_OPTIM).items() if v is not None}
        size = {"depth": self.depth, "width": self.width, "heads": self.width // HEAD, "context": self.context}
        # The text by its fingerprint: a cell is the same wherever its folder lies.
        shared = {"text": data.fingerprint, "size": size, "optim": optim, "horizon": f"tokens={tokens}"}
        return {**shared, "batch_size": self.batch_size, **family_fields(name, self.depth)}

    def sizes(self, data: Prepared) -> dict[str, int]:
        """By model, its parameters before it is widened."""
        models = {label(name): build_model(self.plain_fields(name, data, 1), data.vocab_size) for name in self.models}
        return {name: count_parameters(model)[0] for name, model in models.items()}


def label(name: str) -> str:
    """A model's name as tables have it: hyphens of the command line are spaces."""
    return name.replace("-", " ")


def rate_label(rate: float) -> str:
    """A rate's name in cells and tables."""
    return f"{rate:g}"


def family_fields(name: str, depth: int) -> Fields:
    """The fields of a cell that say which model it is: a family's, or those of an injection of the user's own.

    ValueError with the known names.
    """
    families, plain = rivals(depth), label(name)
    if plain in families:
        return {"family": plain}
    if plain == "lrt":
        return {"family": LRT}
    if name in INJECTIONS and name != "none":
        return {"family": "shared", "schedule": schedules.DEFAULT, "model": {"memory": {"injection": name}}}
    known = ", ".join(["lrt", *(family.replace(" ", "-") for family in families)])
    raise ValueError(f"unknown model {name!r}; choose among {known}, or an injection that --plugin registers")
