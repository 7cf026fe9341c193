"""What a CUDA card makes of this library, in ten minutes: whether it computes right, and how fast it is.

    python benchmarks/gpu.py --out runs/gpu
    python benchmarks/gpu.py --out runs/gpu-form --device cpu --size small   # the form, without a card

Writes gpu.json and gpu.md into the folder, anew after every section, and prints the tables. Sections are independent:
what fails in one is noted, and the next goes on. Status 1 where a check failed or a part of a section raised; 2 for a
mistake, such as no card; 130 where it was stopped, and then `--go-on` measures what is missing.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # for the oracle

import gpu_checks
import gpu_ranks
import gpu_timings

from lrt.experiments.bench.rows import Row, row_table
from lrt.utils.device import choose_device, memory_bytes
from lrt.utils.files import replace_atomically
from lrt.utils.provenance import code_version, hardware, hardware_line

Part = tuple[str, Callable[[float], Iterable[Row]]]
FINAL = ("ok", "failed", "error", "not here")
"""States of a section that `--go-on` leaves as they are."""


@dataclass(frozen=True)
class Arguments:
    """Check and time the library on a CUDA card."""

    out: Path
    """The folder for gpu.json and gpu.md."""
    minutes: float = 10.0
    """About how long it may take, of all runs into this folder together: fewer rounds are timed, and what there is no
    time for is left out and named."""
    device: str = "cuda"
    """cuda, cuda:1; cpu for the form of it."""
    size: Literal["full", "small"] = "full"
    """full is for a card; small takes seconds on a CPU and says nothing of speed."""
    only: tuple[str, ...] = ()
    """Sections. None: all."""
    checkpoint: str | None = None
    """A checkpoint of an LRT to prefill with: a trained model settles more slowly than one as it is initialised."""
    go_on: bool = False
    """Measure what the folder's gpu.json lacks, and keep what it has."""


@dataclass(frozen=True)
class Plan:
    """What the sections measure."""

    checked: gpu_checks.Checked
    timings: gpu_timings.Timings
    ranks: tuple[int, int, int]
    """Depth, width and context of what two ranks train."""
    precisions: tuple[str, ...]
    """Of the two ranks."""


TYPES = (torch.float64, torch.float32, torch.bfloat16)


def full_plan(device: str, checkpoint: str | None) -> Plan:
    """For a card."""
    schedules = (
        "plain()", "interleaved(2)", "settled(0, 1, 1)", "settled(1, 3, 1)", "multi_refinement(1)", "chunked(4)",
        "strided(2, 1)",
    )  # fmt: skip
    long = f"{gpu_checks.LONG} tokens"
    checked = gpu_checks.Checked(device, TYPES, schedules, tuple(gpu_checks.CASES), (long,))
    timings = gpu_timings.Timings(
        device=device,
        steps=gpu_timings.Shape(8, 512, 1024, 16, 16384),
        large=gpu_timings.Shape(12, 1536, 2048, 16, 16384),
        modes=(("bfloat16", "always"), ("float32", "always"), ("bfloat16", "never"), ("float32", "never")),
        decode=("fused", "compiled"),
        batches=(1, 8, 32),
        prompt=512,
        dtype=torch.bfloat16,
        rounds=30,
        trained=checkpoint,
    )
    return Plan(checked, timings, (8, 512, 1024), ("float32", "bfloat16"))


def small_plan(device: str, checkpoint: str | None) -> Plan:
    """The same form, in seconds on a CPU: nothing is compiled, which takes a CPU minutes."""
    cases = ("recommended", "all of these", f"{gpu_checks.SHORT} tokens")
    checked = gpu_checks.Checked(device, TYPES, ("interleaved(2)", "settled(0, 1, 1)"), cases, ())
    shape = gpu_timings.Shape(2, 32, 32, 2, 512)
    timings = gpu_timings.Timings(
        device=device,
        steps=shape,
        large=shape,
        modes=(("float32", "never"), ("bfloat16", "never")),
        decode=("fused",),
        batches=(1, 8),
        prompt=32,
        dtype=torch.float32,
        rounds=3,
        trained=checkpoint,
    )
    return Plan(checked, timings, (2, 32, 32), ("float32",))


PLANS = {"full": full_plan, "small": small_plan}


def kernel_section(plan: Plan) -> list[Part]:
    """Checks first: they are to be there, whatever the timings take."""
    return [*gpu_checks.kernel_parts(plan.checked), *gpu_timings.attention_parts(plan.timings)]


