"""Settings of a run that takes a second."""

from __future__ import annotations

TINY = (
    *("--model.width", "16", "--model.heads", "2", "--model.context", "32", "--model.mlp-width", "24"),
    *("--batch-size", "4", "--device-batch", "4", "--horizon", "tokens=4000"),
)
