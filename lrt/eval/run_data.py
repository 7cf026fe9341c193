"""The prepared text that a run was trained on, looked for by its fingerprint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lrt.data.prepared import Prepared
from lrt.eval.runs import Run

PREPARED = Path("runs/data")
"""Where `lrt prepare` puts texts by default."""


def trained_on(folder: Path) -> Prepared:
    """The text that a run was trained on, in runs/data or in data/ beside it. ValueError where it is in neither."""
    about = Run.read(folder).about
    corpus, fingerprint = about.get("corpus", "(unnamed)"), about.get("data")
    if (data := next((one for one in prepared_nearby(folder) if one.fingerprint == fingerprint), None)) is None:
        places = " or ".join(map(str, dict.fromkeys((PREPARED, folder.parent / "data"))))
        raise ValueError(
            f"{folder} was trained on the text {corpus}, which is not in {places}; give its folder: --data FOLDER, or "
            f"lrt.Run({str(folder)!r}, data=FOLDER)"
        )
    return data


def prepared_nearby(run: Path) -> Iterator[Prepared]:
    """Prepared folders in runs/data, and data/ beside a run or what is in it; what cannot be read is passed over."""
    beside = run.parent / "data"
    places = dict.fromkeys(place.resolve() for place in (PREPARED, beside))
    within = [file for place in places for file in sorted(place.glob("*/manifest.json"))]
    for manifest in (beside / "manifest.json", *within):
        with suppress(ValueError, OSError):
            yield Prepared.open(manifest.parent)
