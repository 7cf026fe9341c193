"""Has a model learned to copy from its context? Cells of `lrt study scaling`, trained, and rows of tokens given twice.

    python benchmarks/copying.py OUT.jsonl --only "depth 3" "ratio 1.2" "token shift" --seeds 0 1 2

A row is BOS and 100 tokens of the validation text in random order, then the same 100 again, scored live: nothing but
copying makes the second time cheaper than the first. Every cell is a JSON line of OUT.jsonl; those that are there are
skipped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from lrt import LatentRecurrentTransformer
from lrt.data.prepared import Prepared
from lrt.data.windows import windows
from lrt.eval.scoring import score
from lrt.experiments.studies import grid, language
from lrt.experiments.studies.texts import STDLIB, open_text
from lrt.utils.progress import bar

ROWS, LENGTH = 64, 100


@dataclass(frozen=True)
class Arguments:
    out: tyro.conf.Positional[Path]
    """JSON lines, one per finished cell."""
    only: tuple[str, ...] = ()
    """Only the cells that have all of these choices."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Only those of these seeds."""
    edition: str = "tiny"
    """Of the study of scaling."""


def score_twice(model: LatentRecurrentTransformer, data: Prepared) -> tuple[float, float]:
    """Live nats per token of rows' first and second half, without each half's first token: it has nothing to go by."""
    val = data.split("val")
    text = torch.cat([batch.tokens.flatten() for batch in windows(val, model.config.context, 20_000).batches(64)])
    places = torch.randint(len(text), (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    nats = score(model, torch.cat([torch.full((ROWS, 1), val.bos), text[places], text[places]], dim=1))
    return float(nats[:, 1:LENGTH].mean()), float(nats[:, LENGTH + 1 :].mean())


def main(arguments: Arguments) -> None:
    known = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    done = {json.loads(line)["cell"] for line in known}
    for cell in grid.read_study("scaling", arguments.edition).cells:
        if cell.seed not in arguments.seeds or not set(arguments.only) <= set(cell.choices) or cell.name in done:
            continue
        data = open_text(cell.fields.get("text", STDLIB))
        run = language.build_run(cell.fields, data.vocab_size)
        with bar(cell.name, 1, True) as advance:
            model, _ = language.train_cell(run, data, "cpu", advance)
        scores = language.score_run(model, data, run, cell.fields)
        first, second = score_twice(model, data)
        line = {"cell": cell.name, "val": scores["val_live_bpb"], "test": scores["test"]["live_bpb"]}
        line |= {"first": first, "second": second}
        with arguments.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{cell.name}  test {line['test']:.4f}  first {first:.3f}, again {second:.3f} nats a token", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
