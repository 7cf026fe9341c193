"""The code of a Hugging Face folder that works where lrt is not installed: lrt's own modules, flattened.

They are found by following imports, and there is no second implementation. transformers knows no packages in such a
folder: lrt.model.state becomes lrt_model_state.py. What is imported from an entry decides what a folder carries; a
test names the rooms that it may not (tests/integrations/test_hf.py).
"""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lrt.integrations.hf import plugin_code
from lrt.utils.plugins import Plugin


@dataclass(frozen=True)
class RemoteCode:
    """What transformers finds by config.json when it trusts a folder's code."""

    entries: Mapping[str, str]
    """File names that config.json names, and the modules that they are; the configuration's first."""
    auto_map: Mapping[str, str]
    """Auto class -> FILE.CLASS."""

    def flat_name(self, module: str) -> str:
        """A module's file name in the folder, in which there are no packages."""
        entries = {path: name for name, path in self.entries.items()}
        return entries.get(module, module.replace(".", "_"))


def write_code(out: Path, code: RemoteCode, plugins: Sequence[Plugin] = ()) -> None:
    """The modules that a folder needs to work alone, and where transformers finds them (config.json's auto_map)."""
    own = plugin_code.sources(plugins)
    modules = required_modules(list(code.entries.values()), own.values())
    names = {module: code.flat_name(module) for module in modules}
    files = {names[module]: Path(module_file(module)).read_text(encoding="utf-8") for module in modules} | own
    configuration = next(iter(code.entries))
    for name, text in files.items():
        source = flatten_imports(text, names)
        if name in code.entries:
            source += mention_files(sorted(set(files) - {name}))
        if name == configuration:  # before a configuration can name what they register
            source += "".join(f"\nfrom .{plugin_code.file_name(plugin)} import __name__ as _\n" for plugin in plugins)
        (out / f"{name}.py").write_text(source, encoding="utf-8")
    license_file = Path(module_file("lrt")).parents[1] / "LICENSE"
    if license_file.is_file():
        shutil.copy(license_file, out / "LICENSE")
    config = json.loads((out / "config.json").read_text())
    config["auto_map"] = dict(code.auto_map)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def module_file(module: str) -> str:
    """The path of a module's source."""
    spec = find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return spec.origin


def lrt_imports(tree: ast.Module) -> list[tuple[ast.ImportFrom, list[str]]]:
    """The imports from lrt in a module, each with the modules that it names (`from lrt import a` names lrt.a)."""
    imports = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lrt":
            assert node.module is not None
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in dotted if is_module(name)]
            assert len(modules) in (0, len(dotted)), f"line {node.lineno}: modules and names of {node.module} mixed"
            imports.append((node, modules or [node.module]))
    return imports


def is_module(name: str) -> bool:
    """Whether a dotted name is a module, and not a class or function in one."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, not a package
        return False


def required_modules(entries: list[str], sources: Iterable[str] = ()) -> list[str]:
    """`entries` and all modules of lrt that they, or these sources, import, directly or not; what only type checkers
    import, too."""
    modules, todo = set(), list(entries)
    todo += [name for source in sources for _, names in lrt_imports(ast.parse(source)) for name in names]
    while todo:
        module = todo.pop()
        if module not in modules:
            modules.add(module)
            tree = ast.parse(Path(module_file(module)).read_text(encoding="utf-8"))
            todo.extend(name for _, names in lrt_imports(tree) for name in names)
    return sorted(modules)


def flatten_imports(source: str, names: dict[str, str]) -> str:
    """The source with its imports from lrt made relative to a flat folder."""
    lines = source.splitlines(keepends=True)
    # From the last import to the first, so that a shorter one moves no line that is still to be replaced.
    for node, modules in sorted(lrt_imports(ast.parse(source)), key=lambda entry: -entry[0].lineno):
        indent = " " * node.col_offset
        if modules == [node.module]:
            imported = ", ".join(ast.unparse(alias) for alias in node.names)
            text = f"{indent}from .{names[modules[0]]} import {imported}\n"
        else:
            text = "".join(
                f"{indent}from . import {names[module]} as {alias.asname or alias.name}\n"
                for module, alias in zip(modules, node.names, strict=True)
            )
        assert node.end_lineno is not None
        lines[node.lineno - 1 : node.end_lineno] = [text]
    return "".join(lines)


def mention_files(names: list[str]) -> str:
    """A block that never runs and names every file: transformers copies those that an import line mentions."""
    return "\n\nif False:  # transformers looks for lines like these to know which files belong together\n" + "".join(
        f"    from .{name} import __name__ as _\n" for name in names
    )
