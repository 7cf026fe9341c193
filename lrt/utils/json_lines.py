"""Files of JSON lines that are written while something runs: what a kill left half is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lrt.utils.progress import warn


def read_json_lines(file: Path, count: int | None = None) -> list[dict[str, Any]]:
    """The objects in the first `count` lines of a file (None: in all); none where there is no file.

    A line that holds no object, as a kill or a loss of power leaves it, is warned of and left out.
    """
    lines: list[dict[str, Any]] = []
    # Bytes: a loss of power may leave some that are no text.
    for number, text in enumerate(file.read_bytes().splitlines()[:count] if file.is_file() else (), start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict):
            lines.append(line)
        else:
            warn(f"{file}: line {number} is damaged and left out")
    return lines
