"""Which functions of lrt two walks pass, in the order of their first calls, and through which doors (docs/walks.md).

    OMP_NUM_THREADS=1 python benchmarks/walks.py

`train` is a batch, from `lrt train` to the end of an optimiser step; `serve` a prompt, sent over HTTP to the checkpoint
that the first walk left, to its second token. A room is a package of lrt; a door is a function that another room calls.
Needs the extra `dev`.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
import threading
import urllib.request
from collections import Counter, defaultdict
from itertools import groupby
from pathlib import Path
from typing import Any

import lrt
from lrt.cli.main import main
from lrt.serve.config import Settings

ROOT = Path(lrt.__file__).parents[1]
TRAIN = f"train --data {ROOT}/tests/fixtures/v0.1.0/data --device cpu demo-lrt --horizon steps=1 --eval.every 0"
TINY = "--model.width 16 --model.heads 2 --model.context 32 --model.mlp-width 24 --batch-size 2"


class Walk:
    """What any thread calls in lrt while this is on: a function for `sys.setprofile`."""

    def __init__(self, last: str | None = None) -> None:
        """last: the function whose return ends the walk."""
        self.on, self.last = False, last
        self.calls: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)  # by thread: of (file, function)
        self.doors: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # by rooms (from, to)
        threading.setprofile(self)  # of threads that are started from now on
        sys.setprofile(self)

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        file, name = function_of(frame)
        if event == "call" and self.on and name:
            self.calls[threading.current_thread().name][file, name] += 1
            caller = frame.f_back
            while caller is not None and not function_of(caller)[1]:
                caller = caller.f_back
            if caller is not None and (before := function_of(caller)[0].split("/")[1]) != file.split("/")[1]:
                self.doors[before, file.split("/")[1]][name] += 1
        self.on = self.on and not (event == "return" and name == self.last)

    def print(self, title: str) -> None:
        for thread, calls in self.calls.items():
            print(f"\n{title}, {thread}: {len(calls)} functions")
            for room, functions in groupby(calls, lambda function: function[0].split("/")[1]):
                print(f"  {room}", *(f"{file} {name} x{calls[file, name]}" for file, name in functions), sep="\n    ")
        print(f"\n{title}, doors")
        for rooms, doors in self.doors.items():
            print(" ", " -> ".join(rooms), len(doors), "\n   ", ", ".join(f"{name} x{n}" for name, n in doors.items()))


def function_of(frame: Any) -> tuple[str, str]:
    """File and name of the function of lrt that a frame runs; no name where it runs anything else, or a lambda."""
    code = frame.f_code
    ours = code.co_filename.startswith(str(ROOT / "lrt")) and not code.co_name.startswith("<")
    if not ours or not code.co_flags & inspect.CO_OPTIMIZED:  # bodies of modules and classes are not
        return "", ""
    return str(Path(code.co_filename).relative_to(ROOT)), code.co_qualname.replace("<locals>.", "")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as out:
        training = Walk(last="Optimiser.step")
        training.on = True
        main([*TRAIN.split(), *TINY.split(), "--out", out])
        sys.path.insert(0, str(ROOT / "tests"))
        from support.server import live

        serving = Walk()
        with live(Path(out), settings=Settings()) as server:
            prompt = {"model": Path(out).name, "prompt": "12 squared is", "max_tokens": 2, "seed": 0}
            body, head = json.dumps(prompt).encode(), {"Content-Type": "application/json"}
            serving.on = True
            urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/completions", body, head)).read()
            serving.on = False
    training.print("train")
    serving.print("serve")
