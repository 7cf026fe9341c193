"""A plugin's source as part of an exported folder: `import lrt` and `from lrt import …` become imports from modules.

The folder has no package lrt, only its modules side by side. A public name that a plugin uses is therefore imported
from the module that defines it, which `export` then makes relative as in every other file.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

from lrt.utils.plugins import Plugin

PUBLIC_NAMES = "lrt_face"
"""The module that stands for `import lrt` in the folder, with the names that plugins use."""


def file_name(plugin: Plugin) -> str:
    """The plugin's module in the folder."""
    return f"plugin_{plugin.name.replace('.', '_')}"


def sources(plugins: Sequence[Plugin]) -> dict[str, str]:
    """Modules to be written -> their source, which imports from modules of lrt alone; empty without plugins.

    ValueError where a plugin is more than one file, or is in none.
    """
    modules: dict[str, str] = {}
    names: set[str] = set()
    for plugin in plugins:
        if plugin.path is None:
            raise ValueError(f"{plugin} is in no file that could be exported; write it to one and load that")
        source = plugin.path.read_text(encoding="utf-8")
        modules[file_name(plugin)] = import_from_modules(source, plugin)
        names |= public_names_used(ast.parse(source))
    if names:
        modules[PUBLIC_NAMES] = '"""What the plugins of this folder take from lrt."""\n\n' + imports_of(sorted(names))
    return modules


def import_from_modules(source: str, plugin: Plugin) -> str:
    """The source, importing public names of `import lrt` from the modules that define them.

    ValueError for imports that cannot be exported, and where such an import shares its line with other code.
    """
    lines = source.splitlines(keepends=True)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    # From the last line up: what replaces an import may have more lines, which would move those below.
    for node in sorted(nodes, key=lambda node: -node.lineno):
        text = replacement(node, plugin)
        if text is not None:
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            # Whole lines are replaced. The offsets of ast count UTF-8 bytes.
            before = lines[node.lineno - 1].encode()[: node.col_offset].strip()
            after = lines[node.end_lineno - 1].encode()[node.end_col_offset :].strip()
            if before or (after and not after.startswith(b"#")):
                raise ValueError(
                    f"{plugin}, line {node.lineno}: other code shares the line of an import from lrt; give it its own"
                )
            indented = "".join(" " * node.col_offset + line for line in text.splitlines(keepends=True))
            lines[node.lineno - 1 : node.end_lineno] = [indented]
    return "".join(lines)


def replacement(node: ast.Import | ast.ImportFrom, plugin: Plugin) -> str | None:
    """What stands for an import in the folder; None where it may stay."""
    if isinstance(node, ast.ImportFrom):
        if node.level > 0 or own_file(node.module or "", plugin):
            raise ValueError(f"{plugin} imports other files of its own; only one file can be exported: put all into it")
        if node.module != "lrt":
            return None
        return imports_of([alias.name for alias in node.names], {a.name: a.asname for a in node.names if a.asname})
    others = [alias for alias in node.names if alias.name.partition(".")[0] != "lrt"]
    if any(own_file(alias.name, plugin) for alias in others):
        raise ValueError(f"{plugin} imports other files of its own; only one file can be exported: put all into it")
    deep = [alias.name for alias in node.names if alias.name.startswith("lrt.")]
    if deep:
        raise ValueError(f"{plugin} says `import {deep[0]}`; to be exported, it has to say `from {deep[0]} import …`")
    if len(others) == len(node.names):
        return None
    rest = f"import {', '.join(ast.unparse(alias) for alias in others)}\n" if others else ""
    name = next(alias.asname or alias.name for alias in node.names if alias.name == "lrt")
    return f"{rest}from . import {PUBLIC_NAMES} as {name}\n"


def own_file(module: str, plugin: Plugin) -> bool:
    """Whether a module is another one of the plugin's package, or lies beside its file: the folder would lack it."""
    assert plugin.path is not None
    first, folder = module.partition(".")[0], plugin.path.absolute().parent
    if first == plugin.name.partition(".")[0]:
        return True
    if folder in {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")}:
        return False  # beside an installed file lies everything
    return first != "" and ((folder / f"{first}.py").is_file() or (folder / first / "__init__.py").is_file())


def public_names_used(tree: ast.Module) -> set[str]:
    """The public names that a source uses through `import lrt`."""
    imported = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    called = {alias.asname or alias.name for alias in imported if alias.name == "lrt"}
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id in called}


def imports_of(names: Iterable[str], renamed: dict[str, str | None] | None = None) -> str:
    """Lines that import public names from the modules that define them. ValueError for a name that is none."""
    # By name, as lrt/__init__.py is above all rooms.
    homes: dict[str, tuple[str, ...]] = importlib.import_module("lrt").HOMES
    lines = []
    for name in names:
        home = next((module for module, defined in homes.items() if name in defined), None)
        if home is None and importlib.util.find_spec(f"lrt.{name}") is None:
            raise ValueError(f"lrt has no name {name!r} that a plugin could be exported with")
        lines.append(f"from {home or 'lrt'} import {name} as {(renamed or {}).get(name) or name}\n")
    return "".join(lines)
