"""Many prompts at once: continuous batching over the rows of one State.

Every step feeds each row in use its next token, of the prompt or just drawn, at the row's own position; rows that are
done are given back at once and taken by those waiting. So prompts of any lengths share a batch without padding, exact
prefill is the same step as decoding, and a row's tokens are those that it would have alone (contract, section 7).

Prompts that are computed in parallel instead (`prefill="converged"`) are swept when they take a row, or before, in a
thread beside the steps (`background`). Those that sweeps would not pay for are fed among the others' tokens.

Rows in use are the first ones of the State: when a row is done the last one takes its place (one copy), and a step
computes no idle rows. Samples of a request and reused prefixes are one thing: a row copied up to where the texts part,
at most all but the prompt's last token, whose hidden state is computed anew. The memory history makes that exact.

Shapes: n rows in use, V vocabulary, D width.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait

import torch
from torch import Tensor

from lrt.inference.certificate import Certificate
from lrt.inference.cost_model import Calibration, fallback
from lrt.inference.decoders import decoder
from lrt.inference.exactness import asked_bound, least_exact
from lrt.inference.job import Job, log_probability, shape_rows
from lrt.inference.prefill import PREFILL_MODES, Prefilled, PrefillMode, exact_reason, prefill, refuse_thoughts
from lrt.inference.request import Completion, Event, Finish, Request
from lrt.inference.row_pool import KeptRow, PrefixCache, RowPool, copy_row, rows_that_fit
from lrt.inference.sampling import draw_rows
from lrt.model.config import ModelConfig
from lrt.model.transformer import LatentRecurrentTransformer

ROWS = 8
"""Rows of an engine that neither `rows` nor `memory` limits: a few users, in little memory."""
CHUNK = 256
"""Slots beyond the lookback where slots are reused: what a parallel prefill computes at once."""

MOMENT = 0.005
"""Seconds that a step waits for the background where no row is in use, so that it can be cancelled meanwhile."""


class Engine:
    """Serves requests with one model. `submit`, then `step` until `idle`; or `complete`, or `stream`.

    Not for several threads at once: one thread owns an engine.
    """

    def __init__(
        self,
        model: LatentRecurrentTransformer,
        rows: int | None = None,
        slots: int | None = None,
        mode: str = "fused",
        prefill: PrefillMode = "exact",
        memory: int | None = None,
        prefixes: int = 0,
        calibration: Calibration | None = None,
        prompts: int | None = None,
        background: Executor | None = None,
    ) -> None:
        """Allocates all rows at once.

        model: without latent thoughts, whose prompts no engine serves.
        rows: sequences decoded at once. None: `ROWS`, or as many as fit into `memory`.
        slots: the longest a sequence may become, in tokens. None: the context. Where every layer slides they are
            reused and limit nothing; None is then what a position looks back on, and room for a chunk of a prompt.
        mode: which path decodes (`engine.mode` names it): eager, fused, packed, compiled, or best, which measures them.
        prefill: how prompts are computed. `exact` feeds them token by token among the others' tokens; the rest as in
            `prefill.py`. A request may say otherwise for itself.
        memory: bytes that the rows may take, beside the weights. None: no limit.
        prefixes: bytes for rows of earlier requests, whose beginnings later prompts reuse. 0 keeps none.
        calibration: what decides between sweeps and token by token. None: a device's usual costs.
        prompts: how many prompts are prefilled in parallel in one step at most, so that the others' tokens do not wait
            for long. None: no limit. With 1 a prompt is computed as it would be alone, whatever arrives beside it.
        background: where prompts are prefilled in parallel, each alone, while the others' tokens go on: a thread. None:
            within the step.

        Raises ValueError, which names value, limit and fix, on numbers below 1 and where `memory` is too little.
        """
        config = model.config
        refuse_thoughts(config)
        slots = usual_slots(config, prefill) if slots is None else slots
        fitting = None if memory is None else rows_that_fit(model, memory, slots)
        if rows is None:
            rows = ROWS if fitting is None else fitting  # at least 1: where not even one row fits, it has raised
        if rows < 1:
            raise ValueError(f"rows is {rows}; an engine needs at least 1")
        if fitting is not None and rows > fitting:
            raise ValueError(
                f"{rows} rows of {slots} slots exceed the {memory} bytes given, which hold {fitting}; give fewer rows"
            )
        if prompts is not None and prompts < 1:
            raise ValueError(f"prompts is {prompts}; give at least 1 per step, or None: no limit")
        self.model, self.prompts, self.background = model, prompts, background
        self.calibration = calibration or fallback(model.embedding.weight.device)
        self.prefill: PrefillMode = prefill
        self.decoder = decoder(model, model.empty_state(rows, slots), mode)
        self.rows = RowPool(self.decoder)
        self.slots = slots
        self.limit = None if config.unlimited_context else slots
        """Tokens that a row may have; None where slots are reused."""
        self.prefixes = PrefixCache(prefixes, [asked_bound(mode, model) for mode in PREFILL_MODES])
        self.waiting: deque[Job] = deque()
        """Jobs without a row, in the order in which they came."""
        self.running: list[Job] = []
        """Job i is in row i."""
        self.prefilling: list[tuple[Job, Future[Prefilled]]] = []
        """Jobs whose prompts are computed in the background, in order; each gets a row when it is done."""
        self.done: dict[int, list[Completion]] = {}
        """What `step` completed, by request, until it is fetched with `finished`."""
        self.ended: list[Event] = []
        """What ended outside a step (cancelled, or no token asked for), for the next one to report."""
        self.streams: dict[int, deque[Event]] = {}
        """What each open stream has still to give, whoever makes the steps."""
        self.next_request = 0
        """The number that the next request gets."""

    @property
    def mode(self) -> str:
        """The path that decodes."""
        return self.decoder.name

    @property
    def idle(self) -> bool:
        """Whether another step would do nothing."""
        return not self.waiting and not self.running and not self.ended and not self.prefilling

    def submit(self, request: Request) -> int:
        """Queue a request; returns its number. ValueError where it cannot be served."""
        request.check(self.model.config, self.slots)
        return self.enqueue(request)

    def enqueue(self, request: Request) -> int:
        """`submit` for a request that has passed `Request.check` already."""
        number, self.next_request = self.next_request, self.next_request + 1
        jobs = [Job(request, number, i, list(request.tokens)) for i in range(request.samples)]
        if request.max_new_tokens == 0:
            for job in jobs:
                self.ended.append(self._finish(job, "length"))
        else:
            self.waiting.extend(jobs)
        return number

    def cancel(self, number: int, sample: int | None = None) -> None:
        """End a request, or one sample of it; rows are free at once. What is done, or unknown, stays as it is."""

        def matching(jobs: Iterable[Job]) -> list[Job]:
            return [job for job in jobs if job.number == number and sample in (None, job.sample)]

        for job in matching(self.waiting):
            self.waiting.remove(job)
            self.ended.append(self._finish(job, "cancelled"))
        for job in matching(job for job, _ in self.prefilling):
            (future,) = (future for other, future in self.prefilling if other is job)
            future.cancel()  # what is at work ends by itself, and is not looked at
            self.prefilling.remove((job, future))
            self.ended.append(self._finish(job, "cancelled"))
        for job in matching(self.running):
            self._leave(job)
            self.ended.append(self._finish(job, "cancelled"))

    def step(self) -> list[Event]:
        """One token for every row in use (two where its prompt was just prefilled).

        Returns what was drawn, and which samples ended. A row that is still within its prompt draws nothing.
        """
        events, self.ended = self.ended, []
        for job, prefilled in self._take_prefilled():
            events += self._draw([job], self._join(job, prefilled))
        for jobs, hidden in self._prefill_new(self._admit()):  # these already stand at their prompt's end
            events += self._draw(jobs, hidden)
        if self.running:
            tokens = torch.tensor([job.tokens[job.fed] for job in self.running], device=self.rows.state.tokens.device)
            hidden = self.decoder(tokens, [job.fed for job in self.running])  # each row at its own position
            for job in self.running:
                job.fed += 1
            # The others are within their prompt: the next token is known.
            ready = [i for i, job in enumerate(self.running) if job.fed == len(job.tokens)]
            hidden = hidden if len(ready) == len(self.running) else hidden[ready]
            if ready:
                events += self._draw([self.running[i] for i in ready], hidden)
        for event in events:
            if event.request in self.streams:
                self.streams[event.request].append(event)
        return events

    def stream(self, request: Request) -> Generator[Event, None, None]:
        """The events of one request as they come; others in the engine go on beside it.

        It is submitted when its first event is asked for, and cancelled where it is left or collected before its end.
        Nothing of it stays in the engine. ValueError, at the call, where it cannot be served.
        """
        request.check(self.model.config, self.slots)
        return self._stream(request)

    def _stream(self, request: Request) -> Generator[Event, None, None]:
        number, left = self.enqueue(request), request.samples
        self.streams[number] = deque()
        try:
            while left:
                while not self.streams[number]:
                    self.step()
                event = self.streams[number].popleft()
                left -= event.finish is not None
                yield event
        finally:
            self.cancel(number)
            del self.streams[number], self.done[number]  # all samples have ended by now
            self.ended = [event for event in self.ended if event.request != number]

    def complete(self, requests: Iterable[Request]) -> list[list[Completion]]:
        """Serve requests to their end: the samples of each, in order."""
        numbers = [self.submit(request) for request in requests]
        while not self.idle:
            self.step()
        return [self.finished(number) for number in numbers]

    def finished(self, number: int) -> list[Completion]:
        """The completed samples of a request, in order; they are forgotten with this."""
        return sorted(self.done.pop(number, []), key=lambda completion: completion.sample)

    # --- within a step -----------------------------------------------------------------------------------------

    def _admit(self) -> list[Job]:
        """Waiting jobs into free rows, in order, each with the beginning that is known already."""
        fresh: list[Job] = []
        for job in list(self.waiting):
            if self.rows.free <= len(self.prefilling) or self._enough(fresh):
                break
            if job.sample > 0 and job.fork is None and self._prompt_running(job.number):
                continue  # its prompt is being computed for the first sample; it waits for that, those behind do not
            self.waiting.remove(job)
            if job.fork is not None:  # all but the last token of the prompt, whose hidden state is computed anew
                known: tuple[int, KeptRow] | None = (len(job.request.tokens) - 1, job.fork)
            else:
                error = asked_bound(self._mode(job), self.model)
                known = self.prefixes.find(job.tokens, self.model.config.lookback, error, job.request.owner)
            if known is not None and known[0] > 0:
                job.fed = job.reused = known[0]
                job.certificate = known[1].certificate
            job.fork = None  # copied in a moment: let go of it
            if self.background is not None and self._sweeps(job):
                self.prefilling.append((job, self._prefill_beside(job, known, self.background)))
                continue
            row = self.rows.take()
            if known is not None:
                self.rows.copy(row, known[1].state, 0, job.fed)
            self.running.append(job)
            fresh.append(job)
        return fresh

    def _enough(self, fresh: Sequence[Job]) -> bool:
        """Whether no more prompts may be prefilled in this step than these."""
        return self.prompts is not None and sum(map(self._sweeps, fresh)) >= self.prompts

    def _prefill_beside(self, job: Job, known: tuple[int, KeptRow] | None, background: Executor) -> Future[Prefilled]:
        """Begin to compute the rest of a job's prompt in the background, on a row of its own."""
        state = self.model.empty_state(1, self.slots).in_place()
        if known is not None:
            copy_row(state, 0, known[1].state, 0, job.fed)
        tokens = torch.tensor([job.tokens[job.fed :]], device=state.tokens.device)
        mode, calibration = self._mode(job), self.calibration
        return background.submit(prefill, self.model, tokens, state, mode, calibration=calibration)

    def _take_prefilled(self) -> list[tuple[Job, Prefilled]]:
        """What the background has done, in order; with nothing else to do, it is waited for a moment."""
        if self.prefilling and not self.running:
            wait([future for _, future in self.prefilling], MOMENT, FIRST_COMPLETED)
        done = [(job, future) for job, future in self.prefilling if future.done()]
        self.prefilling = [pair for pair in self.prefilling if pair not in done]
        return [(job, future.result()) for job, future in done]

    def _join(self, job: Job, prefilled: Prefilled) -> Tensor:
        """A prompt that was computed in the background into a row: its last hidden state (1, D)."""
        row = self.rows.take()
        self.running.append(job)
        self._certify(job, prefilled.report.rows[0])
        job.fed = len(job.tokens)
        self.rows.copy(row, prefilled.state, 0, job.fed)
        return prefilled.hidden.squeeze(1)

    def _prompt_running(self, number: int) -> bool:
        """Whether the first sample of a request is still busy with the prompt."""
        prefilling = (job for job, _ in self.prefilling)
        return any(job.number == number and not job.new for job in (*self.running, *prefilling))

    def _mode(self, job: Job) -> PrefillMode:
        """How a job's prompt is computed."""
        return job.request.prefill or self.prefill

    def _sweeps(self, job: Job) -> bool:
        """Whether a new row's prompt is computed in parallel: else it is fed among the others' tokens."""
        mode, left = self._mode(job), len(job.tokens) - job.fed
        if mode == "exact" or left <= 1:
            return False
        # As if it were alone, so that what else waits does not decide whether it is swept.
        reason = exact_reason(self.model, mode, left, 1, self.calibration)
        if reason is not None:
            self._certify(job, Certificate("exact", reason, len(job.tokens)))
        return reason is None

    def _prefill_new(self, fresh: Sequence[Job]) -> list[tuple[list[Job], Tensor]]:
        """Compute the prompts of new rows in parallel, mode by mode: jobs and their last hidden states (n, D)."""
        groups: dict[PrefillMode, list[Job]] = {}
        for job in fresh:
            if self._sweeps(job):
                groups.setdefault(self._mode(job), []).append(job)
        return [self._prefill(jobs, mode) for mode, jobs in groups.items()]

    def _prefill(self, jobs: list[Job], mode: PrefillMode) -> tuple[list[Job], Tensor]:
        """Compute the rest of these jobs' prompts: on copies of their rows, which are then written back."""
        rows = [self.running.index(job) for job in jobs]
        parts = [torch.tensor(job.tokens[job.fed :]) for job in jobs]
        device = self.rows.state.tokens.device
        tokens = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(device)
        state = self.rows.state.select(torch.tensor(rows, device=device))  # a copy, which prefill may overwrite
        lengths = torch.tensor([len(part) for part in parts], device=device)
        out = prefill(self.model, tokens, state, mode, lengths, self.calibration)
        for i, (row, job) in enumerate(zip(rows, jobs, strict=True)):
            job.fed = len(job.tokens)
            self._certify(job, out.report.rows[i])
            self.rows.copy(row, out.state, i, job.fed)
        return jobs, out.hidden.squeeze(1)

    def _certify(self, job: Job, certificate: Certificate) -> None:
        """Note how the rest of a prompt was computed: no more exactly than what it goes on from.

        It is a certificate of the whole prompt: how much of it was known would tell what others have asked.
        """
        length = len(job.request.tokens)
        job.certificate = least_exact(job.certificate, dataclasses.replace(certificate, tokens=length), length)

    def _draw(self, jobs: Sequence[Job], hidden: Tensor) -> list[Event]:
        """The next token of jobs whose tokens are all fed, from hidden (n, D)."""
        logits = self.decoder.logits(hidden)
        seeds = [(job.seed, len(job.tokens)) for job in jobs]  # (seed, position of the token that is drawn)
        tokens = draw_rows(shape_rows(jobs, logits), [job.request.sampling for job in jobs], seeds).tolist()
        events = []
        for i, (job, token) in enumerate(zip(jobs, tokens, strict=True)):
            if job.sample == 0 and not job.new:
                self._fork(job)
            certificate = None if job.new else job.certificate  # with the first token only
            job.tokens.append(token)
            logprob = None
            if job.request.logprobs is not None:
                logprob = log_probability(logits[i], token, job.request.logprobs)
                job.logprobs.append(logprob)
            finish = job.advance(self.limit)
            if finish is not None:  # rows move now; jobs and logits keep the order of this call
                self._leave(job)
                self._finish(job, finish)
            events.append(Event(job.number, job.sample, token, finish, logprob, certificate))
        return events

    def _fork(self, job: Job) -> None:
        """The prompt's row for the other samples, which wait for it."""
        others = [j for j in self.waiting if j.number == job.number]
        if others:
            row = self._snapshot(job)
            for other in others:
                other.fork = row

    def _snapshot(self, job: Job) -> KeptRow:
        """What a job's row holds. The last token drawn was not fed, so it is not part of it."""
        state = self.rows.snapshot(self.running.index(job), job.fed)
        return KeptRow(tuple(job.tokens[: job.fed]), state, job.certificate, job.request.owner)

    def _leave(self, job: Job) -> None:
        """A job's row is free; the last row takes its number."""
        row = self.running.index(job)
        if self.prefixes.budget:
            self.prefixes.keep(self._snapshot(job))
        last = self.rows.give_back(row)
        self.running[row] = self.running[last]
        self.running.pop()

    def _finish(self, job: Job, finish: Finish) -> Event:
        """Note the completed sample; the event that says so without another token."""
        prompt = len(job.request.tokens)
        completion = Completion(
            job.number, job.sample, tuple(job.new), finish, tuple(job.logprobs), prompt, job.reused, job.certificate
        )
        self.done.setdefault(job.number, []).append(completion)
        return Event(job.number, job.sample, None, finish)


def usual_slots(config: ModelConfig, prefill: PrefillMode) -> int:
    """Slots of a row: the context; where slots are reused, what a position looks back on, and room for a chunk."""
    if not config.unlimited_context:
        return config.context
    return config.lookback + (1 if prefill == "exact" else CHUNK)
