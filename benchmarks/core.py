"""How much faster CORE is when a shared context is computed once: against every option by itself, with equal choices.

    python benchmarks/core.py BUNDLE TOKENIZER.json --questions 12 --rounds 3

Alone is the plain reference, `score_alone`: each option whole, token by token. Shared computes each question by itself;
batched is what `lrt evaluate --core` does. Ratios are of alternated runs, and say how many choices are equal.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from lrt.data.tokenizer import Tokenizer
from lrt.eval.core_metric.answers import On, answer_question, score_alone, score_questions
from lrt.eval.core_metric.benchmark import ROWS
from lrt.eval.core_metric.bundle import Bundle
from lrt.eval.core_metric.questions import build_question
from lrt.model.config import ModelConfig
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.utils.provenance import hardware
from lrt.utils.timing import alternate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--task", default="arc_easy")
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=2048)
    arguments = parser.parse_args()

    tokenizer = Tokenizer.load(arguments.tokenizer)
    torch.manual_seed(0)
    model = LatentRecurrentTransformer(
        ModelConfig(arguments.depth, arguments.width, 2, vocab_size=tokenizer.vocab_size, context=arguments.context)
    ).eval()
    with torch.no_grad():  # an untrained head gives every option the same; here they differ
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    task = next(t for t in Bundle.open(arguments.bundle).tasks if t.label == arguments.task)
    items = task.questions()
    step = len(items) // arguments.questions
    questions = [
        build_question(task, items, i * step, tokenizer, arguments.context) for i in range(arguments.questions)
    ]

    choices: dict[str, list[int]] = {}

    def score_each_alone() -> None:
        choices["alone"] = [answer_question(q, score_alone(model, q, On("exact"))).option for q in questions]

    def share_contexts() -> None:
        choices["shared"] = [answer_question(q, score_questions(model, [q], On("exact"))[0]).option for q in questions]

    def score_batches(mode: On) -> list[int]:
        size, batched = max(1, ROWS // len(questions[0].rows)), []
        for first in range(0, len(questions), size):
            part = questions[first : first + size]
            batched += [
                answer_question(q, r).option for q, r in zip(part, score_questions(model, part, mode), strict=True)
            ]
        return batched

    def batch_exactly() -> None:
        choices["batched, exact"] = score_batches(On("exact"))

    def batch_converged() -> None:
        choices["batched, converged"] = score_batches(On("converged"))

    work = {
        "alone": score_each_alone,
        "shared": share_contexts,
        "batched, exact": batch_exactly,
        "batched, converged": batch_converged,
    }
    timings = alternate(work, arguments.rounds, warmup=0)
    tokens = sum(len(row) for q in questions for row in q.rows)
    rows = []
    for name, timing in timings.items():
        ratio, spread = timings["alone"].ratio(timing)
        equal = sum(a == b for a, b in zip(choices[name], choices["alone"], strict=True))
        rows.append({"how": name, "seconds": timing.median, "times_faster": ratio, "spread": spread, "equal": equal})
        print(f"{name:20} {timing.median:8.2f} s  {ratio:6.2f} ± {spread:.2f} times faster", end=", ")
        print(f"{equal}/{len(questions)} equal")
    about = {
        "task": arguments.task,
        "questions": len(questions),
        "tokens": tokens,
        "cropped": sum(q.cropped for q in questions),
    }
    print(json.dumps({"rows": rows, **about, "hardware": hardware()}))


if __name__ == "__main__":
    main()
