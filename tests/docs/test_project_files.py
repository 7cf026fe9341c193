"""What surrounds the code says what the code says: versions, checks, commands."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def read_yaml(name: str):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_citation_is_of_this_version():
    citation = read_yaml("CITATION.cff")
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


def test_every_supported_python_is_tested():
    classified = {c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.fullmatch(r".*:: 3\.\d+", c)}
    jobs = read_yaml(".github/workflows/ci.yml")["jobs"]
    (whole,) = (step["with"]["python-version"] for step in jobs["all-tests"]["steps"] if "with" in step)
    assert {whole, *jobs["fast-tests"]["strategy"]["matrix"]["python"]} == classified
    assert {"run": ".ci/run"} in jobs["all-tests"]["steps"]


def test_a_commit_is_checked_as_make_lint_checks():
    (repo,) = read_yaml(".pre-commit-config.yaml")["repos"]
    hooks = " ".join(hook["entry"] for hook in repo["hooks"])
    lint = MAKEFILE.split("lint:")[1].split("\n\n")[0]
    for tool in re.findall(r"\$\(BIN\)/(\S+)", lint):
        assert f".venv/bin/{tool}" in hooks, tool


def test_commands_of_the_guide_are_in_the_makefile():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    make (\S+)", text, re.MULTILINE)
    assert len(commands) == 9
    for command in commands:
        assert re.search(rf"^{command}:", MAKEFILE, re.MULTILINE), command


@pytest.mark.parametrize("file", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda f: f.name)
def test_a_form_is_whole(file: Path):
    form = read_yaml(str(file.relative_to(ROOT)))
    assert form["name"]
    assert form["description"]
    assert any(part.get("validations", {}).get("required") for part in form["body"])
    assert len({part["id"] for part in form["body"]}) == len(form["body"])


def test_the_versions_that_a_bug_report_asks_for_are_printed(capsys: pytest.CaptureFixture[str]):
    form = read_yaml(".github/ISSUE_TEMPLATE/bug.yml")
    (description,) = (part["attributes"]["description"] for part in form["body"] if part["id"] == "versions")
    exec(re.findall(r'python -c "(.*)"', description)[0], {})
    assert re.match(r"\d+\.\d+\.\d+ .*threads, torch \d", capsys.readouterr().out)


@pytest.mark.parametrize("file", sorted((ROOT / "results" / "benchmarks").glob("*.jsonl")), ids=lambda f: f.name)
def test_lines_of_benchmarks_are_of_what_they_say(file: Path):
    """Each arm once for each seed, with what it was trained on and where."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    cells = [(line["arm"], line["equal"], line["seed"]) for line in lines]
    assert len(set(cells)) == len(cells)
    seeds = {line["seed"] for line in lines}
    assert len(cells) == len({cell[:2] for cell in cells}) * len(seeds)
    assert all(line["tokens"] > 0 and line["live_bpb"] > 0 and line["hardware"]["device"] for line in lines)
