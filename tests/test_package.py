"""The package as such: style, types, import order, the wheel, and the pinned versions.

Each tool runs from the environment that runs the tests, over the repository, and shows its own output when it fails.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTION = "latent-recurrent-transformer"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = ROOT / "constraints.txt"


def run(command: Sequence[str | Path], cwd: Path = ROOT, **environment: str) -> str:
    """Run a command and return what it printed; where it fails, the test fails with exactly that."""
    # A PYTHONPATH would let a clean environment see this checkout.
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}", pytrace=False)
    return done.stdout


def tool(name: str) -> Path:
    """The program `name` of the environment that runs the tests, whether that is activated or not."""
    found = shutil.which(name, path=sysconfig.get_path("scripts"))
    if found is None:
        pytest.fail(f"{name} is not installed in {sys.prefix}; run: pip install -e '.[dev]' -c constraints.txt")
    return Path(found)


# ------------------------------------------------------------------------------------------------------- the code


def test_ruff_finds_nothing() -> None:
    run([tool("ruff"), "check", "."])


def test_code_is_formatted() -> None:
    run([tool("ruff"), "format", "--check", "--diff", "."])


@pytest.mark.slow
def test_types() -> None:
    run([tool("basedpyright"), "--pythonpath", sys.executable])


def test_imports_point_downwards() -> None:
    run([tool("lint-imports"), "--no-cache"])


# ------------------------------------------------------------------------------------------------- pinned versions


def pins() -> dict[str, Version]:
    """Canonical name -> version of every line of constraints.txt, each of which has to be `name==version`."""
    found = {}
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"constraints.txt: {text!r} is not an exact version"
        name = canonicalize_name(requirement.name)
        assert name not in found, f"constraints.txt names {name} twice"
        found[name] = Version(specifier.version)
    return found


def requirements_of(name: str) -> list[str]:
    """What an installed distribution says that it needs."""
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.fail(f"{name} is needed but not installed; run: pip install -e '.[dev]' -c constraints.txt")


def needed(requirements: Sequence[str]) -> set[str]:
    """Canonical names of `requirements` and of everything they need in turn, as installed here."""
    names: set[str] = set()
    seen: set[tuple[str, str]] = set()
    open_ = [(Requirement(text), "") for text in requirements]
    while open_:
        requirement, extra = open_.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        # The CUDA build of torch brings its own libraries, at versions it fixes itself; the CPU build has none.
        if name.startswith(("nvidia-", "cuda-")) or name == "triton":
            continue
        names.add(name)
        for each in {"", *requirement.extras}:
            if (name, each) not in seen:
                seen.add((name, each))
                open_ += [(Requirement(text), each) for text in requirements_of(name)]
    return names


def test_installed_versions_are_the_pinned_ones() -> None:
    wrong = []
    for name, version in pins().items():
        try:
            # torch calls its builds 2.13.0+cpu, 2.13.0+cu130, …; the version is the part before the plus.
            installed = Version(importlib.metadata.version(name)).public
        except importlib.metadata.PackageNotFoundError:
            installed = "not installed"
        if installed != str(version):
            wrong.append(f"{name}: pinned {version}, {installed}")
    assert not wrong, "constraints.txt and the environment differ:\n" + "\n".join(wrong)


# Extras that no command of this repository installs, so that there is nothing to pin, or that have a file of their own.
ELSEWHERE = ("wandb", "trackio", "linear-rnn", "vllm")


def installed_extras() -> list[str]:
    """The requirements of the extras that `make` installs."""
    extras = PROJECT["optional-dependencies"].items()
    return [text for name, requirements in extras if name not in ELSEWHERE for text in requirements]


def test_every_dependency_is_pinned() -> None:
    extras = installed_extras()
    everything = needed(PROJECT["dependencies"] + extras)
    missing = sorted(everything - pins().keys())
    assert not missing, f"not in constraints.txt: {missing}"
    unused = sorted(pins().keys() - everything)
    assert not unused, f"in constraints.txt, but nothing needs them: {unused}"


def test_pinned_versions_are_within_the_declared_ranges() -> None:
    extras = installed_extras()
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        version = pins()[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, (
            f"pyproject.toml asks for {requirement}, constraints.txt pins {version}"
        )


# -------------------------------------------------------------------------------------------------------- the wheel


def build_wheel(into: Path) -> Path:
    """Build the wheel with the installed build backend, so that no network is needed."""
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", into, ROOT])
    (wheel,) = into.glob("*.whl")
    return wheel


def check_installed(environment: Path, elsewhere: Path) -> None:
    """The installed package imports, and its command answers, from a folder that is not the checkout."""
    elsewhere.mkdir()
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    where = "import lrt, importlib.metadata as m; print(lrt.__file__, m.version('latent-recurrent-transformer'))"
    location, version = run([scripts / "python", "-c", where], cwd=elsewhere).split()[-2:]
    assert Path(location).is_relative_to(environment), f"lrt came from {location}, not from the wheel"
    assert version == PROJECT["version"]
    shown = run([scripts / "lrt", "--help"], cwd=elsewhere, COLUMNS="100")
    assert re.search(r"usage:.*\blrt\b", shown, re.IGNORECASE), shown


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    assert wheel.name == f"latent_recurrent_transformer-{PROJECT['version']}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
    assert licenses, "the wheel has no licence"
    # A pattern in .gitignore keeps a file out of the wheel too, silently.
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lrt").rglob("*") if path.is_file()}
    sources = {name for name in sources if "__pycache__" not in name}
    assert inside == sources
    assert "lrt/py.typed" in inside


LOADED = """
import sys
from lrt.cli import verbs
from lrt.cli.main import main
for name in ("", *verbs.PLACES):
    try:
        main([*([name] if name else []), "--help"])
    except SystemExit as ended:
        assert not ended.code
    heavy = [m for m in ("torch", "numpy", "matplotlib", "transformers") if m in sys.modules]
    assert not heavy, (name, heavy)
"""


def test_help_of_no_verb_waits_for_torch() -> None:
    """torch alone takes two seconds to import; help of a verb takes a third of one without."""
    assert "usage: lrt train" in run([sys.executable, "-c", LOADED])


def test_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    """The package from its wheel in an environment of its own; only the dependencies are borrowed from this one."""
    wheel = build_wheel(tmp_path / "dist")
    environment = tmp_path / "environment"
    run([sys.executable, "-m", "venv", "--without-pip", environment])
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel])
    # Only now, or pip would find the lrt of this environment and take it for the one to replace. A folder that a .pth
    # file adds comes after the environment's own, and its .pth files (an editable lrt among them) are not read.
    purelib = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    borrowed = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (purelib / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    check_installed(environment, tmp_path / "elsewhere")


@pytest.mark.slow
def test_wheel_installs_with_its_dependencies(tmp_path: Path) -> None:
    """What a user does: a new environment, the wheel, and its dependencies from the package registry."""
    wheel = build_wheel(tmp_path / "dist")
    environment = tmp_path / "environment"
    run([sys.executable, "-m", "venv", environment])
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    run([python, "-m", "pip", "install", wheel, "--constraint", CONSTRAINTS])
    run([python, "-m", "pip", "check"])
    check_installed(environment, tmp_path / "elsewhere")
