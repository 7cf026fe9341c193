"""A small bundle of CORE tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lrt.utils.files import sha256


def write(file: Path, items: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    return file


ITEMS: dict[str, list[dict[str, Any]]] = {
    "multiple_choice": [
        {"query": f"the cat and dog {i}", "choices": [f"sat {i}", "question mat", f"answer {i}"], "gold": i % 3}
        for i in range(12)
    ],
    "schema": [
        {"context_options": [f"the cat {i}", f"the dog {i}"], "continuation": "sat on the mat", "gold": i % 2}
        for i in range(8)
    ],
    "language_modeling": [{"context": f"the cat sat on {i} ", "continuation": "the mat"} for i in range(6)],
}
NAMES = {"arc_easy": "multiple_choice", "winograd": "schema", "lambada_openai": "language_modeling"}


def make_bundle(folder: Path) -> Path:
    """A bundle of three tasks, and a fourth whose file is missing."""
    entries = []
    for label, kind in {**NAMES, "squad": "language_modeling"}.items():
        shots = 2 if label == "arc_easy" else 0
        entries.append(
            f"-\n  label: {label}\n  dataset_uri: some/{label}.jsonl\n  num_fewshot: [{shots}]\n  icl_task_type: {kind}"
        )
        if label in NAMES:
            write(folder / "eval_data" / "some" / f"{label}.jsonl", ITEMS[kind])
    (folder / "core.yaml").write_text("icl_tasks:\n" + "\n".join(entries) + "\n")
    baselines = "".join(f"{label},{33 if label == 'arc_easy' else 0}\n" for label in [*NAMES, "squad"])
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + baselines)
    rows = "".join(f"{label}   , 0.5  , 0.25 \n" for label in [*NAMES, "squad"])
    (folder / "openai-community-gpt2.csv").write_text(f"Task , Accuracy , Centered\n{rows}CORE , , 0.25\n")
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "openai-community-gpt2.csv"]
    (folder / "SHA256SUMS").write_text("".join(f"{sha256(f)}  {f.relative_to(folder)}\n" for f in files))
    return folder
