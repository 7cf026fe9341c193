"""The public face: `import lrt` is light, and a name means one thing, whatever was imported before."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import lrt

FACE = Path(lrt.__file__)
HEAVY = ("torch", "numpy", "pandas", "transformers", "tokenizers", "matplotlib", "scipy", "rich", "tyro")
SECONDS = 0.2
"""CPU that `import lrt` may take, beside the interpreter's start."""


def run(program: str) -> str:
    """What a new interpreter prints that runs `program`."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=FACE.parents[1], env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_importing_lrt_imports_nothing_heavy() -> None:
    loaded = run("import sys, lrt, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))")
    assert not set(HEAVY) & set(json.loads(loaded))
    assert run("import sys, lrt; print([m for m in sys.modules if m.startswith('lrt')])") == "['lrt']"


def test_importing_lrt_takes_little_time() -> None:
    timed = "import time; begun = time.process_time(); import lrt; print(time.process_time() - begun)"
    assert min(float(run(timed)) for _ in range(3)) < SECONDS


def test_names_are_listed_before_they_are_imported() -> None:
    listed = run("import lrt, json; print(json.dumps(dir(lrt)))")
    assert set(lrt.__all__) <= set(json.loads(listed))


def test_type_checkers_and_the_interpreter_see_the_same_names() -> None:
    tree = ast.parse(FACE.read_text(encoding="utf-8"))
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    stated = {
        (node.module, alias.name) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert stated == {(home, name) for home, names in lrt.HOMES.items() for name in names} | {("lrt", "schedules")}
    assert {name for _, name in stated} | {"__version__"} == set(lrt.__all__)
    assert sorted(lrt.__all__) == list(lrt.__all__)


EVERY_NAME_TWICE = """
import importlib, json, pkgutil, types
import lrt

def names():
    return {name: getattr(lrt, name) for name in lrt.__all__}

first, missing = names(), []
for module in pkgutil.walk_packages(lrt.__path__, "lrt."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:  # an optional extra that is not installed
        assert not (error.name or "").startswith("lrt"), error
        missing.append(error.name)
second = names()
changed = [name for name in first if second[name] is not first[name] and second[name] != first[name]]
modules = [name for name in second if isinstance(second[name], types.ModuleType)]
inner = [m.name for m in pkgutil.iter_modules(lrt.__path__) if not isinstance(getattr(lrt, m.name), types.ModuleType)]
print(json.dumps({"changed": changed, "modules": modules, "hidden": inner, "missing": missing}))
"""


def test_a_name_means_the_same_after_every_module_was_imported() -> None:
    """A room and a function of one name would hide each other, by who was imported last."""
    told = json.loads(run(EVERY_NAME_TWICE))
    assert told["changed"] == []
    assert told["modules"] == ["schedules"]
    assert told["hidden"] == []
    extras = {"transformers", "lm_eval", "fastapi", "uvicorn", "prometheus_client", "starlette", "vllm"}
    assert set(told["missing"]) <= extras


def test_the_version_is_the_distributions() -> None:
    assert lrt.__version__ == importlib.metadata.version("latent-recurrent-transformer")


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(lrt, "no_such_name")
    assert run("import lrt; print(hasattr(lrt, 'prefil'))") == "False"


def test_the_old_name_of_the_hugging_face_room_stays_importable() -> None:
    assert run("import lrt.hf; print(lrt.hf.LRTForCausalLM.__name__)") == "LRTForCausalLM"


def test_the_package_says_that_it_is_typed() -> None:
    assert (FACE.parent / "py.typed").is_file()
