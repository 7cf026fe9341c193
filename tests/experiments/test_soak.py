"""The driver of `make soak`, scaled down: real kills, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def start_soak(folder: Path, kills: int) -> subprocess.Popen[str]:
    script, figure = ROOT / "benchmarks" / "soak.py", folder / "kills.svg"
    return subprocess.Popen(
        [sys.executable, str(script), str(folder / "work"), "--kills", str(kills), "--figure", str(figure)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_forty_kills_lose_nothing(tmp_path: Path) -> None:
    """Forty, because a fifth of them are late ones, of both kinds. The driver is killed itself, and goes on."""
    attempts = tmp_path / "work" / "attempts.jsonl"
    stopped = start_soak(tmp_path, 40)
    while not (attempts.exists() and attempts.read_text().count("\n") > 5):
        assert stopped.poll() is None
        time.sleep(0.05)
    stopped.send_signal(signal.SIGKILL)
    stopped.wait()
    before = attempts.read_text()
    soak = start_soak(tmp_path, 40)
    table = soak.communicate(timeout=800)[0]
    assert soak.returncode == 0, table
    assert attempts.read_text().startswith(before[: before.rindex("\n")])
    lines = [json.loads(line) for line in attempts.read_text().splitlines() if line.startswith("{")]
    kinds = {line["kind"] for line in lines}
    assert len(kinds) == 8
    assert sum(line.get("status") == -signal.SIGKILL for line in lines) >= 39  # shares are rounded
    rounds = [line for line in lines if "equal" in line]
    assert {line["kind"] for line in rounds} == kinds
    assert all(line["equal"] for line in rounds)
    assert "SIGKILL" in (tmp_path / "kills.svg").read_text()
