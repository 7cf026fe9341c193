"""Plugins: modules of a user's own that register things; who registered what, and from which file.

A plugin is a Python module that calls `lrt.register_injection`, `@lrt.schedule` and the like when it is imported. It
comes by `import`, by an entry point of an installed package (group `lrt.plugins`), or by its path (`lrt --plugin`). Its
name is the module's, its version the module's `__version__`. A checkpoint records name, version and SHA-256 of the
plugins that it needs; loading one never runs a file that the user did not name.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

GROUP = "lrt.plugins"
"""Entry points of this group are imported when a command starts, and before a name is called unknown."""
LIBRARY = __name__.partition(".")[0]
"""The package that this file is part of: lrt, or a folder that `lrt export` wrote, which has its plugins in it."""
DIGITS = 12
"""Hexadecimal digits of a hash that are shown."""


@dataclass(eq=False)
class Plugin:
    """A module that registered something."""

    name: str
    """The module's; of a file the stem."""
    path: Path | None
    """None: defined in an interactive session."""
    sha256: str | None
    module: ModuleType | None = None
    packaged: str = "0"
    """The version where the module says none: its package's."""
    provides: list[str] = field(default_factory=list)
    """What it registered: "injection low_rank"."""

    @property
    def version(self) -> str:
        return str(vars(self.module).get("__version__", self.packaged)) if self.module else self.packaged

    def __str__(self) -> str:
        return f"the plugin {self.name} ({self.path or 'an interactive session'})"


REGISTERED: dict[str, Plugin] = {}
"""What plugins registered, "injection low_rank", and which did."""
KNOWN: dict[str, Plugin] = {}
"""Plugins by name."""
FILES: list[Plugin] = []
"""Those that were loaded by path, in order."""
_loading: list[Plugin] = []
_said: set[str] = set()


def owner(module: str) -> Plugin | None:
    """The plugin that code of `module` acts for; None for the library's own."""
    if module.partition(".")[0] == LIBRARY:
        return None
    if _loading:  # also for the modules that it imports
        return _loading[-1]
    if module not in KNOWN:
        KNOWN[module] = of_module(module, sys.modules.get(module))
    return KNOWN[module]


def of_module(name: str, module: ModuleType | None) -> Plugin:
    """A plugin that was imported, or is a running script."""
    file = vars(module).get("__file__") if module else None
    if file is None:
        return Plugin(name, None, None, module)
    path = Path(file)
    own = path.stem if name == "__main__" else name
    return Plugin(own, path, hashlib.sha256(path.read_bytes()).hexdigest(), module)


@contextmanager
def loading(plugin: Plugin) -> Iterator[None]:
    """Within the block everything that is registered is the plugin's."""
    _loading.append(plugin)
    try:
        yield
    finally:
        _loading.pop()


def load_file(path: Path | str) -> Plugin:
    """Run a file that registers something; once, however often it is named.

    ValueError where there is no such file, it raises, it registers nothing, or another module has its name.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}; --plugin takes a Python file")
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise ValueError(f"{path} is no module's name; call the file for example low_rank.py")
    source = path.read_bytes()
    digest, known = hashlib.sha256(source).hexdigest(), KNOWN.get(path.stem)
    if known is not None and known.sha256 != digest:
        raise ValueError(f"two plugins are called {path.stem!r}: {known.path} and {path}; rename one")
    plugin = known or run_file(path, source, digest)
    if plugin not in FILES:
        FILES.append(plugin)
    return plugin


def run_file(path: Path, source: bytes, digest: str) -> Plugin:
    """Run the source of a plugin as the module of its name."""
    name = path.stem
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if name in sys.modules or (spec is not None and Path(spec.origin or "").resolve() != path.resolve()):
        raise ValueError(
            f"{path} cannot be a plugin: Python has another module {name}; give the file a name of its own"
        )
    module = ModuleType(name)
    module.__file__ = str(path)
    plugin = Plugin(name, path, digest, module)
    sys.modules[name] = module
    try:
        with loading(plugin):
            exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))  # these bytes, which were hashed
        if not plugin.provides:
            raise ValueError("it registers nothing; see docs/extending.md")
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"the plugin {path} cannot be loaded: {kind}{error}") from error
    KNOWN[name] = plugin
    return plugin


def load_entry_points() -> None:
    """Import what installed packages offer in the group `lrt.plugins`, once; one that fails is named and left out."""
    if LIBRARY != "lrt" or GROUP in _said:
        return
    _said.add(GROUP)
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            load_entry_point(entry)
        except Exception as error:  # a broken package must not stop what does not need it
            print(f"warning: the plugin {entry.value} cannot be loaded, and is left out: {error}", file=sys.stderr)


def load_entry_point(entry: importlib.metadata.EntryPoint) -> None:
    """Import an entry point's module; where it names a function, call it."""
    if entry.module in KNOWN:  # imported by the user
        return
    plugin = Plugin(entry.module, None, None, packaged=entry.dist.version if entry.dist else "0")
    with loading(plugin):
        target = entry.load()
        if entry.attr:
            target()
    imported = of_module(entry.module, sys.modules[entry.module])
    plugin.path, plugin.sha256, plugin.module = imported.path, imported.sha256, imported.module
    KNOWN[entry.module] = plugin


def arguments() -> list[str]:
    """What gives another `lrt` process the same files."""
    return [word for plugin in FILES for word in ("--plugin", str(plugin.path))]


def describe(uses: Sequence[tuple[str, Plugin]]) -> list[dict[str, Any]]:
    """What a checkpoint says of the plugins behind `uses`: ("injection low_rank", its plugin), …"""
    records: dict[str, dict[str, Any]] = {}
    for use, plugin in uses:
        about = {"name": plugin.name, "version": plugin.version, "sha256": plugin.sha256, "provides": []}
        records.setdefault(plugin.name, about)["provides"].append(use)
    return list(records.values())


def missing(records: Sequence[dict[str, Any]], kinds: Collection[str]) -> str | None:
    """What to say where a recorded plugin that provides one of `kinds` is not loaded; None where all are.

    A plugin that is loaded from another file is named on standard error, once.
    """
    if LIBRARY != "lrt" or not records:
        return None
    load_entry_points()
    for record in records:
        version = f"version {record['version']}, sha256 {str(record['sha256'])[:DIGITS]}"
        for use in record["provides"]:
            plugin = REGISTERED.get(use)
            if plugin is not None:
                compare(record, plugin, version)
            elif use.partition(" ")[0] in kinds and record["sha256"] is None:
                return f"this checkpoint needs {use}, which was defined in an interactive session: define it first"
            elif use.partition(" ")[0] in kinds:
                return (
                    f"this checkpoint needs the plugin {record['name']}: pass --plugin {record['name']}.py, or import "
                    f"it first ({version}; it registers {use})"
                )
    return None


def compare(record: dict[str, Any], plugin: Plugin, version: str) -> None:
    """Say, once, that what a checkpoint was made with is not what is loaded."""
    text = (
        f"warning: this checkpoint was made with the plugin {record['name']}, {version}; loaded is {plugin.name}, "
        f"version {plugin.version}, sha256 {str(plugin.sha256)[:DIGITS]}"
    )
    if plugin.sha256 != record["sha256"] and text not in _said:
        _said.add(text)
        print(text, file=sys.stderr)


def require(records: Sequence[dict[str, Any]], kinds: Collection[str]) -> None:
    """ValueError with what `missing` says."""
    reason = missing(records, kinds)
    if reason is not None:
        raise ValueError(reason)
