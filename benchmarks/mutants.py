"""Mutation testing: break the code in small ways, and see which breaks the tests do not notice.

    make mutants                                                    a sample of 300
    make mutants ARGS="--seed 1 --sample 100 --room schedules"
    make mutants ARGS=--named                                       the faults that tests once did not notice

A mutant is one edit (benchmarks/mutations.py) of a file of lrt/{model,schedules,inference,training}. It is run against
the tests of its room that are not slow and run its line, the fastest first, until one fails. Which tests run a line is
recorded with coverage.py, once per test file and state of the code. Lines that run while tests are collected, or in a
fixture that tests share, count as run by every test of the room.

The tests see a copy of lrt in a temporary folder, which PYTHONPATH names to the programs that they start; no file of
the tree is changed. A parent process imports the libraries once and forks for every mutant.

Results are JSON lines: given again, the same command goes on. Equal sources of lrt and equal tests give no new run.
Survivors that no test can notice stand in benchmarks/mutants.yaml with the reason, and are counted apart.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import importlib
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import psutil
import tyro
import yaml
from mutations import Mutant, by_hand, mutants
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("model", "schedules", "inference", "training")
KNOWN = ROOT / "benchmarks" / "mutants.yaml"
WARM = (
    "torch",
    "numpy",
    "pytest",
    "hypothesis",
    "_hypothesis_pytestplugin",
    "pytest_timeout",
    "transformers",
    "coverage",
)
"""What every test imports, lrt apart."""
PYTEST = ("-x", "-q", "-m", "not slow", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT))
PLUGINS = ("-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin", "-p", "pytest_timeout")
MEMORY = 16 * 2**30
"""Bytes of address space that a mutant may ask for."""
console = Console()


@dataclass(frozen=True)
class Arguments:
    seed: int = 0
    """Of the sample."""
    sample: int = 300
    """Mutants, spread over the rooms by how many each could have."""
    room: tuple[str, ...] = ROOMS
    """Rooms of lrt."""
    only: tuple[Path, ...] = ()
    """Only these files."""
    named: bool = False
    """The named mutants of benchmarks/mutants.yaml, in place of a sample."""
    seconds: float = 60.0
    """Processor time of a mutant's tests. A mutant that none has noticed by then has survived."""
    out: Path = ROOT / "runs" / "mutants"
    """Where results and the record of who runs what are kept."""
    trust_kills: bool = False
    """A mutant that older tests killed stays killed: for tests that were added only."""


# --- the tree ---------------------------------------------------------------------------------------------------------


def digest(paths: Iterable[Path]) -> str:
    """A hash of Python files, of folders all that are inside."""
    files = [f for path in paths for f in ([path] if path.is_file() else sorted(path.rglob("*.py")))]
    total = hashlib.sha256()
    for file in files:
        total.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return total.hexdigest()[:16]


@functools.cache
def code_digest() -> str:
    return digest([ROOT / "lrt"])


@functools.cache
def tests_digest(room: str) -> str:
    return digest([ROOT / "tests" / "support", ROOT / "tests" / "conftest.py", ROOT / "tests" / room])


