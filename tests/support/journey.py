"""A person at a terminal: commands in a folder of their own, each a process, and servers that answer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

LRT = (sys.executable, "-m", "lrt")
SECONDS = 600
"""Of one command at most."""
WAIT = 120
"""Seconds until a server answers, at most."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@dataclass(frozen=True)
class Terminal:
    """80 columns, in `folder`; `program` is what `lrt` starts."""

    folder: Path
    program: Sequence[str | Path] = LRT

    def lrt(self, *words: str | Path, typed: str = "", fails: bool = False) -> str:
        """What a command prints, errors too. The test fails, and shows it, where its status is not what is expected."""
        return self.start([*self.program, *words], typed, fails)

    def python(self, program: str) -> str:
        """What a program of Python prints."""
        return self.start([sys.executable, "-c", program])

    def start(self, command: Sequence[str | Path], typed: str = "", fails: bool = False) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, input=typed, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, encoding="utf-8", timeout=SECONDS,
        )  # fmt: skip
        if done.returncode != (2 if fails else 0):
            pytest.fail(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}", pytrace=False)
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        """The test's. A program that was installed elsewhere must not see this checkout."""
        hidden = () if self.program == LRT else ("PYTHONPATH", "PYTHONHOME")
        kept = {name: value for name, value in os.environ.items() if name not in hidden}
        return kept | {"COLUMNS": "80", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    @contextmanager
    def serve(self, *words: str | Path) -> Iterator[str]:
        """The address of `lrt serve`, which ends in an orderly way behind the block."""
        url, log = f"http://127.0.0.1:{(port := free_port())}", self.folder / "serve.log"
        command = [*self.program, "serve", *words, "--port", str(port), "--device", "cpu"]
        with log.open("w") as written:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=written, stderr=subprocess.STDOUT
            )
        try:
            wait_for(f"{url}/v1/models", process, log)
            yield url
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) in (0, -signal.SIGTERM), log.read_text()
        finally:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until `url` answers; TimeoutError where it never does."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        try:
            httpx.get(url)
            return
        except httpx.TransportError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
    raise TimeoutError(log.read_text())
