"""The command line as a process: its threads' waiting, a reader that leaves, a terminal of ASCII."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lrt.utils.openmp import SPINS, spin_briefly

SHOW = """
import os, sys
from lrt.cli.main import main
assert "torch" not in sys.modules
sys.meta_path.insert(0, Watch := type("Watch", (), {"find_spec": staticmethod(lambda name, *rest: (
    print(name, os.environ.get("GOMP_SPINCOUNT")) if name == "torch" else None))}))
main(["study", "no-such-study"])
"""
"""Prints the variable at the moment at which torch is looked for."""


def environment(**changes: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "OMP_WAIT", "PYTHONIOENCODING", "LC_"))}
    return {**clean, **changes}


@pytest.mark.parametrize(
    ("own", "seen"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
    ids=["default", "user's count", "user's policy"],
)
def test_threads_spin_briefly_before_torch_is_loaded_unless_the_user_says_otherwise(own: dict[str, str], seen: str):
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env=environment(**own), capture_output=True, text=True, timeout=120
    )
    assert done.stdout == f"torch {seen}\n", done.stderr
    assert done.returncode == 2


def test_a_setting_of_the_users_is_kept():
    own = {"GOMP_SPINCOUNT": "0"}
    spin_briefly(own)
    assert own == {"GOMP_SPINCOUNT": "0"}
    spin_briefly(fresh := {"OMP_NUM_THREADS": "2"})
    assert fresh == {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": SPINS}


PRINT = """
import sys
from lrt.cli import verbs
from lrt.cli.main import main
class Many:
    def run(self):
        for _ in range(200_000):
            print("a line")
verbs.parse = lambda arguments: Many()
main(["report"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", ["-c", "-m"])
def test_a_reader_that_leaves_ends_it_quietly(program: str):
    """`lrt … | head -1`: nothing on standard error, and the status that SIGPIPE would give."""
    command = [sys.executable, "-c", PRINT] if program == "-c" else [sys.executable, "-m", "lrt", "train", "--help"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if program == "-c":
            assert process.stdout.readline() == b"a line\n"
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=120) == 141, errors
    assert errors == b""


SAY = """
import sys
from lrt.cli import verbs
from lrt.cli.main import main
from rich.console import Console
from lrt.eval.report.table import Table
from lrt.utils.progress import bar, warn
class Speak:
    def run(self):
        print("größer ▁ \\udcff …")
        warn("γ …")
        with bar("größe", 3) as advance:
            advance(1, "σ")
        Console().print(Table("Tafel γ", ("größe", "x ± y"), (("a → b", "1 ± 2"),)).rich())
        raise ValueError("the file größe.txt … is no text")
verbs.parse = lambda arguments: Speak()
main(["report"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_a_terminal_cannot_show_is_replaced(encoding: str):
    done = subprocess.run(
        [sys.executable, "-c", SAY], env=environment(LC_ALL="C", PYTHONIOENCODING=encoding), capture_output=True,
        timeout=120,
    )  # fmt: skip
    errors = done.stderr.decode(encoding)
    assert done.returncode == 2
    assert "Error" not in errors
    assert errors.splitlines()[-1].startswith("lrt: the file gr")
    shown = {"ascii": "gr??er ? ? ?", "latin-1": "größer ? ? ?", "utf-8": "größer ▁ ? …"}
    assert done.stdout.decode(encoding).splitlines()[0] == shown[encoding]


@pytest.mark.slow
def test_help_of_every_verb_on_a_terminal_of_ascii():
    """In one process: help of all verbs holds characters that ASCII lacks, and ends with status 0."""
    script = """
import sys
from lrt.cli import verbs
from lrt.cli.main import main
for name in (*verbs.PLACES, ""):
    try:
        main([*([name] if name else []), "--help"])
    except SystemExit as ended:
        assert not ended.code, (name, ended.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(LC_ALL="C", PYTHONIOENCODING="ascii"), capture_output=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"Turn text into tokens" in done.stdout
    assert done.stdout.isascii()
