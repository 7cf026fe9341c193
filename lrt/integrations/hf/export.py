"""`lrt export`: a checkpoint as a Hugging Face folder that works where lrt is not installed.

config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json
configuration_lrt.py, modeling_lrt.py   what transformers loads with trust_remote_code=True
lrt_*.py                                the modules of lrt that those need, imports made relative
plugin_*.py                             the files of a user's own that registered parts of this model, if any
README.md                               the model card
"""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import tokenizers
from tokenizers import processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from lrt.data.tokenizer import Tokenizer
from lrt.integrations.hf import plugin_code
from lrt.integrations.hf.configuration import LRTConfig
from lrt.integrations.hf.model_card import card
from lrt.integrations.hf.modeling import LRTForCausalLM
from lrt.model import checkpoint
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.base import plugin_uses
from lrt.schedules.parse import Unknown, parse_saved
from lrt.utils import files
from lrt.utils.plugins import Plugin, describe

ENTRIES = {"configuration_lrt": "lrt.integrations.hf.configuration", "modeling_lrt": "lrt.integrations.hf.modeling"}
"""File names that transformers knows from config.json, and the modules that they are."""


def export(source: Path | str, out: Path | str, prefill: str = "converged", remote_code: bool = True) -> LRTForCausalLM:
    """Write the checkpoint (or run) `source` to the folder `out`, which must be new or an earlier export.

    Without `remote_code` the folder needs `import lrt.hf` before it is loaded. Returns the model that was written.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()) and (not is_export(out)):
        raise ValueError(f"{out} holds something that is no exported LRT; choose another folder")
    fresh = out.with_name(f".{out.name}.saving-{os.getpid()}")
    try:
        model = write_folder(source, fresh, prefill, remote_code)
        files.swap(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return model


def is_export(folder: Path) -> bool:
    """Whether a folder is what `export` writes: neither a checkpoint of ours nor a model of another kind."""
    file = folder / "config.json"
    if not file.is_file() or (folder / "manifest.json").exists():
        return False
    return files.read_json(file).get("model_type") == LRTConfig.model_type


def write_folder(source: Path | str, out: Path, prefill: str, remote_code: bool) -> LRTForCausalLM:
    """Write a checkpoint as a folder that does not exist yet."""
    native, tokenizer = checkpoint.load(source)
    about = checkpoint.about(source)
    model = wrap(native, tokenizer, about.get("schedule", "plain()"), prefill)
    model.save_pretrained(out)
    special = tokenizer.inner.id_to_token(tokenizer.bos)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=prepend_bos(tokenizer),
        bos_token=special,
        eos_token=special,
        pad_token=special,
        model_max_length=native.config.context,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)
    plugins = list(dict(plugins_behind(native, model.config.schedule)).values())
    if remote_code:
        write_code(out, list(dict.fromkeys(plugins)))
    (out / "README.md").write_text(card(model, about, remote_code), encoding="utf-8")
    return model


def plugins_behind(native: LatentRecurrentTransformer, schedule: str) -> list[tuple[str, Plugin]]:
    """What plugins registered of a model and its schedule, as `plugins.describe` takes it."""
    trained = parse_saved(schedule)
    return native.config.memory.plugin_uses() + ([] if isinstance(trained, Unknown) else plugin_uses(trained))


def wrap(native: LatentRecurrentTransformer, tokenizer: Tokenizer, schedule: str, prefill: str) -> LRTForCausalLM:
    """A native model as transformers' one, with the same parameters."""
    config = LRTConfig(
        native.config.to_dict(),
        schedule,
        prefill,
        describe(plugins_behind(native, schedule)),
        bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.bos,  # one special token opens a document, and so ends the one before
        pad_token_id=tokenizer.bos,
        dtype=str(native.embedding.weight.dtype).removeprefix("torch."),
    )
    model = LRTForCausalLM(config)
    model.model = native
    model.generation_config = GenerationConfig.from_model_config(config)
    return model.eval()


def prepend_bos(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer with BOS before every text, as the model was trained."""
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    bos = inner.id_to_token(tokenizer.bos)
    inner.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos)]
    )
    return inner


def write_code(out: Path, plugins: Sequence[Plugin] = ()) -> None:
    """The modules that a folder needs to work alone, and where transformers finds them (config.json's auto_map)."""
    own = plugin_code.sources(plugins)
    modules = modules_needed(list(ENTRIES.values()), own.values())
    names = {module: flat(module) for module in modules}
    written = {names[module]: Path(module_file(module)).read_text(encoding="utf-8") for module in modules} | own
    for name, text in written.items():
        source = relative(text, names)
        if name in ENTRIES:
            source += mentions(sorted(set(written) - {name}))
        if name == "configuration_lrt":  # before a configuration can name what they register
            source += "".join(f"\nfrom .{plugin_code.file_name(plugin)} import __name__ as _\n" for plugin in plugins)
        (out / f"{name}.py").write_text(source, encoding="utf-8")
    license_file = Path(module_file("lrt")).parents[1] / "LICENSE"
    if license_file.is_file():
        shutil.copy(license_file, out / "LICENSE")
    config = json.loads((out / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_lrt.LRTConfig",
        "AutoModelForCausalLM": "modeling_lrt.LRTForCausalLM",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def flat(module: str) -> str:
    """A module's file name in the folder, in which there are no packages."""
    return {v: k for k, v in ENTRIES.items()}.get(module, module.replace(".", "_"))


def module_file(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return spec.origin


def lrt_imports(tree: ast.Module) -> list[tuple[ast.ImportFrom, list[str]]]:
    """The imports from lrt in a module, each with the modules that it names (`from lrt import a` names lrt.a)."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lrt":
            assert node.module is not None
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            inner = [name for name in below if is_module(name)]
            assert len(inner) in (0, len(below)), f"line {node.lineno}: modules and names of {node.module} mixed"
            found.append((node, inner or [node.module]))
    return found


def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, not a package
        return False


def modules_needed(entries: list[str], sources: Iterable[str] = ()) -> list[str]:
    """`entries` and all modules of lrt that they, or these sources, import, directly or not."""
    found, todo = [], list(entries)
    todo += [name for source in sources for _, names in lrt_imports(ast.parse(source)) for name in names]
    while todo:
        module = todo.pop()
        if module not in found:
            found.append(module)
            tree = ast.parse(Path(module_file(module)).read_text(encoding="utf-8"))
            todo.extend(name for _, names in lrt_imports(tree) for name in names)
    return sorted(found)


def relative(source: str, names: dict[str, str]) -> str:
    """The source with its imports from lrt made relative to a flat folder."""
    lines = source.splitlines(keepends=True)
    for node, modules in sorted(lrt_imports(ast.parse(source)), key=lambda found: -found[0].lineno):
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


def mentions(names: list[str]) -> str:
    """A block that never runs and names every file: transformers copies those that an import line mentions."""
    return "\n\nif False:  # transformers looks for lines like these to know which files belong together\n" + "".join(
        f"    from .{name} import __name__ as _\n" for name in names
    )
