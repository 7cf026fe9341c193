"""Which LRT should the demo train? Variants of memory and schedule, alike in everything else, scored live.

    python benchmarks/variants.py OUT.jsonl --data runs/data/stdlib --seeds 0 1 2 [--variants interleaved summed …]

Every finished run is a JSON line of OUT.jsonl; runs that are there are skipped, so it goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from lrt import MemoryConfig, ModelConfig, schedules
from lrt.data.prepare import prepare
from lrt.data.windows import windows
from lrt.eval.scoring import evaluate
from lrt.model.size import count_parameters
from lrt.training import recipes
from lrt.training.loop import train

BEST = recipes.recommended_memory(4)
VARIANTS = {
    "settled(1, 1, 1)": (BEST, "settled(1, 1, 1)"),
    "settled(0, 1, 1)": (BEST, "settled(0, 1, 1)"),
    "below-the-top": (dataclasses.replace(BEST, source=(0, 3)), "settled(0, 1, 1)"),
    "summed": (dataclasses.replace(BEST, combine="sum"), "settled(0, 1, 1)"),
    "layerwise": (dataclasses.replace(BEST, projection="layerwise"), "settled(0, 1, 1)"),
    "final-embedding": (MemoryConfig(initial="embedding"), "settled(0, 1, 1)"),
    "final-zeros": (MemoryConfig(), "settled(0, 1, 1)"),
    "interleaved": (MemoryConfig(), "interleaved(2)"),
}


@dataclass(frozen=True)
class Arguments:
    out: tyro.conf.Positional[Path]
    """JSON lines, one per finished run."""
    data: Path = Path("runs/data/stdlib")
    """Where the standard library is, or gets, prepared."""
    variants: tuple[str, ...] = ("transformer", "token_shift", *VARIANTS)
    """Which to run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and data order."""
    tokens: int = 600_000
    """Training tokens of each run."""


def main(arguments: Arguments) -> None:
    data = prepare(arguments.data)
    known = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    done = {(line["variant"], line["seed"], line["tokens"]) for line in map(json.loads, known)}
    for seed in arguments.seeds:
        for variant in arguments.variants:
            run = recipes.demo_recipe(
                variant if variant in recipes.FAMILIES else "lrt", data.vocab_size, arguments.tokens, seed
            )
            if variant in VARIANTS:
                memory, schedule = VARIANTS[variant]
                model = ModelConfig(vocab_size=data.vocab_size, context=recipes.CONTEXT, memory=memory)
                run = dataclasses.replace(run, model=model, schedule=schedule)
            if (variant, seed, run.steps * run.batch_tokens) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                model, trained = train(run, data, Path(folder), title=f"{variant}, seed {seed}")
            val = windows(data.split("val"), recipes.CONTEXT)
            scores = evaluate(model, val, data.tokenizer.token_bytes(), schedules.parse(run.schedule), ablations=())
            line = {"variant": variant, "seed": seed, "parameters": count_parameters(run.model)[0]}
            line |= {**dataclasses.asdict(trained), **scores.to_dict()}
            with arguments.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{variant:18} seed {seed}  live {scores.live_bpb:.4f}  gap {scores.gap:+.4f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
