"""Train the pair that `lrt bench inference` measures: an LRT and a Transformer of as many parameters.

    lrt prepare runs/data/books --text books/train.jsonl.xz --documents 500 --vocab-size 4096
    python benchmarks/inference_models.py --data runs/data/books --out runs/inference

Depth 6, width 384, context 1280 (a prompt of 1024 tokens and room to decode), the library's default memory and
schedule, the demo's rates. Stopped, the same command goes on from the newest snapshot.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lrt import MemoryConfig, ModelConfig
from lrt.data.prepared import Prepared
from lrt.model.size import count_parameters
from lrt.training.config import EvalConfig, RunConfig, SnapshotConfig
from lrt.training.loop import train
from lrt.training.recipes import DEMO_OPTIM, match_parameters

CONTEXT = 1280
SETTLED = "settled(1, 1, 1)"
"""The schedule of the pair whose figures docs/log.md has."""


def runs(vocab_size: int, tokens: int) -> dict[str, RunConfig]:
    """The two runs by name, parameters matched by the Transformer's MLP."""
    lrt = ModelConfig.from_depth(6, context=CONTEXT, vocab_size=vocab_size)
    plain = ModelConfig.from_depth(6, context=CONTEXT, vocab_size=vocab_size, memory=MemoryConfig(injection="none"))
    plain = match_parameters(plain, count_parameters(lrt)[0])
    return {
        name: RunConfig(model, DEMO_OPTIM, schedule, batch_size=2, device_batch=1, horizon=f"tokens={tokens}")
        for name, model, schedule in (("lrt", lrt, SETTLED), ("transformer", plain, "plain()"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what `lrt prepare` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two runs, lrt/ and transformer/")
    parser.add_argument("--tokens", type=int, default=300_000, help="training tokens of each")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    data = Prepared.open(arguments.data)
    for name, run in runs(data.vocab_size, arguments.tokens).items():
        out = arguments.out / name
        snapshots, evaluation = SnapshotConfig(every=20), EvalConfig(every=60, targets=5_000)
        _, summary = train(run, data, out, arguments.device, title=name, snapshots=snapshots, evaluation=evaluation)
        size = count_parameters(run.model)[0]
        print(f"{out}: {size:,} parameters, {summary.tokens:,} tokens, loss {summary.loss:.4f}")


if __name__ == "__main__":
    main()
