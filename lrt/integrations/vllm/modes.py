"""How exactly a prompt is read: by server, and by request.

The server's mode is `prefill` of config.json, which `--hf-overrides` replaces. A request asks by `vllm_xargs`
({"prefill": "exact"}), and gets the more exact of the two. So what the prefix cache holds is at least as exact as the
server's mode says, whoever wrote it. A request that asks for more than that does not read it (docs/contract.md,
section 7).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrt.inference.prefill import PrefillMode
from lrt.utils.validation import near_matches, shorten

MODES: tuple[PrefillMode, ...] = ("exact", "converged", "fast")
"""From the most exact on."""
ARGUMENT = "prefill"
"""In `vllm_xargs`."""


def asked_mode(extra: Mapping[str, Any] | None) -> PrefillMode | None:
    """What a request asks for in its extra arguments, None where it says nothing. ValueError for an unknown one."""
    mode = (extra or {}).get(ARGUMENT)
    if mode is not None and mode not in MODES:
        near = near_matches(mode, MODES) if isinstance(mode, str) else ""
        raise ValueError(f"vllm_xargs: {ARGUMENT} is {shorten(mode)}; choose one of {', '.join(MODES)}{near}")
    return mode


def more_exact(one: PrefillMode, other: PrefillMode | None) -> PrefillMode:
    """The more exact of two modes."""
    return one if other is None else MODES[min(MODES.index(one), MODES.index(other))]
