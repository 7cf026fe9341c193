"""Prompts that the page offers: such as fit what a checkpoint was trained on.

By default they are written here, and picked by the name of the training text: nothing of that text is sent to anybody.
Only a server that is asked to (`lrt serve --examples`) shows beginnings of the run's own held-out documents.
"""

from __future__ import annotations

import re
from pathlib import Path

from lrt.eval.run_data import trained_on
from lrt.eval.runs import read_config, run_folder

PROMPTS: dict[frozenset[str], tuple[str, ...]] = {
    frozenset({"stdlib", "python", "code"}): (
        "def __init__(self, name, value=None):\n",
        "import os\nimport sys\n\n",
        "class Stack:\n    def push(self, item):\n",
        "for i in range(10):\n    print(",
    ),
    frozenset({"stories", "story", "tales"}): (
        "Once upon a time there was a little",
        "The dog ran to the",
        "Anna was sad because",
    ),
    frozenset({"chess"}): ("engine e2 e4 e7 e5 g1 f3 ", "engine d2 d4 g8 f6 ", "random a2 a3 "),
    frozenset({"repl"}): (
        "a = 3\nb = a\na += b\nprint(a % 7)\n",
        "s.append(c)\na = s.pop()\nprint(a % 7)\n",
        "a, b = b, a\n",
    ),
    frozenset({"log"}): ("SET a 3\nINCR a\nGET a", "SET b 1\nMOVE b c\nGET c", "DEL a\nGET a"),
}
"""Words in the name of a training text -> prompts for it."""
GENERAL = ("It was the best of times, it was", "The king said to the queen that", "Once upon a time", "1, 2, 3, 4, 5,")
HELD_OUT = 4
"""Beginnings of documents that are shown."""
TOKENS = 24
"""Of each."""


def written_prompts(about: dict[str, str]) -> tuple[str, ...]:
    """Prompts for a checkpoint, by what it says of its training text. Nothing of that text is in them."""
    words = set(re.findall(r"[a-z]+", about.get("corpus", "").lower()))
    return next((prompts for names, prompts in PROMPTS.items() if words & names), GENERAL)


def held_out_prompts(path: Path) -> tuple[str, ...]:
    """Beginnings of the first documents that a run held out for validation. ValueError where its text is not there."""
    data = trained_on(run_folder(path))
    documents = data.split("val")
    texts = (data.tokenizer.decode(documents[n][:TOKENS].tolist()) for n in range(min(len(documents), HELD_OUT)))
    return tuple(text.rstrip("\ufffd") for text in texts)


def example_prompts(path: Path, folder: Path, held_out: bool) -> tuple[str, ...]:
    """What the page offers for a run, or a checkpoint, `path`, whose weights are in `folder`."""
    return held_out_prompts(path) if held_out else written_prompts(read_config(folder / "config.json").get("about", {}))
