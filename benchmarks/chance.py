"""Whether a randomly initialised model scores chance on CORE's own questions, in every mode, within its error.

    python benchmarks/chance.py BUNDLE TOKENIZER.json --limit 400 --seeds 3

Chance is the mean of 1 / options over the questions asked (boolq's baseline in the bundle is a majority's, not a
guesser's), 0 for language modelling. z is the distance from it in standard errors of that many guesses; a task is
followed by its share of questions whose right answer is the first: a model to which all are alike takes the first.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from lrt.data.tokenizer import Tokenizer
from lrt.eval.core_metric.benchmark import ORDER, CoreSettings, run_core
from lrt.eval.core_metric.bundle import OPTIONS, Bundle, CoreTask
from lrt.model.config import ModelConfig
from lrt.model.transformer import LatentRecurrentTransformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    arguments = parser.parse_args()

    tokenizer, bundle = Tokenizer.load(arguments.tokenizer), Bundle.open(arguments.bundle)
    expected = {task.label: guess(task, arguments.limit) for task in bundle.tasks}
    accuracies: dict[str, dict[str, list[float]]] = {label: {} for label in expected}
    scores: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        config = ModelConfig(
            arguments.depth, arguments.width, 2, vocab_size=tokenizer.vocab_size, context=arguments.context
        )
        model = LatentRecurrentTransformer(config).eval()
        with tempfile.TemporaryDirectory() as out:
            core, problems = run_core(
                model, tokenizer, bundle, f"random {seed}", Path(out), CoreSettings(arguments.limit, "fast")
            )
        assert not problems, problems
        for mode in core.values["modes"]:
            scores.setdefault(mode, []).append(core.values["score"][mode])
            for label, task in core.values["tasks"].items():
                accuracies[label].setdefault(mode, []).append(task["accuracy"][mode])
    rows: list[dict[str, Any]] = []
    for label, (count, chance, first) in expected.items():
        error = math.sqrt(chance * (1 - chance) / count)
        z = {
            mode: [(p - chance) / error if error else float(p != 0) for p in values]
            for mode, values in accuracies[label].items()
        }
        rows.append({"task": label, "questions": count, "chance": chance, "first": first, "z": z})
        line = "   ".join(f"{mode} " + " ".join(f"{v:+.1f}" for v in values) for mode, values in z.items())
        print(f"{label:34} {count:5} {chance:.3f} {first:.3f}   z: {line}")
    distances = [v for row in rows if row["chance"] > 0 for values in row["z"].values() for v in values]
    print(
        f"|z| <= 2: {sum(abs(v) <= 2 for v in distances)} of {len(distances)}; largest {max(map(abs, distances)):.1f}"
    )
    print("mean centred: " + ", ".join(f"{mode} {sum(v) / len(v):+.4f}" for mode, v in scores.items()))
    print(json.dumps({"rows": rows, "score": scores}))


def guess(task: CoreTask, limit: int) -> tuple[int, float, float]:
    """(questions asked, accuracy of guessing, share of them whose first option is right)."""
    items = task.questions()
    random.Random(ORDER).shuffle(items)
    items = items[:limit]
    if task.type not in OPTIONS:
        return len(items), 0.0, 0.0
    chance = sum(1 / len(item[OPTIONS[task.type]]) for item in items) / len(items)
    return len(items), chance, sum(item["gold"] == 0 for item in items) / len(items)


if __name__ == "__main__":
    main()
