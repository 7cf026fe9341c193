"""One promise: under many clients, some of them rude, tokens stay right and rows free."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.server import saved

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "serve_load.py"


@pytest.mark.slow
def test_many_clients(tmp_path: Path):
    folder = saved(tmp_path / "model")
    command = [sys.executable, str(SCRIPT), str(folder), "--clients", "24", "--seconds", "20", "--rows", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    report = json.loads(done.stdout.splitlines()[-1])
    # Memory is judged by the long run alone: twenty seconds are all warming up.
    assert all(held for name, held in report["holds"].items() if name != "memory flat"), (report, done.stderr[-2000:])
    assert report["answers"] > 20
    assert report["left"] > 5
    assert {kind.split(":")[0] for kind in report["refused"]} == {"malformed", "unknown", "oversized", "slow"}
