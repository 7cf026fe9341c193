"""Log-probabilities of a prompt's own tokens (`echo` with `logprobs`), from one prefill of it in the worker."""

from __future__ import annotations

from functools import partial

import torch

from lrt.engine import log_probability
from lrt.prefill import prefill
from lrt.requests import Request
from lrt.serve.served import Served
from lrt.serve.writing import Spoken

CHUNK = 64
"""Positions whose logits are made at once."""


async def prompt_scores(served: Served, request: Request, bare: bool) -> list[Spoken]:
    """One entry per token of the prompt. The first has no log-probability; `bare` leaves it out: nobody wrote it."""
    found = await served.worker.call(partial(scored, served, request))
    return found[1:] if bare else found


@torch.no_grad()
def scored(served: Served, request: Request) -> list[Spoken]:
    """In the worker's thread: the entries of all tokens of the prompt."""
    model, tokens, alternatives = served.model, request.tokens, request.logprobs
    assert alternatives is not None
    spelling = served.tokenizer.decoder()
    found = [Spoken(tokens[0], None, 0)]
    offset = len(spelling.push(tokens[0]))
    if len(tokens) == 1:
        return found
    mode = request.prefill or served.settings.prefill
    row = torch.tensor([tokens[:-1]], device=model.embedding.weight.device)
    done = prefill(
        model, row, model.empty_state(1, len(tokens) - 1), mode, calibration=served.worker.engine.calibration
    )
    for begin in range(0, len(tokens) - 1, CHUNK):
        for logits in model.logits(done.sequence[0, begin : begin + CHUNK]):
            token = tokens[len(found)]
            found.append(Spoken(token, log_probability(logits, token, alternatives), offset))
            offset += len(spelling.push(token))
    return found
