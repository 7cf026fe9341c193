"""Twenty steps of the d2 recipe, loss by loss: a refactor leaves the file as it is.

    python tests/schedules/test_golden.py

writes it anew. A change of numbers that is meant shows its curves in docs/log.md (docs/design.md, house rules).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lrt import LatentRecurrentTransformer, schedules
from lrt.data.loader import Position, Rows
from lrt.data.prepared import Documents
from lrt.schedules.loss import StepLoss
from lrt.training import recipes
from lrt.training.optim import Optimiser

FILE = Path(__file__).parent / "golden" / "d2.json"
STEPS = 20
TOLERANCE = 1e-4
"""Between machines sums are added up in other orders; the step that follows amplifies that, within this bound."""


def documents(vocab_size: int) -> Documents:
    """Words drawn by Zipf's law into documents of 20 to 800 tokens: the same on every machine."""
    generator = np.random.Generator(np.random.PCG64(0))
    lengths = generator.integers(20, 800, 300)
    words = [generator.integers(1, vocab_size, generator.integers(1, 5)) for _ in range(2000)]
    ranks = np.minimum(generator.zipf(1.2, lengths.sum()) - 1, len(words) - 1)
    tokens = np.concatenate([words[rank] for rank in ranks])[: lengths.sum()]
    return Documents(tokens, np.concatenate([[0], np.cumsum(lengths)]), bos=0)


def written_out(config: object) -> str:
    """A dataclass with all of its fields; `repr` leaves out those at their defaults, which may change."""
    if not dataclasses.is_dataclass(config):
        return repr(config)
    fields = (f"{field.name}={written_out(vars(config)[field.name])}" for field in dataclasses.fields(config))
    return f"{type(config).__name__}({', '.join(fields)})"


def losses() -> list[float]:
    run = replace(recipes.depth_recipe(2), horizon=f"steps={STEPS}")
    torch.manual_seed(run.seed)
    model = LatentRecurrentTransformer(run.model)
    optimiser = Optimiser(model, run.model.width, run.batch_tokens, STEPS, run.optim)
    rows, schedule = Rows(documents(run.model.vocab_size), run.model.context, run.seed), schedules.parse(run.schedule)
    values, position = [], Position()
    for step in range(STEPS):
        batch, position = rows.batch(position, run.batch_size)
        loss = StepLoss.of(schedule.at(step, STEPS, run.seed), [batch.targets])(
            model, batch.tokens, batch.targets, batch.documents
        )
        loss.backward()
        optimiser.step(step)
        values.append(float(loss.detach()))
    return values


def test_the_losses_are_the_golden_ones():
    golden = json.loads(FILE.read_text())
    values = losses()
    recipe = written_out(recipes.depth_recipe(2))
    assert golden["recipe"] == recipe, "the recipe has changed: write the golden file anew, and say why"
    assert values == pytest.approx(golden["losses"], abs=TOLERANCE)
    assert golden["losses"][0] - golden["losses"][-1] > 0.1  # it learns, so the steps matter


if __name__ == "__main__":
    FILE.write_text(json.dumps({"recipe": written_out(recipes.depth_recipe(2)), "losses": losses()}, indent=1) + "\n")
