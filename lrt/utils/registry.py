"""Tables of names that users may add to: injections, schedules, tasks, …; who added what, and no name twice."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from lrt.utils import plugins
from lrt.utils.validation import shorten

T = TypeVar("T")


class UnknownName(ValueError):
    """A name that nobody registered."""


class Registry(Mapping[str, T], Generic[T]):
    """Names of one kind and what they stand for, the library's first.

    >>> colours = Registry("colour", {"red": 0xFF0000})
    >>> colours.register("blue", 0x0000FF)
    >>> list(colours), colours["blue"]
    (['red', 'blue'], 255)
    >>> colours.find("green")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    lrt.utils.registry.UnknownName: unknown colour 'green'; choose one of red, blue, or what a plugin registers...
    """

    def __init__(self, kind: str, entries: Mapping[str, T] | None = None, reserved: Sequence[str] = ()) -> None:
        """`kind` is what messages call an entry, in one word.

        `reserved` are names of the library's own, known here although a module above registers what they stand for.
        """
        self.kind = kind
        self._names = [*reserved, *(entries or {})]
        self._entries: dict[str, T] = dict(entries or {})

    def register(self, name: str, entry: T, stacklevel: int = 1) -> None:
        """Add an entry for the module of the caller, `stacklevel` frames up (as in `warnings.warn`).

        ValueError, naming both owners, where the name is taken. The same definition again (a module that is reloaded, a
        cell of a notebook that is run twice) replaces itself.
        """
        plugin = plugins.owner(sys._getframe(stacklevel).f_globals.get("__name__", "__main__"))
        if not name.isidentifier() and not name.startswith("."):  # a source's name is a suffix
            raise ValueError(f"{self.kind} {name!r} is no name; use letters, digits and _")
        taken = name in self._entries or (name in self._names and plugin is not None)
        if taken and not self._again(name, entry, plugin):
            raise ValueError(
                f"{self.kind} {name!r} is registered twice, by {self.owner(name) or 'lrt'} and by {plugin or 'lrt'}; "
                "rename one"
            )
        if name not in self._names:
            self._names.append(name)
        self._entries[name] = entry
        if plugin is not None:
            use = f"{self.kind} {name}"
            plugins.REGISTERED[use] = plugin
            plugin.provides += [use] if use not in plugin.provides else []

    def _again(self, name: str, entry: T, plugin: plugins.Plugin | None) -> bool:
        """Whether this is the same plugin's same definition."""
        owner = self.owner(name)
        if owner is None or plugin is None:
            return False
        same = definition(entry) is not None and definition(entry) == definition(self._entries[name])
        return owner.name == plugin.name and (same or plugin.path is None)

    def owner(self, name: str) -> plugins.Plugin | None:
        """Who registered a name; None for the library."""
        return plugins.REGISTERED.get(f"{self.kind} {name}")

    def uses(self, name: str) -> list[tuple[str, plugins.Plugin]]:
        """The plugin that a name needs, as `plugins.describe` takes it; empty for the library's own."""
        plugin = self.owner(name)
        return [] if plugin is None else [(f"{self.kind} {name}", plugin)]

    def check(self, name: object, others: Sequence[str] = ()) -> None:
        """UnknownName, with the known ones, unless `name` is one, or one of `others`."""
        if name in self._names or name in others:
            return
        plugins.load_entry_points()  # an installed package may know it
        if name not in self._names:
            known = ", ".join([*self._names, *others])
            raise UnknownName(
                f"unknown {self.kind} {shorten(name)}; choose one of {known}, or what a plugin registers (--plugin)"
            )

    def find(self, name: str) -> T:
        """The entry of a name. UnknownName with the known ones."""
        self.check(name)
        return self._entries[name]

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._names))

    def __len__(self) -> int:
        return len(self._names)


def definition(entry: Any) -> tuple[str, str] | None:
    """Where a class or function is defined; None for other values."""
    name = getattr(entry, "__qualname__", None)
    return None if name is None else (entry.__module__, name)
