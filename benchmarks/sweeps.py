"""How fast sweeps converge: per stride and sweep the residual, the distance from exact, and the score beside live.

    python benchmarks/sweeps.py runs/inference/lrt --data runs/inference/data

One validation window of 1024 tokens. `full` starts with a full pass (nothing in memory), which the prefill does not.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from lrt import load, refine, schedules
from lrt.data.prepared import Prepared
from lrt.data.windows import windows
from lrt.inference.prompt import Prompt
from lrt.inference.sweeps import SweepState
from lrt.model.cross_entropy import token_nats
from lrt.model.transformer import LatentRecurrentTransformer

LENGTH = 1024
STRIDES = (1, 4, 8, 16, 32)
SWEEPS = 10


def trace_sweeps(
    model: LatentRecurrentTransformer, tokens: Tensor, exact: Tensor, sizes: Tensor, groups: int, full: bool
) -> list[dict[str, float]]:
    """A line per sweep, until the residual is below 1e-5."""
    length = tokens.shape[1]

    def bpb(hidden: Tensor) -> float:
        nats = token_nats(model, hidden[:, :-1], tokens[:, 1:])
        return float(nats.double().sum()) / (math.log(2) * float(sizes.sum()))

    rows = SweepState.of(model, Prompt(tokens, [length], [0]), model.empty_state(1, length, tokens=tokens).in_place())
    if full:
        rows.sweep(model, 1, 0)
    lines: list[dict[str, float]] = []
    for sweep in range(SWEEPS):
        rows.sweep(model, groups, min(length, sweep * groups))
        rows.finish(model, [0])
        (row,) = rows.certificates(groups, "")
        residual, worst = 1.0 if row.residual is None else row.residual, row.worst or 0.0  # the first moves everything
        hidden = rows.hidden()
        distance = float((hidden - exact).norm() / exact.norm())
        lines.append({"residual": residual, "worst": worst, "distance": distance, "gap": bpb(hidden) - bpb(exact)})
        if residual <= 1e-5:
            break
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.checkpoint, arguments.device)
    split = Prepared.open(arguments.data).split("val")
    batch = next(iter(windows(split, LENGTH, None).batches(1)))
    tokens, token_bytes = batch.tokens.to(arguments.device), tokenizer.token_bytes()
    assert token_bytes is not None, "this tokenizer has no byte alphabet"
    with torch.no_grad():
        exact = refine(model, tokens, schedules.sequential()).hidden
        for full in (False, True):
            for groups in STRIDES:
                lines = trace_sweeps(model, tokens, exact, token_bytes[batch.tokens[:, 1:]], groups, full)
                print(json.dumps({"stride": groups, "full": full, "sweeps": lines}), flush=True)


if __name__ == "__main__":
    main()
