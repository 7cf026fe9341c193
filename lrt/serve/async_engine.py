"""The thread that owns a model's engine. Nobody else touches the engine.

The event loop sends closures, and gets all events of a step in one call. The thread runs what has come in between two
steps, so that a cancelled request's rows are free before the next token. Everything that a request may have to hear
of (tokens, its end, an error) comes through one queue, into which responses.py also puts the disconnect and the
clock: a request waits for one thing only. An engine that raises is replaced; all its requests get an error.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lrt.inference.engine import Engine
from lrt.inference.request import Completion, Event, Request
from lrt.serve.errors import ApiError, internal_error, unavailable_error
from lrt.serve.metrics import ServerMetrics, Speed

LOG = logging.getLogger("lrt.serve")
EXPIRY_SECONDS = 0.5
"""How often the queue is searched for requests that have waited too long."""
T = TypeVar("T")


@dataclass(frozen=True)
class Done:
    """A request's samples have all ended."""

    completions: list[Completion]


WorkerEvent = Event | Done | ApiError


@dataclass(eq=False)
class Submission:
    """A request that was handed to an engine: what `cancel` takes."""

    engine: AsyncEngine
    request: Request
    events: asyncio.Queue[tuple[Submission, WorkerEvent]]
    """Where its events go; submissions of one HTTP request share a queue."""
    submitted_at: float = field(default_factory=time.monotonic)
    number: int | None = None
    """The engine's number of the request; None before it was submitted and after it ended."""
    samples_left: int = 0
    """Samples that have not ended."""
    last_token_at: dict[int, float] = field(default_factory=dict)
    """By sample, when its last token came."""