SECTIONS: dict[str, tuple[float, Callable[[Plan], list[Part]]]] = {
    "oracle": (3, lambda plan: gpu_checks.model_parts(plan.checked)),
    "kernels": (1, kernel_section),
    "steps": (3, lambda plan: gpu_timings.step_parts(plan.timings)),
    "flops": (1, lambda plan: gpu_timings.flops_parts(plan.timings)),
    "memory": (1, lambda plan: gpu_timings.memory_parts(plan.timings)),
    "decode": (2, lambda plan: gpu_timings.decode_parts(plan.timings)),
    "prefill": (1, lambda plan: gpu_timings.prefill_parts(plan.timings)),
    "ranks": (1, lambda plan: gpu_ranks.rank_parts(plan.timings.device, plan.ranks, plan.precisions)),
}
"""By name: its share of the time, and its parts."""


@dataclass
class Section:
    """What came of a section, so far."""

    state: str = "running"
    """ok; failed, a check; error, a part raised; not here; cut short; interrupted."""
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    """Part -> what it raised."""
    not_here: list[str] = field(default_factory=list)
    """What this machine lacks."""
    left_out: list[str] = field(default_factory=list)
    """Parts that there was no time for."""

    def conclude(self) -> None:
        """Set the state from what came of the parts."""
        if self.errors:
            self.state = "error"
        elif any(row.holds is False for row in self.rows):
            self.state = "failed"
        elif self.left_out:
            self.state = "cut short"
        else:
            self.state = "not here" if self.not_here and not self.rows else "ok"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, its table in Markdown among it."""
        return {
            "state": self.state,
            "seconds": round(self.seconds, 1),
            "checks": sum(row.holds is not None for row in self.rows),
            "failed": [row.name for row in self.rows if row.holds is False],
            "errors": self.errors,
            "not_here": self.not_here,
            "left_out": self.left_out,
            "rows": [row.to_dict() for row in self.rows],
            "table": "\n\n".join(tables(self.rows)),
        }


def tables(rows: list[Row]) -> list[str]:
    """A Markdown table for each kind of rows: those with the same measure and figures have the same columns."""
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.measure, *row.figures), []).append(row)
    return [row_table(kind).markdown() for kind in kinds.values()]


class DeviceLost(Exception):
    """The card answers no more in this process: whatever is left needs another one."""


class Report:
    """The two files of a folder, written anew whenever a section has ended."""

    def __init__(self, arguments: Arguments) -> None:
        """ValueError where the folder has results that this is not to go on from."""
        self.json, self.markdown = arguments.out / "gpu.json", arguments.out / "gpu.md"
        if self.json.exists() and not arguments.go_on:
            raise ValueError(f"{self.json} is there already; give --go-on to measure what it lacks, or another --out")
        arguments.out.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(self.json.read_text()) if self.json.exists() else {}
        self.sections: dict[str, Any] = earlier.get("sections", {})
        self.about = about(arguments)
        self.write("running")

    def write(self, state: str) -> None:
        """`state` is of the whole: running, done or interrupted."""
        content = {"state": state, **self.about, "sections": self.sections}
        replace_atomically(self.json, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")
        replace_atomically(self.markdown, self.text(state))

    def text(self, state: str) -> str:
        """All of it in Markdown."""
        lines = [f"# benchmarks/gpu.py: {state}", "", f"{self.about['line']}; {self.about['code']}", ""]
        lines += ["| section | | checks | seconds |", "|---|---|---|---|"]
        for name, section in self.sections.items():
            failed = len(section["failed"])
            checks = f"{section['checks'] - failed} of {section['checks']}" if section["checks"] else ""
            lines.append(f"| {name} | {section['state']} | {checks} | {section['seconds']} |")
        return "\n".join(lines) + "\n" + "".join(section_text(name, s) for name, s in self.sections.items())

    @property
    def failed(self) -> bool:
        """Whether a check failed, or anything raised."""
        return any(section["failed"] or section["errors"] for section in self.sections.values())

    @property
    def seconds(self) -> float:
        """What the sections have taken so far."""
        return sum(section["seconds"] for section in self.sections.values())


def section_text(name: str, section: dict[str, Any]) -> str:
    """A section in Markdown."""
    lines = ["", f"## {name}: {section['state']}", ""]
    lines += [f"- {part}: {message}" for part, message in section["errors"].items()]
    lines += [f"- {reason}" for reason in section["not_here"]]
    lines += [f"- left out, the time was over: {part}" for part in section["left_out"]]
    return "\n".join([*lines, "", section["table"], ""]) if section["table"] else "\n".join([*lines, ""])


def about(arguments: Arguments) -> dict[str, Any]:
    """The machine, the code and the size, as plain data."""
    facts: dict[str, Any] = {"hardware": hardware(arguments.device), "memory_bytes": memory_bytes(arguments.device)}
    if torch.device(arguments.device).type == "cuda":
        facts["cards"] = torch.cuda.device_count()
        facts["capability"] = torch.cuda.get_device_capability(arguments.device)
        facts["cuda"], facts["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    line = hardware_line(arguments.device)
    return {**facts, "line": line, "code": code_version(), "size": arguments.size, "minutes": arguments.minutes}


def finite(content: Any) -> Any:
    """Plain data whose numbers JSON has: nan and infinities as text."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content


