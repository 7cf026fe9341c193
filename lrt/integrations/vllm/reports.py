"""What is said of each prompt: a line in the log, and counts for Prometheus.

The counts are of the process that holds the model. vLLM's /metrics shows them where its processes share
PROMETHEUS_MULTIPROC_DIR (docs/serving-at-scale.md).
"""

from __future__ import annotations

import logging

from prometheus_client import Counter, Histogram

from lrt.inference.certificate import Certificate, merge_certificates
from lrt.inference.prefill import PrefillMode
from lrt.integrations.vllm.spans import Chunk

LOG = logging.getLogger("vllm.lrt")  # below vLLM's own logger, whose handler and level it so has
SWEEPS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
BOUNDS = (0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1)


class Metrics:
    """The counts of one process."""

    def __init__(self) -> None:
        self.prompts = Counter("lrt_prompts", "Prompts by how they were read", ["mode", "path"])
        self.sweeps = Histogram("lrt_prefill_sweeps", "Sweeps of a prompt; 0: token by token", ["mode"], buckets=SWEEPS)
        self.bound = Histogram("lrt_prefill_bound", "What a prompt is within; 0: exact", ["mode"], buckets=BOUNDS)


class Reports:
    """Follows the prompts of one engine."""

    metrics: Metrics | None = None
    """One for all engines of a process, as Prometheus' registry is."""

    def note(self, mode: PrefillMode, prompt: int | None, parts: list[Certificate], chunk: Chunk) -> None:
        """After a chunk of a prompt of so many tokens: `parts` are its certificates so far. The last chunk ends the
        report, and empties them. A prompt of which the prefix cache had all but one token has none."""
        if (prompt is not None and chunk.position + chunk.tokens < prompt) or not parts:
            return
        whole = merge_certificates(parts)
        parts.clear()
        if Reports.metrics is None:
            Reports.metrics = Metrics()
        Reports.metrics.prompts.labels(mode, whole.path).inc()
        Reports.metrics.sweeps.labels(mode).observe(whole.sweeps)
        Reports.metrics.bound.labels(mode).observe(whole.bound)
        LOG.info(
            "prompt of %s tokens, %d of them computed (%s): %s, %d sweeps, within %.1e; %s",
            prompt, whole.tokens, mode, whole.path, whole.sweeps, whole.bound, whole.reason,
        )  # fmt: skip