class Overlay:
    """A copy of lrt beside links to everything else of the tree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for entry in ROOT.iterdir():
            if entry.name != "lrt":
                (folder / entry.name).symlink_to(entry)
        shutil.copytree(ROOT / "lrt", folder / "lrt", ignore=shutil.ignore_patterns("__pycache__"))

    @contextmanager
    def of(self, mutant: Mutant) -> Iterator[None]:
        """The mutant's text in place of its file's."""
        try:
            self._write(mutant.file, mutant.mutated)
            yield
        finally:
            self._write(mutant.file, mutant.source)

    def _write(self, file: str, text: bytes) -> None:
        path = self.folder / file
        path.write_bytes(text)
        Path(cache_from_source(str(path))).unlink(missing_ok=True)  # it may be as old and as long as the text


# --- a child that runs tests ------------------------------------------------------------------------------------------


def fork(overlay: Overlay, work: Callable[[Callable[[dict[str, Any]], None]], int]) -> tuple[int, int]:
    """(process id, pipe of JSON lines) of a child that sees the overlay and does `work`, which is given how to tell."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid != 0:
        os.close(writing)
        return pid, reading
    code = 70
    try:
        os.setsid()
        os.close(reading)
        log = os.open(overlay.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(overlay.folder)
        sys.path.insert(0, str(overlay.folder))
        os.environ["PYTHONPATH"] = str(overlay.folder)
        code = work(lambda message: send(writing, message))
    finally:
        os._exit(code)


def send(pipe: int, message: dict[str, Any]) -> None:
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[os.write(pipe, line) :]


def messages(pipe: int, seconds: float) -> Iterator[dict[str, Any] | None]:
    """What a child tells, until it ends; None whenever it has told nothing for `seconds`."""
    rest = b""
    while True:
        if not select.select([pipe], [], [], seconds)[0]:
            yield None
        elif not (read := os.read(pipe, 1 << 20)):
            return
        else:
            *lines, rest = (rest + read).split(b"\n")
            yield from map(json.loads, lines)


def run_pytest(arguments: Iterable[str], plugin: Any, folder: Path) -> int:
    import pytest

    return int(pytest.main([*PYTEST, *PLUGINS, "--basetemp", str(folder / "pytest"), *arguments], plugins=[plugin]))


def used() -> float:
    """Seconds of processor time of this process and of those that it waited for."""
    return sum(os.times()[:4])


# --- who runs what ----------------------------------------------------------------------------------------------------


class Recorder:
    """Tells, test by test, which lines of a room it runs and how long it takes."""

    def __init__(self, overlay: Overlay, room: str) -> None:
        import coverage

        self.folder = overlay.folder
        self.coverage = coverage.Coverage(data_file=None, config_file=False, source=[str(self.folder / "lrt" / room)])
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()
        self.test = ""
        self.coverage.start()

    def pytest_runtest_protocol(self, item: Any) -> None:
        clear_caches()  # else the first test alone would run what others read from a cache
        self.test = item.nodeid
        self.seconds[self.test] = -used()
        self.coverage.switch_context(self.test)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.coverage.switch_context("")
        self.seconds[nodeid] += used()

    def pytest_fixture_setup(self, fixturedef: Any) -> None:
        if fixturedef.scope != "function":
            self.coverage.switch_context("")  # every test that shares it runs this

    def pytest_runtest_call(self) -> None:
        self.coverage.switch_context(self.test)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    def record(self) -> dict[str, Any]:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {
            str(Path(file).relative_to(self.folder.resolve())): data.contexts_by_lineno(file)
            for file in data.measured_files()
        }
        passed = {test: seconds for test, seconds in self.seconds.items() if test not in self.failed}
        return {"seconds": passed, "failed": sorted(self.failed), "lines": lines}


def clear_caches() -> None:
    """Forget what functions of lrt and of the tests have cached."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("lrt", "support") or name.startswith("test_"):
            for cached in vars(module).values():
                if isinstance(cached, functools._lru_cache_wrapper):
                    cached.cache_clear()


@dataclass
class Coverage:
    """Which tests of a room run which lines."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Test -> processor time."""
    failed: list[str] = field(default_factory=list)
    """Tests that fail without any mutant: they are left out."""
    lines: dict[str, dict[int, set[str]]] = field(default_factory=dict)
    """File -> line -> the tests that run it; "" among them stands for all."""

    def add(self, record: dict[str, Any]) -> None:
        self.seconds.update(record["seconds"])
        self.failed.extend(record["failed"])
        for file, lines in record["lines"].items():
            for line, tests in lines.items():
                self.lines.setdefault(file, {}).setdefault(int(line), set()).update(tests)

    def tests(self, mutant: Mutant) -> list[str]:
        """Those that run the mutant: first the ones that run the line itself, then the function; fastest first.

        Of the variants of one test the fastest comes with the other tests, the second after them, and so on.
        """
        lines = self.lines.get(mutant.file, {})
        own, around = (set().union(*(lines.get(n, set()) for n in span)) for span in (mutant.lines, mutant.scope))
        selected = self.seconds.keys() if "" in own else own & self.seconds.keys()
        variant, counts = {}, collections.Counter[str]()
        for test in sorted(selected, key=lambda test: (test not in own, test not in around, self.seconds[test])):
            variant[test] = counts[test.partition("[")[0]]
            counts[test.partition("[")[0]] += 1
        return sorted(variant, key=lambda test: (test not in own, test not in around, variant[test]))


def coverage_of(room: str, overlay: Overlay, out: Path) -> Coverage:
    """What tests of a room run, recorded file by file where it is not yet."""
    shared = [ROOT / "tests" / "support", ROOT / "tests" / "conftest.py", ROOT / "tests" / room / "conftest.py"]
    coverage = Coverage()
    for file in sorted((ROOT / "tests" / room).glob("test_*.py")):
        state = digest([*(path for path in shared if path.exists()), file])
        kept = out / "coverage" / f"{file.stem}-{code_digest()}-{state}.json"
        if not kept.exists():
            console.print(f"recording what {file.relative_to(ROOT)} runs", style="dim")
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(record(room, file, overlay)))
        coverage.add(json.loads(kept.read_text()))
    if coverage.failed:
        console.print(f"[red]left out, as they fail without a mutant: {', '.join(coverage.failed)}")
    return coverage


