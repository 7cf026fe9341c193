"""A run's folder as an object: what is known of it, its curves, its model, and what can still be measured.

What is known is read by `runs.Run` and shown by `report`; here both are in one place, for a notebook.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrt.data.prepared import Prepared
from lrt.distributed.single_process import SINGLE_PROCESS
from lrt.eval import diagnose, runs
from lrt.eval.report.result_tables import result_tables
from lrt.eval.report.sentences import sentence
from lrt.eval.results import Result
from lrt.eval.run_data import trained_on
from lrt.eval.scoring import Metrics
from lrt.inference.language_model import LanguageModel, load
from lrt.inference.sampling import Sampling
from lrt.utils import files
from lrt.utils.device import choose_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Run:
    """A run's folder: `lrt.Run("runs/d2")`. Made again, it is read again.

    Shown in a notebook, it is a table and the curve of its loss.
    """

    def __init__(self, folder: str | Path, device: str = "auto", data: str | Path | Prepared | None = None) -> None:
        """`folder` is what `lrt train` or `lrt.train` wrote, also while it is written; or a checkpoint.

        device: what the model is loaded on: auto, cpu, cuda, cuda:1, mps.
        data: what it is scored on. None: what it was trained on, looked for by its fingerprint.

        ValueError where the folder is no run.
        """
        self.folder = Path(folder)
        self.device = choose_device(device)
        self._data = data
        runs.Run.read(self.folder)  # a mistake in the name is an error now

    @property
    def record(self) -> runs.Run:
        """All that is known of it: sizes, costs, every score. Read from JSON each time."""
        return runs.Run.read(self.folder)

    @property
    def name(self) -> str:
        """The folder's."""
        return self.record.name

    @property
    def metrics(self) -> Any:
        """What was logged, a row for each step: a pandas.DataFrame, or a list of dicts where pandas is not installed.

        loss is in nats per token, live_bpb and gap in bits per byte, seconds is of the training alone.
        """
        try:
            import pandas
        except ImportError:
            return self.record.metrics
        return pandas.DataFrame(self.record.metrics)

    @functools.cached_property
    def model(self) -> LanguageModel:
        """The model and its tokenizer, loaded when they are first asked for, and kept."""
        return load(self.folder, self.device)

    @property
    def data(self) -> Prepared:
        """The data that it is scored on. ValueError where that is not found."""
        if isinstance(self._data, Prepared):
            return self._data
        if self._data is not None:
            return Prepared.open(self._data)
        return trained_on(self.folder)

    def plot(self, *others: Run) -> Figure:
        """The training loss and the live score over the tokens trained on, also of other runs beside it.

        ValueError for a run without a metrics log.
        """
        from lrt.eval.report.score_tables import unique_names
        from lrt.eval.run_figure import draw_runs  # loads matplotlib

        runs = (self, *others)
        names = unique_names([run.folder for run in runs])
        return draw_runs([dataclasses.replace(run.record, name=name) for run, name in zip(runs, names, strict=True)])

    def evaluate(self, split: str = "val", at_least: int | None = 50_000, batch_size: int = 64) -> Metrics:
        """Bits per byte live, under the schedule trained with, and the gap; kept in evaluation/, as by `lrt evaluate`.

        `at_least` so many tokens of the split are scored; None: all. Stopped, it goes on.
        """
        subject = self._subject(split, at_least, batch_size)
        scores = diagnose.score_corpora([subject])
        scores.write(subject.out)
        return Metrics.from_dict(scores.values["corpora"][subject.name])

    def diagnose(
        self, kind: str, split: str = "val", at_least: int | None = 10_000, batch_size: int = 16
    ) -> Measurement:
        """Measure one thing, as `lrt diagnose` does, and keep it in evaluation/.

        kind: bpb, sweeps, hops, ablations, memory, text or bfloat16. `text` is shown in colours: what recurrence gains,
        token by token.
        """
        if kind not in diagnose.MEASURES:
            raise ValueError(f"kind is {kind!r}; choose one of {', '.join(diagnose.MEASURES)}")
        (result,) = diagnose.diagnose(self._subject(split, at_least, batch_size), [kind])
        return Measurement(result)

    def sample(
        self, prompt: str = "", n: int = 3, max_new_tokens: int = 100, sampling: Sampling | None = None, seed: int = 0
    ) -> list[str]:
        """`n` texts that follow a prompt, the i-th drawn with seed + i. `run.model.complete` gives one."""
        return [self.model.complete(prompt, max_new_tokens, sampling, seed + i) for i in range(n)]

    def report(self, out: str | Path = "report.html", *others: Run) -> Path:
        """Write the page of `lrt report`, also of other runs beside it; returns where it is."""
        from lrt.eval.report.page import report  # loads matplotlib

        report(Path(out), [run.folder for run in (self, *others)])
        return Path(out)

    def _subject(self, split: str, at_least: int | None, batch_size: int) -> diagnose.Subject:
        files.check_writable(self.folder / "evaluation")
        ranks = dataclasses.replace(SINGLE_PROCESS, device=self.device)
        return diagnose.load_subject(self.folder, self.data, split, at_least, batch_size, ranks=ranks)

    def __repr__(self) -> str:
        record = self.record
        size = "" if record.parameters is None else f", {record.parameters:,} parameters"
        trained = "" if record.tokens is None else f", trained on {record.tokens:,} tokens"
        live = next((f", live {score.cell('live_bpb')} bits per byte" for score in record.scores), "")
        return f"Run('{self.folder}'{size}{trained}{live})"

    def _repr_html_(self) -> str:
        from lrt.eval.run_html import run_html  # loads matplotlib

        return run_html(self.record)


@dataclass(frozen=True, repr=False)
class Measurement:
    """What was measured of a run: lines of text, and in a notebook colours where it is a text."""

    result: Result

    @property
    def values(self) -> dict[str, Any]:
        """Plain data, by kind (docs/evaluation.md)."""
        return self.result.values

    def __repr__(self) -> str:
        first = sentence("the run", self.result)
        return "\n\n".join([first[0].upper() + first[1:], *(table.text() for table in result_tables(self.result))])

    def _repr_html_(self) -> str:
        from lrt.eval.run_html import measurement_html  # loads matplotlib

        return measurement_html(self.result, repr(self))
