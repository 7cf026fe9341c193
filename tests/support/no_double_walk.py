"""The public ways of lrt on a device that has no float64, beside the CPU.

A program, as the device lasts as long as its process: `python -m support.no_double_walk FOLDER` prints one JSON object,
name of the way -> [numbers on the device, numbers on the CPU]. More arguments name the ways to go, else all.
"""

from __future__ import annotations  # noqa: I001

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.no_double import DEVICE, Lending  # before lrt, whose decorators name the inference mode
from support.prefill import GROUPS

import lrt
from lrt.data.prepare import prepare
from lrt.distributed.single_process import SingleProcess
from lrt.eval.core_metric.answers import MODES, score_questions
from lrt.eval.core_metric.questions import Question
from lrt.eval.diagnose import MEASURES, diagnose, load_subject
from lrt.experiments.bench.baselines import PlainModel
from lrt.inference.calibrate import calibrate
from lrt.inference.cost_model import Calibration, Plan
from lrt.inference.prefill import PREFILL_MODES
from lrt.integrations.hf.export import wrap_model
from lrt.model import checkpoint
from lrt.model.config import ModelConfig
from lrt.model.memory_config import MemoryConfig
from lrt.training.config import RunConfig
from lrt.training.config import EvalConfig

MODEL = ModelConfig(
    depth=2, width=32, heads=2, vocab_size=300, context=32, memory=MemoryConfig(source=(0, 2), combine="channels")
)
SWEPT = Calibration(1e6, {"converged": Plan(GROUPS, 2), "fast": Plan(GROUPS, 2)})
"""Sweeps pay for every prompt."""
Way = Callable[[torch.device], Any]


def ways(folder: Path) -> dict[str, Way]:
    """Name -> a function of the device; what it returns is compared with the CPU's."""
    text = folder / "text.txt"
    text.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(400)))
    data = prepare(folder / "data", [text], vocab_size=MODEL.vocab_size, progress=False)
    prompt = torch.randint(1, MODEL.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))

    def train(device: torch.device) -> Any:
        run = RunConfig(MODEL, schedule="settled(0, 1, 1)", batch_size=2, horizon="steps=2")
        out = folder / f"run-{device.type}"
        lrt.train(run, data, out, device, progress=False, evaluation=EvalConfig(every=2, targets=60))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [[line[key] for key in ("loss", "grad_norm", "live_bpb") if key in line] for line in lines]

    def load(device: torch.device) -> lrt.LatentRecurrentTransformer:
        return checkpoint.load(folder / "run-cpu" / "checkpoint", device)[0]

    def measures(device: torch.device) -> Any:
        ranks = SingleProcess(str(device))
        run = folder / "run-cpu"
        subject = load_subject(run, data, "val", 60, 4, folder / device.type, ranks, progress=False)
        results = {one.kind: one.values for one in diagnose(subject, list(MEASURES))}
        return [results["ablations"]["live_bpb"], results["sweeps"]["live_bpb"]]

    def generate(device: torch.device) -> Any:
        drawn = lrt.generate(load(device), prompt.to(device), 8, lrt.Sampling(temperature=0.9, top_k=20, top_p=0.9))
        return torch.stack([*drawn], 1).tolist()

    def session(device: torch.device) -> Any:
        one = lrt.Session.start(load(device), prompt[0, :12].tolist()).fork(seed=3)
        return float(one.extend(prompt[0, 12:].tolist()).crop(20).hidden.norm())

    def engine(device: torch.device) -> Any:
        asked = [
            lrt.Request(tuple(prompt[i % 2, : 9 + i].tolist()), max_new_tokens=5, sampling=lrt.Sampling(), seed=i)
            for i in range(3)
        ]
        return [list(c.tokens) for samples in lrt.Engine(load(device), rows=2).complete(asked) for c in samples]

    def prefill(device: torch.device) -> Any:
        model, lengths = load(device), torch.tensor([24, 20], device=device)
        norms = []
        for mode in PREFILL_MODES:
            state = model.empty_state(2, 24)
            out = lrt.prefill(model, prompt.to(device), state, mode, lengths, SWEPT)
            norms.append(float(out.hidden.norm()))
        return norms

    def questions(device: torch.device) -> Any:
        rows = (tuple(prompt[0, :20].tolist()), tuple(prompt[0, :12].tolist()))
        asked = [Question(0, rows, (12, 10), 10, 0)]
        return [[row.nats for row in score_questions(load(device), asked, mode())[0]] for mode in MODES.values()]

    def transformers(device: torch.device) -> Any:
        model, tokenizer = checkpoint.load(folder / "run-cpu" / "checkpoint", device)
        wrapped, mask = wrap_model(model, tokenizer, "settled(0, 1, 1)", "converged"), torch.ones_like(prompt)
        mask[1, :9] = 0
        tokens, mask = prompt.to(device), mask.to(device)
        live = float(wrapped(tokens, attention_mask=mask, labels=tokens).loss)
        loss = wrapped.train()(tokens, attention_mask=mask, labels=tokens).loss
        loss.backward()
        return [live, float(loss.detach())]

    def plain_modules(device: torch.device) -> Any:
        torch.manual_seed(0)
        model = PlainModel(ModelConfig(depth=2, width=32, heads=2, vocab_size=300, context=64)).to(device)
        return float(model(prompt.to(device)).detach().norm())

    return {
        "train": train,
        "score": lambda device: float(lrt.score(load(device), prompt.to(device)).sum()),
        "refine": lambda device: float(
            lrt.refine(load(device), prompt.to(device), lrt.schedules.interleaved(2)).hidden.detach().norm()
        ),
        "measures": measures,
        "generate": generate,
        "session": session,
        "engine": engine,
        "prefill": prefill,
        "questions": questions,
        "calibrate": lambda device: len(calibrate(load(device), prompt[:1].to(device), progress=False).plans),
        "transformers": transformers,
        "plain modules": plain_modules,
    }


def main(folder: Path, names: list[str]) -> None:
    numbers = {}
    for name, way in ways(folder).items():
        if names and name not in names:
            continue
        on_cpu = way(torch.device("cpu"))
        with Lending():
            numbers[name] = [way(DEVICE), on_cpu]
    print(json.dumps(numbers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
