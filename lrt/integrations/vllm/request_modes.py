# pyright: reportMissingImports=false
"""What each request in vLLM's batch asks for, and how its prompt went: a logits processor that changes no logits.

It is the interface by which vLLM tells a plugin which request is in which row, in both of its model runners, and by
which it checks a request's own arguments (`vllm_xargs`) before it is taken. The plugin's entry point in the group
`vllm.logits_processors` loads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from lrt.inference.certificate import Certificate
from lrt.inference.prefill import PrefillMode
from lrt.integrations.vllm.modes import asked_mode


@dataclass
class BatchedRequest:
    """One request in the batch."""

    mode: PrefillMode | None = None
    """What it asks for; None where it says nothing."""
    prompt: int | None = None
    """Tokens of its prompt, where the runner says so."""
    certificates: list[Certificate] = field(default_factory=list)
    """Of the chunks of its prompt so far."""


ENGINES: dict[str, RequestModes] = {}
"""By `VllmConfig.instance_id`: a process may hold several engines."""


class RequestModes(LogitsProcessor, LogitsProcessorV2):
    """The requests of one engine, by the number that the runner gives them: the row in the first runner, the slot in
    the second."""

    def __init__(self, vllm_config: Any, *rest: Any) -> None:
        self.requests: dict[int, BatchedRequest] = {}
        self.states = rest[0]
        ENGINES[vllm_config.instance_id] = self

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """ValueError for an unknown mode. A request that names one computes its prompt itself: what others have left
        in the prefix cache may be less exact than it asks."""
        if asked_mode(sampling_params.extra_args) is not None:
            sampling_params.skip_reading_prefix_cache = True

    def request(self, number: int) -> BatchedRequest:
        """The request of this number; of dummy batches there is none, and they ask for nothing."""
        return self.requests.get(number, BatchedRequest())

    # --- the first runner ----------------------------------------------------------------------------------------

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows. Called before each forward."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.requests.pop(row, None)
        for row, params, prompt, _ in batch_update.added:
            self.requests[row] = BatchedRequest(asked_mode(params.extra_args), None if prompt is None else len(prompt))
        for one, other, direction in batch_update.moved:
            moved, replaced = self.requests.pop(one, None), self.requests.pop(other, None)
            if moved is not None:
                self.requests[other] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self.requests[one] = replaced

    def is_argmax_invariant(self) -> bool:
        return True

    # --- the second ----------------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """A request enters; False: its logits are left alone."""
        self.requests[req_idx] = BatchedRequest(
            asked_mode(sampling_params.extra_args), int(self.states.prompt_len.np[req_idx])
        )
        return False

    def apply(self, logits: Tensor, *context: Any) -> Tensor:
        return logits


def numbers_of(requests: int, table: Sequence[int] | None) -> list[int]:
    """By row of a step, the number of its request: the row itself in the first runner, which has no table."""
    return list(range(requests)) if table is None else [int(number) for number in table[:requests]]
