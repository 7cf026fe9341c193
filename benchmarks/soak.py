"""Kill trainings, preparations, studies and evaluations at random moments, and see that nothing is lost.

    OMP_NUM_THREADS=1 python benchmarks/soak.py runs/soak --kills 1000 --figure docs/kills.svg

A round is one command in a fresh folder. It is killed (SIGKILL) at a random moment and given again, until it ends by
itself. What it then leaves has to be, bit for bit and but for times, what an undisturbed run left. Every kill is a real
one in the real code: this process has imported torch and lrt, and forks a child per attempt, which runs the command
line. A fifth of the kills fall within the last step of a training, its final score and its final save.

`attempts.jsonl` in the folder has a line per attempt. Stopped or killed, the same command goes on from there.
Needs Linux or macOS, and runs on one core.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # with all that the verbs load when they run: each attempt would load it again
from matplotlib.figure import Figure

import lrt
import lrt.distributed.parallelize
import lrt.experiments.studies.kinds
from lrt.cli.main import main as command_line
from lrt.eval.report.style import FAMILIES, GREY, save_figure
from lrt.eval.report.table import Table
from lrt.model.checkpoint import snapshot_step, snapshots
from lrt.utils.files import read_json, sha256
from lrt.utils.progress import bar
from lrt.utils.provenance import code_version

ROOT = Path(lrt.__file__).parents[1]
Digests = dict[str, str]
"""What a finished command left: file -> hash of what is in it, times left out."""
TIMES = {"seconds", "train_seconds", "tokens_per_second", "step_ratio", "schedule_ratio", "decode_ratio", "hardware"}
"""Names of what no two runs have alike."""
WHOLE = 10**12
"""The progress of what is finished."""
SIZES = (
    "--model.depth", "2", "--model.width", "32", "--model.heads", "1", "--model.context", "64", "--batch-size", "2",
)  # fmt: skip
TRACKING = """
kind: tracking
editions:
  tiny:
    seeds: [0, 1]
    base:
      model: {depth: 2, width: 8, heads: 1, context: 32, window_pattern: S, window: 4}
      optim: {matrix_lr: 0.02, embedding_lr: 0.05, head_lr: 0.01, scalar_lr: 0.02}
      task: parity
      steps: 6
      rows: 4
      longest: 6
      tests: [6]
      sequences: 20
    axes:
      model: {lrt: {schedule: interleaved(2)}, transformer: {schedule: plain(), model: {memory: {injection: none}}}}
"""
LANGUAGE = """
kind: language
editions:
  tiny:
    seeds: [0, 1]
    base:
      text: small
      size: {depth: 2, width: 16, heads: 2, context: 16}
      batch_size: 2
      horizon: steps=6
      targets: 60
    axes:
      family: {transformer: {family: transformer}, recommended: {family: recommended}}
"""


# --- what is run, and what it leaves ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A command that is killed and given again."""

    command: tuple[str, ...]
    """Arguments of `lrt`, run in the round's folder."""
    share: float
    """Its part of all kills."""
    reached: Callable[[Path], int]
    """How far a round's folder has come: what is on the disk for good. It may never fall."""
    digests: Callable[[Path], Digests]
    """What a finished round's folder holds."""
    late_from: int | None = None
    """Kill only once the metrics log has so many lines; None: at any moment."""
    files: dict[str, str] = field(default_factory=dict)
    """Files of the round's folder before its first attempt."""


def steps_kept(folder: Path, steps: int) -> int:
    """Steps of the furthest whole snapshot, or of the result."""
    if (folder / "run/checkpoint/manifest.json").is_file():
        return steps
    return max([snapshot_step(s) for s in snapshots(folder / "run") if (s / "manifest.json").is_file()], default=0)


def tokens_prepared(folder: Path) -> int:
    """Tokens that the newest state of an unfinished preparation names."""
    if (folder / "data/manifest.json").is_file() or (folder / ".data.part/new").is_dir():
        return WHOLE
    state = folder / ".data.part/state.json"
    splits = read_json(state)["splits"].values() if state.is_file() else ()
    return sum(split["tokens"] + sum(shard["tokens"] for shard in split["shards"]) for split in splits)


def lines_written(folder: Path) -> int:
    """Whole lines of a study's results."""
    return sum(count_lines(file) for file in (folder / "results").glob("*.jsonl"))


def items_scored(folder: Path) -> int:
    """Windows in the ledgers of an evaluation."""
    if list((folder / "scores").glob("scores-*.json")):
        return WHOLE
    return sum(count_lines(file) for file in (folder / "scores/partial").glob("*.jsonl"))


