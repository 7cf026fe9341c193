"""When does a model learn to copy from its context? Cells of a study, trained, and rows of tokens given twice.

    python benchmarks/copying.py OUT.jsonl --only "depth 3" "ratio 1.2" "token shift" --seeds 0 1 2

A row is BOS and 100 tokens of the validation text in random order, then the same 100 again, scored live
(`lrt.eval.copying`). Every cell is a JSON line of OUT.jsonl, with the scores on the way; those that are there are
skipped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from lrt.experiments.studies import grid, language
from lrt.experiments.studies.texts import STDLIB, open_text
from lrt.utils.progress import bar


@dataclass(frozen=True)
class Arguments:
    out: tyro.conf.Positional[Path]
    """JSON lines, one per finished cell."""
    only: tuple[str, ...] = ()
    """Only the cells that have all of these choices."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Only those of these seeds."""
    study: str = "scaling"
    """Of the studies of language."""
    edition: str = "tiny"
    """Of the study."""
    every: int = 200
    """Steps between two scores while a cell is trained."""


def main(arguments: Arguments) -> None:
    known = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    done = {json.loads(line)["cell"] for line in known}
    for cell in grid.read_study(arguments.study, arguments.edition).cells:
        if cell.seed not in arguments.seeds or not set(arguments.only) <= set(cell.choices) or cell.name in done:
            continue
        data = open_text(cell.fields.get("text", STDLIB))
        run = language.build_run(cell.fields, data.vocab_size)
        with bar(cell.name, 1, True) as advance:
            model, _, curve = language.train_cell(run, data, "cpu", advance, arguments.every)
        scores = language.score_run(model, data, run, cell.fields)
        _, first, second = curve[-1]
        line = {"cell": cell.name, "val": scores["val_live_bpb"], "test": scores["test"]["live_bpb"]}
        line |= {"first": first, "second": second, "curve": curve}
        with arguments.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{cell.name}  test {line['test']:.4f}  first {first:.3f}, again {second:.3f} nats a token", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
