"""A radix tree over token texts: the longest beginning that a text shares with one of many, in time of its length."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Node(Generic[T]):
    """A place in the tree. Every leaf has an item, and so has whatever is above it a text that passes through."""

    label: tuple[int, ...]
    """Tokens between the node above and this one."""
    item: T | None = None
    """Of the text that ends here, if one does."""
    children: dict[int, Node[T]] = field(default_factory=dict)
    """By the first token of their labels."""


class RadixTree(Generic[T]):
    """Items by their texts, which are not empty."""

    def __init__(self) -> None:
        self.root: Node[T] = Node(())

    @property
    def empty(self) -> bool:
        """Whether it has no item."""
        return not self.root.children

    def add(self, text: tuple[int, ...], item: T) -> None:
        """Put an item at a text, in the place of one that is there."""
        node, at = self.root, 0
        while at < len(text):
            child = node.children.get(text[at])
            if child is None:
                node.children[text[at]] = Node(text[at:], item)
                return
            shared = common_prefix(child.label, text[at : at + len(child.label)])
            if shared < len(child.label):
                child = split(node, child, shared)
            node, at = child, at + shared
        node.item = item

    def remove(self, text: tuple[int, ...]) -> None:
        """Take the item of a text out, which is there."""
        above, node = [node for node, _ in self._walk(text)][-2:]
        node.item = None
        if not node.children:
            del above.children[node.label[0]]
            node = above
        if node.item is None and len(node.children) == 1 and node is not self.root:  # one label in place of two
            (child,) = node.children.values()
            node.label, node.item, node.children = node.label + child.label, child.item, child.children

    def longest(self, text: Sequence[int]) -> tuple[int, T | None]:
        """(n, item): a text that shares n tokens with this one at its beginning, the most; (0, None) for none."""
        node, shared = self.root, 0
        for child, at in self._walk(tuple(text)):
            node, shared = child, at
        if shared == 0:
            return 0, None
        while node.item is None:  # any text below shares as much
            node = next(iter(node.children.values()))
        return shared, node.item

    def beginnings(self, text: tuple[int, ...]) -> list[T]:
        """The items of texts that this one begins with, itself included."""
        length, items = 0, []
        for node, at in self._walk(text):
            length += len(node.label)
            if node.item is not None and at == length:
                items.append(node.item)
        return items

    def _walk(self, text: tuple[int, ...]) -> Iterator[tuple[Node[T], int]]:
        """The nodes on a text's way, each with how many tokens are shared up to it; of the last perhaps not all."""
        node, at = self.root, 0
        yield node, at
        while at < len(text) and (child := node.children.get(text[at])) is not None:
            shared = common_prefix(child.label, text[at : at + len(child.label)])
            node, at = child, at + shared
            yield node, at
            if shared < len(node.label):
                return


def split(above: Node[T], child: Node[T], length: int) -> Node[T]:
    """A node within a child's label, behind so many of its tokens."""
    middle = Node(child.label[:length], None, {child.label[length]: child})
    child.label = child.label[length:]
    above.children[middle.label[0]] = middle
    return middle


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
