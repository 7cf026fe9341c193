"""Conversations from JSON lines, in the layouts that people have, as TRL takes them.

{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}       OpenAI's
{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}           ShareGPT's
{"prompt": "…", "completion": "…"}                                                            no template
{"text": "…"}                                                                                 no prompt
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
OPENAI_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
LAYOUTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("messages",): ("messages",),
    ("conversations",): ("messages",),
    ("prompt", "completion"): ("prompt", "completion"),
    ("text",): ("text",),
}
"""Fields of a record -> columns of the row that it becomes."""


def read_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of all files, in order, of one kind: messages, prompt and completion, or text.

    ValueError, naming file and line, for what is no such record; for files without records; and where kinds differ.
    """
    rows = [row for path in paths for row in read_file(path)]
    if not rows:
        raise ValueError(f"{', '.join(map(str, paths))}: no record; give a JSON object per line")
    kinds = sorted({", ".join(row) for row in rows})
    if len(kinds) > 1:
        raise ValueError(f"the records are of several kinds ({'; '.join(kinds)}); fine-tune on one kind at a time")
    return rows


def read_file(path: Path) -> Iterable[dict[str, Any]]:
    """The rows of one file."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield row_of(parse_line(line, f"{path} line {number}"), f"{path} line {number}")


def parse_line(line: str, where: str) -> dict[str, Any]:
    """The JSON object of a line."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}); give one object per line") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} is no object; give one JSON object per line")
    return record


def row_of(record: dict[str, Any], where: str) -> dict[str, Any]:
    """What TRL takes for a record. ValueError that says `where` it is of no layout that is known."""
    layout = next((fields for fields in LAYOUTS if all(record.get(field) is not None for field in fields)), None)
    if layout is None:
        raise ValueError(
            f"{where} has the fields {', '.join(record) or 'none'}; give messages, conversations, prompt and "
            "completion, or text"
        )
    if layout == ("messages",):
        return {"messages": messages_of(record["messages"], "role", "content", OPENAI_ROLES, where)}
    if layout == ("conversations",):
        return {"messages": messages_of(record["conversations"], "from", "value", SHAREGPT_ROLES, where)}
    for field in layout:
        if not isinstance(record[field], str) or not record[field]:
            raise ValueError(f"{where} has no text in {field!r}; give a string")
    return {field: record[field] for field in layout}


def messages_of(
    turns: Any, role_field: str, text_field: str, roles: dict[str, str], where: str
) -> list[dict[str, str]]:
    """A conversation's turns, of which one at least is the assistant's."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where} holds no list of turns; give objects with {role_field!r} and {text_field!r}")
    messages = []
    for turn in turns:
        role, text = turn.get(role_field), turn.get(text_field)
        if role not in roles or not isinstance(text, str):
            raise ValueError(
                f"{where} has a turn of {role!r} with {type(text).__name__}; give {role_field!r} of "
                f"{', '.join(roles)} and text in {text_field!r}"
            )
        messages.append({"role": roles[role], "content": text})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where} has no turn of the assistant, which is what is learned; leave it out")
    return messages
