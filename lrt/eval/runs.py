"""What is known of a run, read in one place: its size, its cost, and every score with what it was measured on.

Report, model card, demo and command line take scores from here. Bits per byte of other texts, splits or windows are not
comparable, so a score carries its `ScoredOn`, and scores stand in one column only where these are equal.

Everything is read from JSON; no model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrt.eval import results
from lrt.eval.results import Result
from lrt.model.checkpoint import snapshots
from lrt.model.config import ModelConfig
from lrt.model.memory_config import MODEL_KINDS
from lrt.model.size import count_parameters
from lrt.utils import plugins
from lrt.utils.files import read_json
from lrt.utils.json_lines import read_json_lines
from lrt.utils.validation import shorten

ABOUT: dict[str, type] = {"schedule": str, "data": str, "corpus": str, "trained": dict, "scores": dict}
"""What a checkpoint says about itself, as far as it is read here."""


@dataclass(frozen=True)
class ScoredOn:
    """What a score was measured on. Equal ones mean comparable scores."""

    data: str
    """Fingerprint of the prepared data; where an older version noted none, what it says of the text."""
    split: str
    context: int | None
    """Of the windows, in tokens."""
    targets: int | None
    """Tokens scored. None: an older version noted none."""
    name: str = field(default="", compare=False)
    """The corpus's, for people."""

    @property
    def label(self) -> str:
        """In words."""
        count = "an unknown number of" if self.targets is None else f"{self.targets:,}"
        windows = "" if self.context is None else f" in windows of {self.context:,}"
        return f"{self.name or short(self.data)}, {self.split}: {count} tokens{windows}"


def short(data: str) -> str:
    """A fingerprint for people; other words as they are."""
    return data if " " in data else f"data {data[:12]}"


@dataclass(frozen=True)
class Score:
    """Numbers of one run on one text."""

    on: ScoredOn
    values: Mapping[str, Any]
    """Bits per byte by the names of `Metrics`; `interval` of live, (low, high); `schedule` of the parallel score."""

    def cell(self, key: str) -> str:
        """A number as text; empty where it is not known."""
        value = self.values.get(key)
        if value is None or key == "schedule":
            return value or ""
        if key == "interval":
            return "[{:.4f}, {:.4f}]".format(*value)
        text = f"{value:+.4f}" if key == "gap" else f"{value:.4f}"
        return "0.0000" if float(text) == 0 else text  # what rounds to zero has no sign


def run_folder(folder: Path) -> Path:
    """The run's folder of the checkpoint in it; any other folder as it is."""
    return folder.parent if folder.name == "checkpoint" and (folder.parent / "metrics.jsonl").is_file() else folder


def run_name(folder: Path) -> str:
    """What a run, or a checkpoint, is called: by its folder."""
    return run_folder(folder).resolve().name


