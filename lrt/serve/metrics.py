"""What the server counts, for Prometheus. prometheus_client adds `_total` to the names of counters."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

# Upper bounds of the histograms' buckets.
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
SWEEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
RESIDUALS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1)
RECENT = 10.0
"""Seconds that `lrt_tokens_per_second` looks back."""


class ServerMetrics:
    """One server's metrics. Recorded from the event loop and from the engines' threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()  # its own: tests run several servers in a process
        ProcessCollector(registry=self.registry)
        by_model, by_worker = ["model"], ["model", "worker"]
        self.requests = self._counter("lrt_http_requests", "HTTP requests by route and status", ["route", "status"])
        self.rows = self._gauge("lrt_rows", "Rows: sequences that can be decoded at once", by_worker)
        self.rows_in_use = self._gauge("lrt_rows_in_use", "Rows that are decoded now", by_worker)
        self.queued = self._gauge("lrt_queue", "Continuations that wait for a row", by_worker)
        self.prompt_tokens = self._counter("lrt_prompt_tokens", "Tokens of prompts", by_model)
        self.tokens = self._counter("lrt_tokens", "Tokens drawn", by_model)
        self.tokens_per_second = self._gauge(
            "lrt_tokens_per_second", "Tokens drawn per second, over the last ten", by_worker
        )
        self.samples = self._counter("lrt_samples", "Continuations by how they ended", ["model", "finish"])
        self.failures = self._counter("lrt_engine_failures", "Steps of an engine that failed", by_model)
        self.first_token = self._histogram("lrt_first_token_seconds", "From request to first token", SECONDS)
        self.next_token = self._histogram("lrt_next_token_seconds", "Between two tokens of a sample", SECONDS)
        self.request_seconds = self._histogram("lrt_request_seconds", "From request to last token", SECONDS)
        self.step = self._histogram("lrt_step_seconds", "One step of the engine", SECONDS)
        self.sweeps = self._histogram("lrt_prefill_sweeps", "Sweeps of a parallel prefill; 0: exact", (0, *SWEEPS))
        self.residual = self._histogram("lrt_prefill_residual", "Residual that a prefill left", (0, *RESIDUALS))

    def _counter(self, name: str, description: str, labels: list[str]) -> Counter:
        return Counter(name, description, labels, registry=self.registry)

    def _gauge(self, name: str, description: str, labels: list[str]) -> Gauge:
        return Gauge(name, description, labels, registry=self.registry)

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, description, ["model"], buckets=buckets, registry=self.registry)

    def watch(
        self,
        model: str,
        worker: int,
        rows: Callable[[], float],
        used: Callable[[], float],
        queued: Callable[[], float],
        speed: Callable[[], float],
    ) -> None:
        """Ask these, from now on, for the gauges of a worker."""
        gauges = {self.rows: rows, self.rows_in_use: used, self.queued: queued, self.tokens_per_second: speed}
        for gauge, read in gauges.items():
            gauge.labels(model, str(worker)).set_function(read)

    def forget(self, model: str, workers: int) -> None:
        """Ask the workers of a model for no gauges any more; its counters stay."""
        for gauge in (self.rows, self.rows_in_use, self.queued, self.tokens_per_second):
            for worker in range(workers):
                gauge.remove(model, str(worker))

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class Speed:
    """Tokens per second of one model, over the last RECENT seconds."""

    def __init__(self) -> None:
        self.counts: deque[tuple[float, int]] = deque(maxlen=100_000)

    def add(self, count: int) -> None:
        self.counts.append((time.monotonic(), count))

    def now(self) -> float:
        """Called from the event loop while the engine's thread adds: hence the copy."""
        since = time.monotonic() - RECENT
        return sum(count for when, count in list(self.counts) if when >= since) / RECENT
