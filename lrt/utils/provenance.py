"""Where a number was measured, and by what: the machine, and the version of this code."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from lrt.utils.imports import DISTRIBUTION


def hardware(device: str | torch.device = "cpu") -> dict[str, object]:
    """The machine's facts that a number depends on, as plain data: they are kept in results and in keys of caches."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """The CPU's name where the system says it (Linux), else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as about:
            return next(line.split(":", 1)[1].strip() for line in about if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def hardware_line(device: str | torch.device = "cpu") -> str:
    """`hardware` in words, for beside a number."""
    return "{device}, {threads} threads, torch {torch}, Python {python}".format(**hardware(device))


@functools.cache
def code_version() -> str:
    """The version of the library, and the commit where it runs from a repository, "dirty" where files were changed.

    Asked of git once per process: results and ledgers name it often.
    """
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown version"
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return version
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}, commit {described.stdout.strip()}"
