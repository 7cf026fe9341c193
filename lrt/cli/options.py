"""Types of options that several verbs have. Names in a Literal are what the library takes; --help lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

Paths = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE…")]
Prefill = Literal["exact", "converged", "fast", "one_sweep"]
DecodeMode = Literal["eager", "fused", "packed", "compiled", "best"]
