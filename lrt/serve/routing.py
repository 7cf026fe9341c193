"""Which of a model's workers a prompt goes to: where its beginning may be kept already."""

from __future__ import annotations

from collections import OrderedDict

from lrt.inference.radix_tree import RadixTree

RECENT = 1024
"""Prompts that are remembered of each worker."""
LOOKED_AT = 4096
"""Tokens of a prompt that are compared, so that a long one keeps nobody waiting."""


class RecentPrompts:
    """The prompts that a worker was given last, for the event loop: the rows themselves are the engine's own.

    Prompts of one owner are never compared with another's.
    """

    def __init__(self) -> None:
        self.trees: dict[str, RadixTree[bool]] = {}
        self.order: OrderedDict[tuple[str, tuple[int, ...]], None] = OrderedDict()
        """(owner, beginning of a prompt), the oldest first."""

    def add(self, owner: str, tokens: tuple[int, ...]) -> None:
        """Remember a prompt; beyond RECENT the oldest is forgotten."""
        place = owner, tokens[:LOOKED_AT]
        self.order[place] = None
        self.order.move_to_end(place)
        self.trees.setdefault(owner, RadixTree()).add(place[1], True)
        if len(self.order) > RECENT:
            (old, text), _ = self.order.popitem(last=False)
            self.trees[old].remove(text)

    def shared(self, owner: str, tokens: tuple[int, ...]) -> int:
        """How many tokens a prompt has in common, at its beginning, with one of them: the most."""
        return self.trees[owner].longest(tokens[:LOOKED_AT])[0] if owner in self.trees else 0
