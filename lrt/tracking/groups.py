"""Permutation groups as multiplication tables."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

Permutation = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group of permutations, its elements numbered in lexicographic order (the identity is 0)."""

    elements: tuple[Permutation, ...]
    """g[i] is where g takes i."""
    table: Tensor
    """(n, n) int: table[a, b] is the element "a, then b"."""
    identity: int = 0

    @property
    def order(self) -> int:
        return len(self.elements)

    def small(self, moved: int) -> tuple[int, ...]:
        """The elements that move at most `moved` places; 2: the swaps and the identity."""
        return tuple(n for n, g in enumerate(self.elements) if sum(i != j for i, j in enumerate(g)) <= moved)


def symmetric(places: int) -> Group:
    """S_n: all permutations."""
    return group(list(itertools.permutations(range(places))))


def alternating(places: int) -> Group:
    """A_n: the even ones."""
    return group([g for g in itertools.permutations(range(places)) if even(g)])


def even(g: Permutation) -> bool:
    """Whether a permutation has an even number of inversions."""
    return sum(a > b for a, b in itertools.combinations(g, 2)) % 2 == 0


def group(elements: list[Permutation]) -> Group:
    """The group of these elements, which must be closed."""
    number = {g: n for n, g in enumerate(elements)}
    table = [[number[tuple(b[i] for i in a)] for b in elements] for a in elements]
    return Group(tuple(elements), torch.tensor(table))