def count_lines(file: Path) -> int:
    """Lines that are whole; 0 where there is no file."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def without_times(data: Any) -> Any:
    """Plain data without what no two runs have alike."""
    if isinstance(data, dict):
        return {k: without_times(v) for k, v in data.items() if k not in TIMES}
    return [without_times(v) for v in data] if isinstance(data, list | tuple) else data


def digest(data: Any) -> str:
    """A hash of plain data and tensors, without times."""

    def plain(value: Any) -> Any:
        return [str(value.dtype), list(value.shape), value.view(-1).view(torch.uint8).tolist()]

    return hashlib.sha256(json.dumps(without_times(data), sort_keys=True, default=plain).encode()).hexdigest()


def digest_files(folder: Path) -> Digests:
    return {str(file.relative_to(folder)): sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def digest_run(folder: Path) -> Digests:
    """All that `lrt train` leaves: weights and optimisers to the bit, scores, the metrics log."""
    digests: Digests = {}
    for name in ("checkpoint", "best"):
        path = folder / "run" / name
        about = read_json(path / "config.json")
        about["about"].pop("packing")  # counts the shards read since the run was last begun
        digests |= {f"{name}/{file}": sha256(path / file) for file in ("model.safetensors", "tokenizer.json")}
        digests[f"{name}/config.json"] = digest(about)
    state = torch.load(folder / "run/checkpoint/training.pt", weights_only=True)
    digests["checkpoint/training.pt"] = digest(json.loads(json.dumps(state["progress"]))) + digest(state["optimisers"])
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    digests["metrics.jsonl"] = digest(lines)
    digests["other files"] = ", ".join(sorted(entry.name for entry in (folder / "run").iterdir()))
    return digests


def digest_lines(folder: Path) -> Digests:
    """Result lines by cell, and that no snapshot and no claim is left."""
    (file,) = (folder / "results").glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    left = [path for name in ("results/*.claims/*", "runs/studies/unfinished/*") for path in folder.glob(name)]
    return {line["cell"]: digest(line) for line in lines} | {"lines": str(len(lines)), "left": str(left)}


def digest_scores(folder: Path) -> Digests:
    return {file.name: digest(read_json(file)) for file in (folder / "scores").glob("*.json")}


def training(steps: int, every: int, share: float, late: bool = False) -> Work:
    """`lrt train` of a tiny LRT. `late` kills only after its last but one step."""
    horizon = f"--horizon steps={steps} --snapshots.every {every} --eval.every {steps // 2} --eval.targets 300".split()
    command = ("train", "d2", "--data", "../small/data", "--out", "run", "--device", "cpu", *SIZES, *horizon)
    return Work(command, share, partial(steps_kept, steps=steps), digest_run, steps - 1 if late else None)


def preparing(text: str, share: float, *options: str) -> Work:
    command = ("prepare", "data", "--text", f"../{text}", "--workers", "0", *options)
    return Work(command, share, tokens_prepared, lambda folder: digest_files(folder / "data"))


def studying(study: str, share: float) -> Work:
    command = ("study", "grid.yaml", "--results", "results")
    return Work(command, share, lines_written, digest_lines, files={"grid.yaml": study})


EVALUATION = "evaluate ../trained/run --data ../small/data --out scores --device cpu --batch-size 4 --at-least 1000"
SMALL = preparing("small.txt", 0.17, "--vocab-size", "400", "--shard-tokens", "20000")
WORKS = {
    "train": training(60, 7, 0.35),
    "train, end on a snapshot": training(20, 5, 0.1, late=True),
    "train, end between snapshots": training(20, 6, 0.1, late=True),
    "prepare": SMALL,
    "prepare, large": preparing("large.txt", 0.03, "--tokenizer", "../small/data/tokenizer.json"),
    "study of tracking": studying(TRACKING, 0.12),
    "study of language": studying(LANGUAGE, 0.05),
    "evaluate": Work(tuple(EVALUATION.split()), 0.08, items_scored, digest_scores),
}


# --- attempts -----------------------------------------------------------------------------------------------------


@dataclass
class Window:
    """The time within which a kill falls, in seconds: it follows what the work takes, on a machine that may be busy."""

    seconds: float

    def draw(self, generator: random.Random) -> float:
        return generator.uniform(0, self.seconds)

    def killed(self) -> None:
        self.seconds *= 1.1  # so that what cannot go on from a part of itself ends at last

    def ended(self, seconds: float) -> None:
        self.seconds = max(0.05, 1.2 * seconds)


def start(work: Work, folder: Path) -> int:
    """Run the work's command in a forked child; returns its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it dies with this driver
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        command_line(list(work.command))
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(process: int, until: Callable[[], bool]) -> int | None:
    """The child's exit status once it has ended; None as soon as `until`."""
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if until():
            return None
        time.sleep(0.001)


