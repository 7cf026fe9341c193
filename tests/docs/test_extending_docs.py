"""The snippets of docs/extending.md are files that register something, each as it stands there."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.registries import restored

from lrt.utils.plugins import load_file

GUIDE = Path(__file__).parents[2] / "docs" / "extending.md"
SNIPPETS = re.findall(r"## (.*?)\n.*?```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
PROVIDED = {
    "An injection": ["injection clipped"],
    "A combination of sources": ["combine loudest"],
    "A schedule": ["schedule backwards"],
    "An ablation": ["ablation halved"],
    "A task of state tracking": ["task last_bit"],
    "A source of text": ["source .csv"],
}


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    with restored():
        yield


def test_every_kind_has_a_snippet() -> None:
    assert [title for title, _ in SNIPPETS] == list(PROVIDED)


@pytest.mark.parametrize(("title", "text"), SNIPPETS, ids=[title for title, _ in SNIPPETS])
def test_a_snippet_is_a_plugin(title: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "snippet_of_the_guide.py"
    file.write_text(text)
    assert load_file(file).provides == PROVIDED[title]