def record(room: str, file: Path, overlay: Overlay) -> dict[str, Any]:
    """What the tests of one file run. RuntimeError where they cannot be run."""

    def work(tell: Callable[[dict[str, Any]], None]) -> int:
        recorder = Recorder(overlay, room)
        code = run_pytest(["--maxfail=1000", str(file)], recorder, overlay.folder)
        tell(recorder.record())
        return code

    pid, pipe = fork(overlay, work)
    records = [message for message in messages(pipe, 3600) if message]
    os.close(pipe)
    os.waitpid(pid, 0)
    if not records:
        raise RuntimeError(f"the tests of {file} cannot be run:\n{(overlay.folder / 'log.txt').read_text()[-2000:]}")
    return records[0]


# --- a mutant's fate --------------------------------------------------------------------------------------------------


class Chosen:
    """Runs some tests in an order, and tells which begins and which fails."""

    def __init__(self, tests: list[str], tell: Callable[[dict[str, Any]], None]) -> None:
        self.rank, self.tell = {test: i for i, test in enumerate(tests)}, tell

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        selected = [item for item in items if item.nodeid in self.rank]
        items[:] = sorted(selected, key=lambda item: self.rank[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.tell({"begins": nodeid})

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.tell({"fails": report.nodeid})


def limit_child() -> None:
    """No more memory than a machine has, and no minutes spent on a failing example's smallest form."""
    import resource

    from hypothesis import Phase, settings

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    settings.register_profile("ci", settings.get_profile("ci"), phases=(Phase.explicit, Phase.reuse, Phase.generate))


def fate(mutant: Mutant, coverage: Coverage, overlay: Overlay, seconds: float) -> dict[str, Any]:
    """What became of a mutant, and by which test."""
    tests = coverage.tests(mutant)
    if not tests:
        return {"fate": "not covered"}
    files = sorted({test.split("::")[0] for test in tests})

    def work(tell: Callable[[dict[str, Any]], None]) -> int:
        limit_child()
        return run_pytest([str(ROOT / file) for file in files], Chosen(tests, tell), overlay.folder)

    with overlay.of(mutant):
        pid, pipe = fork(overlay, work)
        try:
            return watch(pid, pipe, coverage, seconds)
        finally:
            os.close(pipe)
            end(pid)
            shutil.rmtree(overlay.folder / "pytest", ignore_errors=True)


def watch(pid: int, pipe: int, coverage: Coverage, seconds: float) -> dict[str, Any]:
    """Follow a child until a test fails, all have passed, one hangs or the time is up.

    A test hangs that takes ten times its processor time and 5 s more, or `seconds` on the clock without using any.
    """
    process, started = psutil.Process(pid), time.monotonic()
    test, began, first, clock = "", 0.0, 0.0, started
    for message in messages(pipe, 0.5):
        now = spent(process)
        if message and "fails" in message:
            return {"fate": "killed", "by": message["fails"]}
        if message:
            first = first or now
            test, began, clock = message["begins"], now, time.monotonic()
        if test and now - began > 10 * coverage.seconds[test] + 5:
            return {"fate": "timeout", "by": test}
        if test and time.monotonic() - clock > 20 * seconds:
            return {"fate": "timeout", "by": test}
        if test and now - first > seconds:
            return {"fate": "time up", "seconds": seconds}
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return {"fate": "survived"} if code == 0 else {"fate": "killed", "by": test or f"collection ({code})"}


def spent(process: psutil.Process) -> float:
    """Seconds of processor time of a child, with its own; 0 once it has ended."""
    try:
        return sum(process.cpu_times()[:4])
    except psutil.Error:
        return 0.0


def end(pid: int) -> None:
    """End a child and all that it started."""
    try:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


# --- which mutants ----------------------------------------------------------------------------------------------------


def room_of(mutant: Mutant) -> str:
    return mutant.file.split("/")[1]


def sources(rooms: Iterable[str], only: Iterable[Path] = ()) -> dict[str, bytes]:
    """File, as the tree names it -> its text."""
    wanted = {path.resolve() for path in only}
    files = [file for room in ROOMS if room in rooms for file in sorted((ROOT / "lrt" / room).rglob("*.py"))]
    return {str(file.relative_to(ROOT)): file.read_bytes() for file in files if not wanted or file in wanted}


def sampled(files: dict[str, bytes], count: int, seed: int) -> list[Mutant]:
    """A random sample of places, of each one mutant at random: rooms weigh as much as they have places."""
    places: dict[tuple[Any, ...], list[Mutant]] = collections.defaultdict(list)
    for file, source in files.items():
        for mutant in mutants(file, source):
            places[file, mutant.lines.start, mutant.edit[:2], mutant.operator].append(mutant)
    generator = random.Random(seed)
    order = generator.sample(list(places.values()), len(places))
    valid = (mutant for mutant in map(generator.choice, order) if mutant.parses())
    return [mutant for mutant, _ in zip(valid, range(count), strict=False)]


def named() -> dict[str, Mutant]:
    """The named mutants of the list. ValueError where one no longer fits the code."""
    entries = yaml.safe_load(KNOWN.read_text())["named"]
    return {e["name"]: by_hand(e["file"], (ROOT / e["file"]).read_bytes(), e["old"], e["new"]) for e in entries}


def equivalent() -> dict[tuple[str, str, str, str], str]:
    """(file, function, line before, line after) -> why no test can notice it."""
    entries = yaml.safe_load(KNOWN.read_text())["equivalent"] or []
    return {(e["file"], e["function"], e["old"], e["new"]): e["reason"] for e in entries}


def identity(mutant: Mutant) -> tuple[str, str, str, str]:
    return (mutant.file, mutant.function, *mutant.diff)


def outdated() -> list[tuple[str, str, str, str]]:
    """Entries of the list of equivalent mutants that are no mutants of today's code."""
    listed = equivalent()
    files = {file for file, *_ in listed}
    today = {identity(m) for file in files if (ROOT / file).exists() for m in mutants(file, (ROOT / file).read_bytes())}
    return [entry for entry in listed if entry not in today]


# --- results ----------------------------------------------------------------------------------------------------------


class Results:
    """Fates by mutant, one JSON line each."""

    def __init__(self, file: Path, trust_kills: bool, seconds: float = 60.0) -> None:
        self.file, self.trust_kills, self.seconds = file, trust_kills, seconds
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text().splitlines() if file.exists() else []
        self.known = {(line["mutant"], line["code"], line["tests"]): line for line in map(json.loads, lines)}

    def get(self, mutant: Mutant) -> str | None:
        code, tests = code_digest(), tests_digest(room_of(mutant))
        entry = self.known.get((mutant.key, code, tests))
        if entry and not (entry["fate"] == "time up" and entry.get("seconds", 0) < self.seconds):
            return entry["fate"]
        older = [e["fate"] for (key, then, _), e in self.known.items() if (key, then) == (mutant.key, code)]
        kills = [fate for fate in older if self.trust_kills and fate in ("killed", "timeout")]
        return kills[0] if kills else None

    def add(self, mutant: Mutant, outcome: dict[str, Any]) -> None:
        line = {"mutant": mutant.key, "code": code_digest(), "tests": tests_digest(room_of(mutant)), **outcome}
        self.known[line["mutant"], line["code"], line["tests"]] = line
        with self.file.open("a") as lines:
            lines.write(json.dumps(line) + "\n")


FATES = ("killed", "timeout", "survived", "time up", "not covered", "equivalent")
"""Of a mutant: the first two are noticed; `time up` and `not covered` count as survived."""


def report(fates: dict[str, tuple[Mutant, str]]) -> None:
    """The table per room, and the survivors."""
    table = Table("room", "all", *FATES, "score", box=None)
    for room in (*ROOMS, "all"):
        counts = collections.Counter(f for mutant, f in fates.values() if room in ("all", room_of(mutant)))
        if total := counts.total():
            noticed = counts["killed"] + counts["timeout"]
            score = f"{noticed / max(1, total - counts['equivalent']):.1%}"
            table.add_row(room, str(total), *(str(counts[name]) for name in FATES), score)
    for name, (mutant, outcome) in fates.items():
        if outcome not in ("killed", "timeout", "equivalent"):
            title = name if mutant.operator == "by_hand" else mutant.function
            console.print(f"{outcome}: {mutant.file}:{mutant.line} {title}", style="bold", markup=False, soft_wrap=True)
            for sign, line in zip("-+", mutant.diff, strict=True):
                console.print(f"  {sign} {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(table)


def main(arguments: Arguments) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running child ends, too
    for library in WARM:
        importlib.import_module(library)
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if stale := outdated():
        console.print(f"[red]benchmarks/mutants.yaml lists what are no mutants any more: {stale}")
    selected = named() if arguments.named else {}
    if not arguments.named:
        selected = {
            m.key: m for m in sampled(sources(arguments.room, arguments.only), arguments.sample, arguments.seed)
        }
    harmless, results = equivalent(), Results(arguments.out / "results.jsonl", arguments.trust_kills, arguments.seconds)
    fates: dict[str, tuple[Mutant, str]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # No thread that draws: a fork would copy its locks.
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console, auto_refresh=False) as progress:
        overlay, task = Overlay(Path(folder)), progress.add_task("mutants", total=len(selected))
        for room in arguments.room:
            here = {name: mutant for name, mutant in selected.items() if room_of(mutant) == room}
            coverage = None
            for name, mutant in here.items():
                outcome = "equivalent" if identity(mutant) in harmless else results.get(mutant)
                if outcome is None:
                    coverage = coverage or coverage_of(room, overlay, arguments.out)
                    tried = fate(mutant, coverage, overlay, arguments.seconds)
                    results.add(mutant, tried)
                    outcome = tried["fate"]
                fates[name] = (mutant, outcome)
                progress.update(task, advance=1, description=room, refresh=True)
    report(fates)
    sys.exit(arguments.named and any(outcome not in ("killed", "timeout") for _, outcome in fates.values()))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
