"""What this machine can do with the library, and what would make it do more: `lrt doctor`."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lrt.experiments.bench.steps import Contender, time_steps
from lrt.inference.generation import generate
from lrt.model.execution import EAGER
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.training.recipes import demo_recipe
from lrt.utils.device import memory_bytes
from lrt.utils.imports import DISTRIBUTION
from lrt.utils.provenance import processor
from lrt.utils.torch_private import missing_compiler

LITTLE_DISK = 10e9
"""Free bytes below which it is said: snapshots of a larger model, or a prepared data set, take as much."""
SIZE, PAIRS = 512, 5
"""Side of the matrices that bfloat16 is tried with, and how often."""
FASTER = 0.8
"""bfloat16's time over float32's from which it is worth a try."""
ROUNDS, STEP_SECONDS = 5, 10.0
"""Timed steps of each model, at most, and about how long they may take."""
DECODED = 128
"""Tokens that are generated to time one."""


@dataclass(frozen=True)
class Check:
    """One fact about the machine."""

    name: str
    state: str
    """What is there, with its unit."""
    advice: str = ""
    """What to do about it; empty where it is as it should be."""


def checks(device: str) -> Iterator[Check]:
    """All of them, those that take time last. `device` is one that computes here."""
    yield check_device(device)
    yield check_torch(torch.__version__, torch.cuda.is_available())
    yield check_compiler(device)
    yield check_bfloat16(device)
    yield from check_extras()
    yield check_disk(Path.cwd())
    yield from check_speed(device)


def check_device(device: str) -> Check:
    """What computes, and its memory."""
    cuda = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else processor()
    total = memory_bytes(device)
    memory = "" if total is None else f", {total / 1e9:.0f} GB of memory"
    return Check("device", f"{device}: {name}, {torch.get_num_threads()} threads{memory}")


def check_torch(version: str, has_gpu: bool) -> Check:
    """Which build of torch is installed. One for CUDA is 5 GB too much where no GPU answers."""
    if "+cpu" in version or has_gpu:
        return Check("torch", version)
    if torch.version.cuda is None:
        return Check("torch", f"{version}, built without CUDA")
    advice = "no GPU answers; where there is none, PyTorch's CPU package is gigabytes smaller (docs/installation.md)"
    return Check("torch", f"{version}, built for CUDA {torch.version.cuda}", advice)


def check_compiler(device: str) -> Check:
    """Whether long runs are compiled."""
    missing = missing_compiler(device)
    if missing is None:
        return Check("compiler", "there: runs of 1,000 steps and more are compiled")
    return Check("compiler", f"none: {missing}", "training is slower without; on Debian and Ubuntu: apt install g++")


def check_bfloat16(device: str) -> Check:
    """Time of a matrix product in bfloat16 over float32's."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(SIZE, SIZE, device=device).to(dtype)
        times = [time_product(a) for _ in range(PAIRS)]
        seconds[dtype] = min(times)
    ratio = seconds[torch.bfloat16] / seconds[torch.float32]
    state = f"a product takes {ratio:.2f} of float32's time"
    return Check("bfloat16", state, "try lrt train --precision auto, which measures it" if ratio < FASTER else "")


def time_product(a: torch.Tensor) -> float:
    """Seconds of a @ a, waited for."""
    begun = time.perf_counter()
    (a @ a)[0, 0].item()
    return time.perf_counter() - begun


def check_extras() -> Iterator[Check]:
    """The optional extras of which something is not installed, in one line; what developers need is left out."""
    missing = {name: packages for name, packages in missing_packages().items() if name != "dev"}
    if not missing:
        yield Check("extras", "all installed")
    for name, packages in missing.items():
        yield Check(
            f"extra {name}", f"not installed: {', '.join(packages)}", f"pip install '{DISTRIBUTION}[{name}]' if wanted"
        )


def missing_packages() -> dict[str, list[str]]:
    """Extra -> its packages that are not installed, from the distribution's own requirements."""
    missing: dict[str, list[str]] = {}
    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", line)
        package = re.match(r"[\w.-]+", line)
        if extra is None or package is None:
            continue
        try:
            importlib.metadata.version(package[0])
        except importlib.metadata.PackageNotFoundError:
            missing.setdefault(extra[1], []).append(package[0])
    return missing


def check_disk(folder: Path) -> Check:
    """What is free where runs are written by default."""
    free = shutil.disk_usage(folder).free
    advice = "" if free >= LITTLE_DISK else "write runs and data elsewhere, with --out"
    return Check("disk", f"{free / 1e9:.0f} GB free in {folder}", advice)


def check_speed(device: str) -> Iterator[Check]:
    """Tokens per second of the demo's models in training, and of the LRT in decoding, on random tokens and weights."""
    runs = {family: demo_recipe(family) for family in ("transformer", "lrt")}
    contenders = [Contender(family, run, "") for family, run in runs.items()]
    for timed in time_steps(contenders, EAGER, device, ROUNDS, progress=False, limit=STEP_SECONDS):
        speed = timed.contender.run.batch_tokens / timed.step.median
        yield Check(f"training, {timed.contender.model}", f"{speed:,.0f} tokens/s (4 layers of 128, not compiled)")
    model = LatentRecurrentTransformer(runs["lrt"].model).to(device).eval()
    tokens = torch.zeros(1, 1, dtype=torch.long, device=device)
    begun = time.perf_counter()
    count = sum(1 for _ in generate(model, tokens, DECODED))
    yield Check("decoding, lrt", f"{count / (time.perf_counter() - begun):,.0f} tokens/s, one sequence")