class AsyncEngine:
    """Runs one engine. `start` and all other methods are called in the event loop."""

    def __init__(
        self,
        name: str,
        worker: int,
        make_engine: Callable[[], Engine],
        begin_thread: Callable[[], None],
        metrics: ServerMetrics,
        queue_seconds: float,
    ) -> None:
        """name, worker: of the model, and which of its workers it is. make_engine: called now, and again after an
        engine has failed. begin_thread: called first in its thread. queue_seconds: how long a request may wait for a
        row."""
        self.name, self.worker, self.make_engine, self.begin_thread = name, worker, make_engine, begin_thread
        self.metrics, self.queue_seconds = metrics, queue_seconds
        self.engine = make_engine()
        self.rows = self.engine.rows.free
        self.load = 0
        """Samples that were submitted and have not ended, as the event loop knows it."""
        self.replacing = False
        """Its engine has failed, and another one is made."""
        self.failed = False
        """No other one can be made: whatever is sent to it is answered with an error."""
        self.speed = Speed()
        self._submissions: dict[int, Submission] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopped = False
        self._last_expiry = 0.0
        self._thread = threading.Thread(target=self._run, name=f"engine of {name} {worker}", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- in the event loop ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve, and to be measured; events go to the running loop."""
        self._loop = asyncio.get_running_loop()
        self.metrics.watch(
            self.name,
            self.worker,
            rows=lambda: self.rows,
            used=lambda: self.engine.rows.used,
            queued=lambda: len(self.engine.waiting),
            speed=self.speed.now,
        )
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its present step."""
        self._inbox.put(self._stop)
        await asyncio.to_thread(self._thread.join)

    def submit(self, request: Request, events: asyncio.Queue[tuple[Submission, WorkerEvent]]) -> Submission:
        """Hand a request over; it has passed `Request.check`."""
        submission = Submission(self, request, events)
        self.load += request.samples
        self._inbox.put(lambda: self._submit(submission))
        return submission

    def cancel(self, submission: Submission, sample: int | None = None) -> None:
        """End a request, or one of its samples, before the next token."""
        self._inbox.put(lambda: self._cancel(submission, sample))

    def interrupt(self, error: ApiError) -> None:
        """End all requests with an error."""
        self._inbox.put(lambda: self._fail_all(error))

    async def call(self, function: Callable[[], T]) -> T:
        """What a function returns that runs in the thread, between two steps. Its exception is raised here."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def resolve(value: Any, error: Exception | None) -> None:
            if not future.done():  # its client may have gone away
                future.set_result(value) if error is None else future.set_exception(error)

        def command() -> None:
            try:
                value, error = function(), None
            except Exception as caught:
                value, error = None, caught
            self._call_in_loop(resolve, value, error)

        self._inbox.put(command)
        return await future

    @property
    def _reuses(self) -> bool:
        """Whether rows are kept for later prompts, which nobody is to be told of."""
        return self.engine.prefixes.budget > 0

    # --- in the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self.begin_thread()
        while not (self._stopped or self.failed):
            try:
                self._run_commands()
                self._expire()
                begin = time.perf_counter()
                events = self.engine.step()
                if not self._reuses:  # their number would tell how much of a prompt was known
                    self.metrics.step.labels(self.name).observe(time.perf_counter() - begin)
                self._deliver(events)
            except Exception:  # whatever it is, nobody waits for ever, and the next request meets a fresh engine
                LOG.exception("the engine of %s failed; it is made anew", self.name)
                self.metrics.failures.labels(self.name).inc()
                self.replacing = True
                self._abandon_all(internal_error())
                self._replace_engine()
        while not self._stopped:  # what comes while and after it fails for good is answered too
            self._inbox.get()()

    def _replace_engine(self) -> None:
        try:
            self.engine = self.make_engine()
        except Exception:
            LOG.exception("the engine of %s cannot be made anew", self.name)
            self.failed = True
        self.replacing = False

    def _run_commands(self) -> None:
        """All commands that have come in; with nothing to do, wait for one."""
        wait = self.engine.idle and not self._stopped
        while wait or not self._inbox.empty():
            self._inbox.get()()
            wait = self.engine.idle and not self._stopped

    def _stop(self) -> None:
        self._stopped = True

    def _submit(self, submission: Submission) -> None:
        if self.failed:
            self._refuse(submission)
            return
        try:
            submission.number = self.engine.enqueue(submission.request)
        except Exception:
            LOG.exception("a request to %s cannot be taken", self.name)
            self._refuse(submission)
            return
        submission.samples_left = submission.request.samples
        self._submissions[submission.number] = submission
        self.metrics.prompt_tokens.labels(self.name).inc(len(submission.request.tokens))

    def _refuse(self, submission: Submission) -> None:
        """End a request that no engine has."""
        self._call_in_loop(self._dispatch, [(submission, internal_error())], submission.request.samples)

    def _cancel(self, submission: Submission, sample: int | None) -> None:
        if submission.number is not None:
            self.engine.cancel(submission.number, sample)

    def _fail_all(self, error: ApiError) -> None:
        for submission in list(self._submissions.values()):
            self._fail(submission, error)

    def _abandon_all(self, error: ApiError) -> None:
        """End all requests with an error, without the engine, which has failed."""
        for submission in self._submissions.values():
            self._call_in_loop(self._dispatch, [(submission, error)], submission.samples_left)
            submission.number = None
        self._submissions.clear()

    def _fail(self, submission: Submission, error: ApiError) -> None:
        """End a request with an error; its rows are freed, and the ends of its samples are not dispatched any more."""
        assert submission.number is not None
        del self._submissions[submission.number]
        self.engine.cancel(submission.number)
        self.engine.finished(submission.number)  # forgets them
        self._call_in_loop(self._dispatch, [(submission, error)], submission.samples_left)
        submission.number = None

    def _expire(self) -> None:
        """End what has waited for a row too long."""
        now = time.monotonic()
        if now - self._last_expiry < EXPIRY_SECONDS:
            return
        self._last_expiry = now
        # A request of several samples has started with the first of them.
        started = {job.number for job in self.engine.running}
        for number in {job.number for job in self.engine.waiting} - started:
            submission = self._submissions[number]
            if now - submission.submitted_at > self.queue_seconds and not submission.last_token_at:
                message = f"no row was free within {self.queue_seconds:g} seconds; try again later"
                self._fail(submission, unavailable_error(message, "overloaded"))

    def _deliver(self, events: list[Event]) -> None:
        """Hand the events of a step to the event loop, all in one call."""
        batch: list[tuple[Submission, WorkerEvent]] = []
        samples_ended = tokens = 0
        now = time.monotonic()
        for event in events:
            submission = self._submissions.get(event.request)
            if submission is None:  # it was ended with an error
                continue
            if self._reuses:  # how a prompt was computed would tell whether much of it was known
                event = dataclasses.replace(event, certificate=None)
            batch.append((submission, event))
            if event.token is not None:
                tokens += 1
                self._observe_token(submission, event, now)
            if event.finish is not None:
                samples_ended += 1
                submission.samples_left -= 1
                self.metrics.samples.labels(self.name, event.finish).inc()
                if submission.samples_left == 0:
                    batch.append((submission, Done(self._complete(submission, event.request, now))))
        self.metrics.tokens.labels(self.name).inc(tokens)
        if tokens:
            self.speed.add(tokens)
        if batch:
            self._call_in_loop(self._dispatch, batch, samples_ended)

    def _complete(self, submission: Submission, number: int, now: float) -> list[Completion]:
        del self._submissions[number]
        submission.number = None
        completions = self.engine.finished(number)
        self.metrics.request_seconds.labels(self.name).observe(now - submission.submitted_at)
        return completions

    def _observe_token(self, submission: Submission, event: Event, now: float) -> None:
        """Record how long a token took, and with a first one how its prompt was computed."""
        before = submission.last_token_at.get(event.sample)
        if before is None:
            self.metrics.first_token.labels(self.name).observe(now - submission.submitted_at)
        else:
            self.metrics.next_token.labels(self.name).observe(now - before)
        submission.last_token_at[event.sample] = now
        if event.certificate is not None:
            self.metrics.sweeps.labels(self.name).observe(event.certificate.sweeps)
            if event.certificate.residual is not None:
                self.metrics.residual.labels(self.name).observe(event.certificate.residual)

    def _dispatch(self, batch: list[tuple[Submission, WorkerEvent]], samples_ended: int) -> None:
        """In the event loop: put everything of a step into the queues of its requests."""
        self.load -= samples_ended
        for submission, event in batch:
            submission.events.put_nowait((submission, event))

    def _call_in_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)
