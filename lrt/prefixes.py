"""Prefixes that were computed before: a request whose prompt begins like an earlier text starts where they part.

The memory history in a State makes cropping exact, so any common beginning serves, not only whole earlier texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from lrt.config import require
from lrt.model.state import State


class Prefixes:
    """Snapshots of rows, the least recently used dropped where they exceed a budget."""

    def __init__(self, budget: int) -> None:
        """`budget` in bytes; 0 keeps nothing."""
        require(budget >= 0, f"the budget of prefixes is {budget} bytes; give 0 (keep none) or more")
        self.budget = budget
        self.kept: dict[tuple[int, ...], State] = {}

    @property
    def bytes(self) -> int:
        return sum(size(state) for state in self.kept.values())

    def find(self, tokens: Sequence[int], reach: int) -> tuple[int, State] | None:
        """(n, State) of the kept text that shares most tokens, n of them; at most all but the last, which is needed.

        reach: where slots are reused, how many positions before n must be intact.
        """
        wanted = tuple(tokens[:-1])
        shared = {text: common(text, wanted) for text in self.kept}
        text = max(shared, key=lambda t: shared[t], default=())
        if not shared or shared[text] == 0:
            return None
        state = self.kept.pop(text)
        self.kept[text] = state  # now the most recently used
        if state.reusable and not bool(state.intact(ends(state, shared[text]), reach).all()):
            return None
        return shared[text], state

    def keep(self, tokens: Sequence[int], state: State) -> None:
        """Keep a row that holds these tokens; texts that it begins with are dropped."""
        text = tuple(tokens)
        if size(state) > self.budget or not text:
            return
        for other in [t for t in self.kept if text[: len(t)] == t]:
            del self.kept[other]
        self.kept[text] = state
        while self.bytes > self.budget:
            del self.kept[next(iter(self.kept))]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def size(state: State) -> int:
    """Bytes of a State's buffers."""
    parts = (*state.keys, *state.values, state.memory, state.tokens, state.held)
    return sum(part.numel() * part.element_size() for part in parts)


def ends(state: State, length: int) -> Tensor:
    """(1,): a length as `intact` takes it."""
    return state.held.new_tensor([length])
