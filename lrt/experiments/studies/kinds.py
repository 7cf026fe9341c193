"""What the cells of a study can run. To add one, write the class of `runner.Kind` and give it a line here."""

from __future__ import annotations

from lrt.experiments.studies import copying_tables, figures
from lrt.experiments.studies.fair import Fair
from lrt.experiments.studies.language import Copying, Language, Rivals, Scaling
from lrt.experiments.studies.runner import Kind
from lrt.experiments.studies.state_data import StateData
from lrt.experiments.studies.state_tracking import StateTracking

KINDS: dict[str, Kind] = {
    "tracking": StateTracking(),
    "state-data": StateData(),
    "language": Language(),
    "rivals": Rivals(figures.differences_figure),
    "sources": Language(figures.source_figure),
    "scaling": Scaling(figures.scaling_figure),
    "fair": Fair(),
    "copying": Copying(copying_tables.copying_figure),
}


def find_kind(name: str) -> Kind:
    """A kind by its name. ValueError with the known ones."""
    if name not in KINDS:
        raise ValueError(f"unknown kind of study {name!r}; choose one of {', '.join(KINDS)}")
    return KINDS[name]
