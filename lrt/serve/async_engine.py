"""The thread that owns an engine. Nobody else touches it: the event loop sends commands, events come back in queues.

Between two steps the thread obeys what has come in, so that a cancelled request's rows are free before the next token.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from lrt.inference.engine import Engine
from lrt.inference.request import Completion, Event, Request
from lrt.serve.errors import ApiError, internal, unavailable
from lrt.serve.metrics import ServerMetrics, Speed

LOG = logging.getLogger("lrt.serve")
T = TypeVar("T")


@dataclass(frozen=True)
class Done:
    """A request's samples have all ended."""

    completions: list[Completion]


WorkerEvent = Event | Done | ApiError


@dataclass(eq=False)
class Ticket:
    """One request in the worker's hands."""

    request: Request
    told: asyncio.Queue[tuple[Ticket, WorkerEvent]]
    """Where its events go: tickets of one HTTP request share one."""
    begun: float = field(default_factory=time.monotonic)
    number: int | None = None
    """The engine's; None before it was submitted and after it ended."""
    left: int = 0
    """Samples that have not ended."""
    last: dict[int, float] = field(default_factory=dict)
    """By sample, when its last token came."""


class AsyncEngine:
    """Runs one engine. `start` and all other methods are called in the event loop."""

    def __init__(self, name: str, make: Callable[[], Engine], metrics: ServerMetrics, queue_seconds: float) -> None:
        """make: gives a fresh engine, for the beginning and after one that failed. queue_seconds: how long a request
        may wait for a row."""
        self.name, self.make, self.metrics, self.queue_seconds = name, make, metrics, queue_seconds
        self.engine = make()
        self.rows = self.engine.rows.free
        self.load = 0
        """Samples that are asked for and have not ended, as the event loop knows it."""
        self.failed = False
        self.speed = Speed()
        metrics.rows.labels(name).set(self.rows)
        metrics.speed.labels(name).set_function(self.speed.now)
        self._tickets: dict[int, Ticket] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopped = False
        self._looked = 0.0
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name=f"engine of {name}", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- in the event loop ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve; events go to the running loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its present step."""
        self._inbox.put(self._stop)
        await asyncio.to_thread(self._thread.join)

    def submit(self, request: Request, told: asyncio.Queue[tuple[Ticket, WorkerEvent]]) -> Ticket:
        """Hand a request over; it has passed `Request.check`."""
        ticket = Ticket(request, told)
        self.load += request.samples
        self._inbox.put(lambda: self._submit(ticket))
        return ticket

    def cancel(self, ticket: Ticket, sample: int | None = None) -> None:
        """End a request, or one of its samples, before the next token."""
        self._inbox.put(lambda: self._cancel(ticket, sample))

    def interrupt(self, error: ApiError) -> None:
        """End all requests with an error."""
        self._inbox.put(lambda: self._fail_all(error))

    async def call(self, function: Callable[[], T]) -> T:
        """The result of a function that runs in the thread, between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(value: Any, error: Exception | None) -> None:
            if not future.done():
                future.set_result(value) if error is None else future.set_exception(error)

        def work() -> None:
            try:
                value, error = function(), None
            except Exception as caught:
                value, error = None, caught
            self._post(settle, value, error)

        self._inbox.put(work)
        return await future

    # --- in the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # of this thread: OpenMP keeps the number per thread
        while not self._stopped:
            try:
                self._obey()
                self._expire()
                begin = time.perf_counter()
                events = self.engine.step()
                self.metrics.step.labels(self.name).observe(time.perf_counter() - begin)
                self._deliver(events)
            except Exception:  # whatever it is, nobody waits for ever, and the next request finds a fresh engine
                LOG.exception("the engine of %s failed; it is made anew", self.name)
                self.metrics.failures.labels(self.name).inc()
                self._lose_all(internal())
                self._renew()

    def _renew(self) -> None:
        try:
            self.engine = self.make()
        except Exception:
            LOG.exception("the engine of %s cannot be made anew", self.name)
            self.failed = self._stopped = True

    def _obey(self) -> None:
        """All commands that have come in; with nothing to do, wait for one."""
        wait = self.engine.idle and not self._stopped
        while wait or not self._inbox.empty():
            if wait:
                self._gauge()
            self._inbox.get()()
            wait = self.engine.idle and not self._stopped

    def _stop(self) -> None:
        self._stopped = True

    def _submit(self, ticket: Ticket) -> None:
        try:
            ticket.number = self.engine.submit(ticket.request)
        except Exception as error:
            known = isinstance(error, ValueError)
            if not known:
                LOG.exception("a request to %s cannot be taken", self.name)
            told = ApiError(400, str(error)) if known else internal()
            self._post(self._hand, [(ticket, told)], ticket.request.samples)
            return
        ticket.left = ticket.request.samples
        self._tickets[ticket.number] = ticket
        self.metrics.prompt_tokens.labels(self.name).inc(len(ticket.request.tokens))

    def _cancel(self, ticket: Ticket, sample: int | None) -> None:
        if ticket.number is not None:
            self.engine.cancel(ticket.number, sample)

    def _fail_all(self, error: ApiError) -> None:
        for ticket in list(self._tickets.values()):
            self._fail(ticket, error)

    def _lose_all(self, error: ApiError) -> None:
        """Tell all requests of an error without the engine, which has failed."""
        for ticket in self._tickets.values():
            self._post(self._hand, [(ticket, error)], ticket.left)
            ticket.number = None
        self._tickets.clear()

    def _fail(self, ticket: Ticket, error: ApiError) -> None:
        """Tell a request of an error; its rows are freed, and their ends are not told any more."""
        assert ticket.number is not None
        del self._tickets[ticket.number]
        self.engine.cancel(ticket.number)
        self.engine.finished(ticket.number)
        self._post(self._hand, [(ticket, error)], ticket.left)
        ticket.number = None

    def _expire(self) -> None:
        """End what has waited for a row too long; looked at twice a second."""
        now = time.monotonic()
        if now - self._looked < 0.5:
            return
        self._looked = now
        started = {job.number for job in self.engine.running}
        for number in {job.number for job in self.engine.waiting} - started:
            ticket = self._tickets[number]
            if now - ticket.begun > self.queue_seconds and not ticket.last:
                message = f"no row was free within {self.queue_seconds:g} seconds; try again later"
                self._fail(ticket, unavailable(message, "overloaded"))

    def _deliver(self, events: list[Event]) -> None:
        batch: list[tuple[Ticket, WorkerEvent]] = []
        ended = drawn = 0
        now = time.monotonic()
        for event in events:
            ticket = self._tickets.get(event.request)
            if ticket is None:  # it was told of an error
                continue
            batch.append((ticket, event))
            if event.token is not None:
                drawn += 1
                self._time(ticket, event, now)
            if event.finish is not None:
                ended += 1
                ticket.left -= 1
                self.metrics.finished.labels(self.name, event.finish).inc()
                if ticket.left == 0:
                    batch.append((ticket, Done(self._end(ticket, event.request, now))))
        self.metrics.tokens.labels(self.name).inc(drawn)
        if drawn:
            self.speed.add(drawn)
        self._gauge()
        if batch:
            self._post(self._hand, batch, ended)

    def _end(self, ticket: Ticket, number: int, now: float) -> list[Completion]:
        del self._tickets[number]
        ticket.number = None
        completions = self.engine.finished(number)
        self.metrics.reused_tokens.labels(self.name).inc(completions[0].reused_tokens)
        self.metrics.waited.labels(self.name).observe(now - ticket.begun)
        return completions

    def _time(self, ticket: Ticket, event: Event, now: float) -> None:
        before = ticket.last.get(event.sample)
        kind, since = (self.metrics.first, ticket.begun) if before is None else (self.metrics.next, before)
        kind.labels(self.name).observe(now - since)
        ticket.last[event.sample] = now
        if event.certificate is not None:
            self.metrics.sweeps.labels(self.name).observe(event.certificate.sweeps)
            if event.certificate.residual is not None:
                self.metrics.residual.labels(self.name).observe(event.certificate.residual)

    def _gauge(self) -> None:
        self.metrics.rows_in_use.labels(self.name).set(self.engine.rows.used)
        self.metrics.queued.labels(self.name).set(len(self.engine.waiting))

    def _hand(self, batch: list[tuple[Ticket, WorkerEvent]], ended: int) -> None:
        """In the event loop: everything of a step, to whom it belongs."""
        self.load -= ended
        for ticket, told in batch:
            ticket.told.put_nowait((ticket, told))

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)