def run_section(
    section: Section, make: Callable[[], list[Part]], limit: float, device: str, say: Callable[[str], None]
) -> None:
    """Run the parts, each within its share of what is left of `limit` seconds. DeviceLost where the card is gone."""
    begun = time.monotonic()
    try:
        torch.compiler.reset()  # what earlier sections compiled counts towards torch's limits
        parts = make()
        for i, (title, part) in enumerate(parts):
            left = limit - (time.monotonic() - begun)
            if left <= 0:
                section.left_out.append(title)
                continue
            say(f"{i + 1}/{len(parts)} {title}")
            run_part(section, title, part, left / (len(parts) - i), device)
    except (KeyboardInterrupt, DeviceLost):
        section.state = "interrupted"  # until `conclude` knows better
        raise
    except Exception as error:  # no part of it could begin
        section.errors["all of it"] = f"{type(error).__name__}: {error}"
    finally:
        section.seconds = time.monotonic() - begun
        if section.errors or section.state != "interrupted":
            section.conclude()


def run_part(section: Section, title: str, part: Callable[[float], Iterable[Row]], limit: float, device: str) -> None:
    """One part: its rows as they come, or what it raised. DeviceLost where the card is gone."""
    try:
        for row in part(limit):
            section.rows.append(row)
    except gpu_ranks.NotHere as reason:
        section.not_here.append(str(reason))
    except Exception as error:  # whatever it is: the other parts may still say something
        section.errors[title] = f"{type(error).__name__}: {error}"
        if is_lost(device):
            raise DeviceLost from error
    free_memory(device)


def is_lost(device: str) -> bool:
    """Whether nothing can be computed in this process any more: some errors of CUDA stay for good."""
    if torch.device(device).type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def free_memory(device: str) -> None:
    """Give back what the last part left."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def run(arguments: Arguments) -> int:
    """All sections that are wanted and not there; the exit status."""
    report, plan = Report(arguments), PLANS[arguments.size](arguments.device, arguments.checkpoint)
    there = [name for name, section in report.sections.items() if section["state"] in FINAL]
    wanted = [name for name in SECTIONS if name in (arguments.only or SECTIONS) and name not in there]
    begun = time.monotonic()
    deadline = begun + 60 * arguments.minutes - report.seconds
    for i, name in enumerate(wanted):
        share, make = SECTIONS[name]
        limit = (deadline - time.monotonic()) * share / sum(SECTIONS[later][0] for later in wanted[i:])
        section = Section()

        def say(text: str, name: str = name) -> None:
            minutes = (time.monotonic() - begun) / 60
            print(f"{minutes:5.1f} of {arguments.minutes:g} min  {name} {text}", file=sys.stderr, flush=True)

        try:
            run_section(section, partial(make, plan), limit, arguments.device, say)
        except BaseException as error:
            report.sections[name] = section.to_dict()
            report.write("interrupted")
            if isinstance(error, DeviceLost):
                begin_again(name)
            raise
        report.sections[name] = section.to_dict()
        report.write("running")
        print(section_text(name, report.sections[name]), flush=True)
    report.write("done")
    print(f"{report.markdown}: {'something FAILED' if report.failed else 'all checks hold'}")
    return int(report.failed)


def begin_again(name: str) -> None:
    """Go on with the next section in a fresh process, in the place of this one."""
    print(f"the card was lost in {name!r}: going on in a new process", file=sys.stderr, flush=True)
    others = [word for word in sys.argv[1:] if word != "--go-on"]
    os.execv(sys.executable, [sys.executable, str(Path(__file__).resolve()), *others, "--go-on"])


def check(arguments: Arguments) -> None:
    """ValueError, in a sentence, for what no argument takes, and for a device that is not there."""
    if not 0 < arguments.minutes < math.inf:
        raise ValueError(f"--minutes is {arguments.minutes}; give a number above 0")
    if unknown := sorted(set(arguments.only) - set(SECTIONS)):
        raise ValueError(f"--only has {', '.join(unknown)}; choose of {', '.join(SECTIONS)}")
    if arguments.device.split(":")[0] == "cuda" and not torch.cuda.is_available():
        why = "was built without CUDA" if torch.version.cuda is None else "sees no card (look at nvidia-smi)"
        raise ValueError(
            f"there is no CUDA here: torch {torch.__version__} {why}; --device cpu --size small shows the form of it"
        )
    choose_device(arguments.device)


def main(words: list[str] | None = None) -> int:
    """The program; returns its exit status."""
    try:
        arguments = tyro.cli(Arguments, args=words, description=__doc__)
        check(arguments)
        return run(arguments)
    except (ValueError, OSError) as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu.py: stopped; --go-on measures what is missing", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