@dataclass(frozen=True)
class Run:
    """What is known of one run."""

    name: str
    metrics: list[dict[str, Any]]
    """The lines of metrics.jsonl; none where there is no such file."""
    config: dict[str, Any]
    """The checkpoint's config.json; empty where there is none."""
    results: list[Result]
    """What was measured of these weights."""
    demo: dict[str, Any] = field(default_factory=dict)
    """The scores that `lrt demo` wrote."""
    outdated: list[Result] = field(default_factory=list)
    """What was measured of other weights than the checkpoint's: an earlier training's in the same folder."""

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run's folder, or a checkpoint. ValueError where it has no metrics log, checkpoint or results."""
        folder = run_folder(folder)
        log, saved = folder / "metrics.jsonl", weights_folder(folder)
        metrics = read_json_lines(log)
        config = read_config(saved / "config.json") if saved is not None else {}
        places = dict.fromkeys(place / "evaluation" for place in (folder, saved or folder))
        measured = [one for place in places for one in results.read_results(place)]
        if not bool(metrics or config or measured):
            raise ValueError(
                f"{folder} is no run: it has no metrics.jsonl, checkpoint or evaluation; give a folder of `lrt train`"
            )
        weights = None if saved is None else weights_sha256(saved)
        current = [one for one in measured if weights in (None, one.checkpoint)]
        outdated = [one for one in measured if one not in current]
        return cls(run_name(folder), metrics, config, current, demo_scores(folder), outdated)

    @property
    def about(self) -> dict[str, Any]:
        """How the checkpoint came to be: schedule, what was trained, scores at the end."""
        return self.config.get("about", {})

    @property
    def trained(self) -> dict[str, Any]:
        """Tokens, seconds, FLOPs and loss of the training; empty where the checkpoint does not say."""
        return self.about.get("trained", {})

    @property
    def tokens(self) -> int | None:
        """Tokens that it was trained on."""
        return self.trained.get("tokens", self.about.get("tokens"))

    @property
    def parameters(self) -> int | None:
        """In total."""
        model = self.config.get("model")
        return count_parameters(ModelConfig.from_dict(model))[0] if model else None

    @property
    def context(self) -> int | None:
        """The model's, in tokens."""
        return self.config.get("model", {}).get("context")

    def of(self, kind: str) -> list[Result]:
        """The results of a kind."""
        return [measured for measured in self.results if measured.kind == kind]

    def values(self, kind: str) -> dict[str, Any]:
        """The first result of a kind, empty where there is none."""
        return next((measured.values for measured in self.of(kind)), {})

    def trained_text(self, split: str, targets: int | None) -> ScoredOn:
        """A split of the data that the run was trained on."""
        data = self.about.get("data") or f"unknown data of {self.name}"
        return ScoredOn(data, split, self.context, targets, self.about.get("corpus", ""))

    def scored_on(self, measured: Result, corpus: str | None = None) -> ScoredOn:
        """What a result was measured on; of several corpora, `corpus`."""
        name = corpus or measured.subject
        values = measured.values if corpus is None else measured.values["corpora"][corpus]
        targets = values.get("targets", measured.settings.get("targets"))
        noted = measured.settings.get("on", {}).get(name)
        if noted is not None:
            return ScoredOn(**noted, targets=targets, name=name.removesuffix(f"-{noted['split']}"))
        text, _, split = name.rpartition("-")  # an older version's: the corpus's name and its size in bytes
        return ScoredOn(f"{text} of {values.get('bytes')} bytes", split, self.context, targets, text)

    @property
    def scores(self) -> list[Score]:
        """Every score, one per text: what was measured later replaces what the checkpoint was saved with."""
        merged: dict[ScoredOn, dict[str, Any]] = {}
        for score in self._measured():
            merged[score.on] = {**merged.pop(score.on, {}), **score.values}
        return [Score(on, values) for on, values in merged.items()]

    def _measured(self) -> Iterator[Score]:
        """Scores as they were written, the oldest source first."""
        trained_with = {"schedule": self.about.get("schedule", "")}
        if final := self.about.get("scores"):
            yield Score(self.trained_text("val", final.get("targets")), trained_with | final)
        if self.demo:
            yield Score(self.trained_text("test", self.demo.get("targets")), trained_with | self.demo)
        for measured in self.of("scores"):
            for corpus, values in measured.values["corpora"].items():
                yield Score(self.scored_on(measured, corpus), values)
        for measured in self.of("ablations"):
            yield Score(self.scored_on(measured), measured.values)
        for measured in self.of("bpb"):
            yield Score(self.scored_on(measured), bpb_values(measured.values))


def bpb_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """A bpb result's scores by the names of `Metrics`."""
    columns = values["columns"]
    scores = {f"{name}_bpb": columns[name]["bpb"] for name in ("live", "parallel") if name in columns}
    if len(scores) == 2:
        scores["gap"] = scores["live_bpb"] - scores["parallel_bpb"]
    if "schedule" in values:
        scores["schedule"] = values["schedule"]
    low, high = (columns.get("live", {}).get(end) for end in ("low", "high"))
    return scores if low is None else scores | {"interval": (low, high)}


def weights_folder(folder: Path) -> Path | None:
    """The checkpoint that stands for a folder: a run's result, else its newest snapshot, else the folder itself."""
    places = (folder / "checkpoint", *reversed(snapshots(folder)), folder)
    return next((place for place in places if (place / "config.json").is_file()), None)


def read_config(file: Path) -> dict[str, Any]:
    """A checkpoint's config.json, as far as reports read it. ValueError that names the file where it makes no sense."""
    config = read_json(file)
    about = config.get("about", {})
    try:
        check_kinds(about, "about", ABOUT)
        needs = plugins.missing(about.get("plugins", ()), MODEL_KINDS)
        if needs is None:
            ModelConfig.from_dict(config["model"])
        for name in ("trained", "scores"):
            numbers = about.get(name) or {}
            check_kinds(numbers, f"about.{name}", dict.fromkeys(numbers, int | float))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} describes no run of this version ({error!r}); restore it from a copy") from error
    if needs is not None:
        raise ValueError(f"{file}: {needs}")
    return config


def check_kinds(fields: object, name: str, kinds: Mapping[str, Any]) -> None:
    """ValueError unless `fields` is an object whose named fields, where they are there, are of their kinds or null."""
    if not isinstance(fields, dict):
        raise ValueError(f"{name} is {shorten(fields)}, not an object")
    for field_name, kind in kinds.items():
        content = fields.get(field_name)
        if content is not None and not isinstance(content, kind):
            raise ValueError(f"{name}.{field_name} is {shorten(content)}")


def weights_sha256(folder: Path) -> str | None:
    """SHA-256 of a checkpoint's weights, as its manifest has it; None where it has none."""
    file = folder / "manifest.json"
    entry = read_json(file).get("model.safetensors") if file.is_file() else None
    return entry.get("sha256") if isinstance(entry, dict) else None


def demo_scores(folder: Path) -> dict[str, Any]:
    """What `lrt demo` wrote of a family, on its test split; empty where there is nothing whole."""
    try:
        scores = json.loads((folder / "result.json").read_text())["result"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return scores if isinstance(scores, dict) and "live_bpb" in scores else {}