def clock(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds have gone by."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def late_moment(work: Work, folder: Path) -> Callable[[], bool]:
    """Whether this attempt has resumed, and is in its last step or behind it: its metrics log says so."""
    file = folder / "run/metrics.jsonl"
    before = file.stat().st_ino if file.exists() else None

    def reached() -> bool:
        if not file.exists() or file.stat().st_ino == before:  # resuming replaces the log
            return False
        return count_lines(file) >= (work.late_from or 0)

    return reached


def attempt(work: Work, folder: Path, window: Window, generator: random.Random) -> dict[str, Any]:
    """Start the command and kill it at a random moment, unless it ends before; a line of attempts.jsonl."""
    before, begun = work.reached(folder), time.monotonic()
    process = start(work, folder)
    status = wait(process, late_moment(work, folder)) if work.late_from is not None else None
    moment = time.monotonic()
    if status is None:
        status = wait(process, clock(window.draw(generator)))
    if status is None:
        os.kill(process, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    seconds = time.monotonic() - begun
    if status == -signal.SIGKILL:
        window.killed()
    else:
        window.ended(time.monotonic() - moment)
    logged = count_lines(folder / "run/metrics.jsonl")
    reached = work.reached(folder)
    return {"status": status, "seconds": seconds, "before": before, "reached": reached, "logged": logged}


# --- rounds -------------------------------------------------------------------------------------------------------


class Attempts:
    """The lines of attempts.jsonl: what was done, also by the calls of this driver before."""

    def __init__(self, file: Path) -> None:
        self.file, self.lines = file, []
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                self.lines.append(json.loads(line))
            except ValueError:  # this driver was killed while it wrote
                continue
        with file.open("a") as out:
            out.write("\n" if file.stat().st_size else "")

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self.file.open("a") as out:
            out.write(json.dumps(line) + "\n")

    def of(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == name]

    def kills(self, name: str) -> int:
        return sum(line.get("status") == -signal.SIGKILL for line in self.of(name))


def new_round(work: Work, folder: Path) -> None:
    """A fresh folder, with what the command reads; a study finds its text under runs/studies/texts."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "runs/studies/texts").mkdir(parents=True)
    (folder / "runs/studies/texts/small").symlink_to("../../../../small/data", target_is_directory=True)
    for name, text in work.files.items():
        (folder / name).write_text(text)


def undisturbed(name: str, work: Work, base: Path) -> Digests:
    """What the command leaves when nothing kills it; made once, and kept."""
    folder, file = base / f"whole {name}", base / f"whole {name}.json"
    if not file.is_file():
        new_round(work, folder)
        seconds = run_whole(name, work, folder)
        file.write_text(json.dumps({"digests": work.digests(folder), "seconds": seconds}))
    return json.loads(file.read_text())


def run_whole(name: str, work: Work, folder: Path) -> float:
    """Run the command to its end in a round's folder; returns its seconds."""
    begun = time.monotonic()
    status = wait(start(work, folder), lambda: False)
    if status != 0:
        raise SystemExit(f"{name}: undisturbed, it ended with status {status}; see {folder / 'log.txt'}")
    return time.monotonic() - begun


def run_rounds(
    name: str, work: Work, kills: int, base: Path, attempts: Attempts, seed: int
) -> Iterator[dict[str, Any]]:
    """Rounds until there were so many kills; the last one is brought to its end. Yields the lines as they come."""
    whole = undisturbed(name, work, base)
    window = Window(1.2 * whole["seconds"])
    while True:
        past = attempts.of(name)
        number = sum("equal" in line for line in past)
        open_round = bool(past) and "equal" not in past[-1]
        if attempts.kills(name) >= kills and not open_round:
            return
        folder = base / f"{name} {number}"
        if not open_round:
            new_round(work, folder)
        generator = random.Random(f"{seed} {name} {len(past)}")
        if attempts.kills(name) >= kills:
            window = Window(3600.0)
        line = {"kind": name, "round": number, **attempt(work, folder, window, generator)}
        attempts.add(line)
        yield line
        if line["status"] == -signal.SIGKILL:
            continue
        left = work.digests(folder) if line["status"] == 0 else {}
        differing = sorted(k for k in {*left, *whole["digests"]} if left.get(k) != whole["digests"].get(k))
        attempts.add({"kind": name, "round": number, "equal": not differing, "differing": differing})
        if not differing and name != FIGURE:
            shutil.rmtree(folder)


# --- what is shown ------------------------------------------------------------------------------------------------

FIGURE = "train"
"""The work whose loss curve is drawn."""
KILL = "#d55e00"
"""Colour of a kill: Okabe and Ito's vermilion."""


def table(attempts: Attempts) -> Table:
    """Kills, how many attempts went on from work that was kept, what was lost, and rounds that ended equal."""
    body = []
    for name in WORKS:
        lines = attempts.of(name)
        tries = [line for line in lines if "status" in line]
        rounds = [line for line in lines if "equal" in line]
        went_on = sum(line["before"] > 0 for line in tries)
        lost = sum(line["reached"] < line["before"] or line["status"] not in (0, -signal.SIGKILL) for line in tries)
        equal = sum(line["equal"] for line in rounds)
        body.append([name, attempts.kills(name), went_on, lost + len(rounds) - equal, f"{equal} of {len(rounds)}"])
    total = ["all", *(sum(row[i] for row in body) for i in (1, 2, 3)), ""]
    head = ["", "kills", "resumed from kept work", "lost", "rounds equal to the bit"]
    return Table("", head, [[str(cell) for cell in row] for row in [*body, total]])


def losses(attempts: Attempts) -> bool:
    """Whether anything was lost."""
    return any(
        not line.get("equal", True)
        or line.get("status", 0) not in (0, -signal.SIGKILL)
        or line.get("reached", 0) < line.get("before", 0)
        for line in attempts.lines
    )


def kills_figure(base: Path, attempts: Attempts) -> Figure:
    """The loss of the round that was killed most, over that of the undisturbed run, with its kills."""
    kills: dict[int, list[int]] = {}
    for line in attempts.of(FIGURE):
        if line.get("status") == -signal.SIGKILL:
            kills.setdefault(line["round"], []).append(line["logged"])
    number = max(kills, key=lambda n: len(kills[n]))
    figure = Figure(figsize=(7.0, 3.0), layout="constrained")
    panel = figure.subplots()
    curves = {}
    for label, name, style in (
        ("undisturbed", f"whole {FIGURE}", {"color": GREY, "alpha": 0.4, "linewidth": 5}),
        (f"killed {len(kills[number])} times", f"{FIGURE} {number}", {"color": FAMILIES["lrt"], "linewidth": 1}),
    ):
        lines = [json.loads(line) for line in (base / name / "run/metrics.jsonl").read_text().splitlines()]
        curves[name] = {line["step"] + 1: line["loss"] for line in lines}
        panel.plot(curves[name].keys(), curves[name].values(), label=label, **style)
    steps = [max(1, step) for step in kills[number]]
    panel.plot(steps, [curves[f"whole {FIGURE}"][step] for step in steps], "x", color=KILL, label="SIGKILL")
    panel.set(xlabel="step", ylabel="loss, nats per token")
    panel.legend(fontsize="small")
    return figure


def make_texts(base: Path) -> None:
    """Texts of this repository, once, so that a changed repository changes no run that is under way."""
    if (base / "trained/run/checkpoint/manifest.json").is_file():
        return
    base.mkdir(parents=True, exist_ok=True)
    pages = "".join(file.read_text() for file in sorted((ROOT / "docs").glob("*.md")))
    code = "".join(file.read_text() for file in sorted((ROOT / "lrt").rglob("*.py")))
    (base / "small.txt").write_text(pages[:120_000])
    (base / "large.txt").write_text((code * (1 + 25_000_000 // len(code)))[:25_000_000])
    for name, work in (("small", SMALL), ("trained", training(20, 0, 0.0))):
        new_round(work, base / name)
        run_whole(name, work, base / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--figure", type=Path, help="where the loss curve with its kills is drawn, an SVG")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # and no work in this process: a fork takes none of its threads along
    code_version()  # asks git, once for all attempts
    base = arguments.folder.resolve()
    make_texts(base)
    attempts = Attempts(base / "attempts.jsonl")
    with bar("soak", arguments.kills) as advance:
        advance(sum(map(attempts.kills, WORKS)), "goes on")
        for name in arguments.only:
            for line in run_rounds(
                name, WORKS[name], round(WORKS[name].share * arguments.kills), base, attempts, arguments.seed
            ):
                advance(line["status"] == -signal.SIGKILL, f"{name}, round {line['round']}")
    print(table(attempts).markdown())
    if arguments.figure is not None:
        save_figure(lambda: kills_figure(base, attempts), arguments.figure)
    return int(losses(attempts))


if __name__ == "__main__":
    sys.exit(main())
