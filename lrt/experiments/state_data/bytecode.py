"""Bytecode of the standard library, with its state: how deep the stack is, asked every 16 instructions.

A document is a code object of the running Python's standard library: a module, a class, a function. Every word is one
token, and each instruction is on a line of its own:

    from =2 in 1        the state at the beginning of a row: 2 values on the stack, 1 handler around
    LOAD_FAST 3         an instruction and its argument, not looked up; from 32 on only whether it is even: 32+ or 33+
    FOR_ITER +16        a jump: at least 16 instructions onwards, and fewer than 32
    {                   from the next instruction on an exception passes one more handler
    }                   one less
    from =1             the depth, where the lines before do not tell it: behind a return, a raise or a jump that is
                        always taken; behind an argument from 32 on that changes it
    depth? =2 in 1      behind every 16th instruction: a question, and two answers

The answers are the stack's depth behind the instruction (0 … 15, 16+) and the handlers around it (0 … 6, 7+), as
`lrt.experiments.state_data.stack_depth` defines them. A row begins with a whole line and ends with one. Its lines tell
all answers, but where the last state that they show is 16+ or 7+.

No floor is known of real programs but at the answers, where it is 0. The Python's version names the text, and so does
`bytecode_manifest`: other files are another text, and another version has other words too.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import json
import math
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lrt.data.corpus import stdlib_paths
from lrt.data.prepared import SPLITS
from lrt.data.splits import assign_splits
from lrt.experiments.state_data.rows import BOS, NOTHING, Benchmark, Rows
from lrt.experiments.state_data.stack_depth import Step, read_steps, stack_effect

EVERY = 16
"""Instructions from one question to the next."""
SHORTEST_DOCUMENT = 2 * EVERY
"""Instructions; a shorter code object is left out."""
SHORTEST_ROW = 32
"""Tokens; the longest line with its brackets fits."""
DEEPEST_STACK, MOST_BLOCKS, LARGEST_ARGUMENT, LONGEST_JUMP = 16, 7, 32, 10
"""From where on words stand for all that is more. Of a jump: the logarithm of its distance."""

ASK, FROM, OPEN, CLOSE = "\ndepth?", "\nfrom", "\n{", "\n}"
WORDS = (
    "",
    *(ASK, FROM, OPEN, CLOSE),
    *(f" ={n}" for n in range(DEEPEST_STACK)),
    f" ={DEEPEST_STACK}+",
    *(f" in {n}" for n in range(MOST_BLOCKS)),
    f" in {MOST_BLOCKS}+",
    *(f" {n}" for n in range(LARGEST_ARGUMENT)),
    *(f" {LARGEST_ARGUMENT + odd}+" for odd in (0, 1)),
    *(f" {sign}{2**n}" for sign in "+-" for n in range(LONGEST_JUMP + 1)),
    *(f"\n{name}" for name in sorted(dis.opmap)),
)
NUMBER = {word: number for number, word in enumerate(WORDS)}

Line = tuple[int, ...]
"""Tokens of an instruction, with what is said before it and asked behind it."""
State = tuple[int, int]
"""Depth of the stack, and handlers around."""


class Document(NamedTuple):
    """A code object."""

    lines: tuple[Line, ...]
    states: tuple[State, ...]
    """Before each line."""


@dataclass(frozen=True, eq=False)
class Programs:
    """Files of Python, compiled, as documents."""

    documents: dict[str, list[Document]]
    """Of each split. No document is twice in all of them."""
    manifest: dict[str, Any]
    """What was read: `read_programs`."""


def depth_word(depth: int) -> str:
    """The stack's depth."""
    return f" ={depth}" if depth < DEEPEST_STACK else f" ={DEEPEST_STACK}+"


def blocks_word(blocks: int) -> str:
    """The handlers around."""
    return f" in {blocks}" if blocks < MOST_BLOCKS else f" in {MOST_BLOCKS}+"


def argument_words(step: Step) -> list[str]:
    """The word of an instruction's argument, if it has one."""
    if step.argument is None:
        return []
    if step.jump is not None:
        distance = min(max(abs(step.jump), 1).bit_length() - 1, LONGEST_JUMP)
        return [f" {'+' if step.jump > 0 else '-'}{2**distance}"]
    return [f" {step.argument}" if step.argument < LARGEST_ARGUMENT else f" {known_argument(step.argument)}+"]


def known_argument(argument: int) -> int:
    """The least argument that is written as this one."""
    return argument if argument < LARGEST_ARGUMENT else LARGEST_ARGUMENT + argument % 2


def tells_effect(step: Step) -> bool:
    """Whether an instruction's words tell what it does to the depth."""
    if step.argument is None:
        return True
    return stack_effect(step.name, step.argument) == stack_effect(step.name, known_argument(step.argument))


def line_words(step: Step, before: Step | None, number: int) -> list[str]:
    """The words of instruction `number` of a code object, from 0 on; `before` is the one in front of it."""
    change = step.blocks - (before.blocks if before else 0)
    words = [OPEN] * change + [CLOSE] * -change
    if before is not None and not before.falls:
        words += [FROM, depth_word(step.before)]
    words += [f"\n{step.name}", *argument_words(step)]
    if not tells_effect(step):
        words += [FROM, depth_word(step.after)]
    if number % EVERY == EVERY - 1:
        words += [ASK, depth_word(step.after), blocks_word(step.blocks)]
    return words


def make_document(steps: list[Step], pool: dict[tuple[int, ...], tuple[int, ...]]) -> Document:
    """A code object's lines. Equal ones are one object, that of `pool`: there are many."""
    lines, states, before = [], [], None
    for number, step in enumerate(steps):
        line = tuple(NUMBER[word] for word in line_words(step, before, number))
        state = (step.before, before.blocks if before else 0)
        lines.append(pool.setdefault(line, line))
        states.append(pool.setdefault(state, state))
        before = step
    return Document(tuple(lines), tuple(states))


def code_objects(code: CodeType) -> Iterator[CodeType]:
    """A code object and all within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_objects(constant)


def compile_file(name: str, source: bytes) -> CodeType:
    """A module's code, whatever `python -O` says. ValueError for what this Python does not compile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of somebody else's source
            return compile(source, name, "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{name} cannot be compiled by this Python ({error}); leave it out") from error


def read_programs(paths: Mapping[str, Path]) -> Programs:
    """Compile files, by name. Splits are by file, from a hash of its name, as in the prepared standard library.

    Of equal documents only that of the first file is kept, by name. The manifest has the Python's version; the counts
    of files, code objects, reachable instructions, those `unreachable`, code objects that are too `short` or
    `duplicates`, and `documents`, which are left; `sources`, the name and SHA-256 of every file; and `fingerprint`, a
    hash of version and sources. ValueError for a Python that is not CPython, fewer than three files, and a file that
    cannot be compiled.
    """
    if sys.implementation.name != "cpython":
        raise ValueError(f"this Python is {sys.implementation.name}; read its bytecode with CPython, 3.11 to 3.14")
    if len(paths) < len(SPLITS):
        raise ValueError(f"{len(paths)} file(s) cannot be divided into {', '.join(SPLITS)}; read more files")
    names = sorted(paths)
    documents: dict[str, list[Document]] = {split: [] for split in SPLITS}
    counts: Counter[str] = Counter(files=len(names))
    sources, known, pool = [], set(), {}
    for name, split in zip(names, assign_splits(names), strict=True):
        source = paths[name].read_bytes()
        sources.append([name, hashlib.sha256(source).hexdigest()])
        for code in code_objects(compile_file(name, source)):
            steps, unreachable = read_steps(code)
            document = make_document(steps, pool) if len(steps) >= SHORTEST_DOCUMENT else None
            fate = "short" if document is None else "duplicates" if document.lines in known else "documents"
            counts.update({"code_objects": 1, "instructions": len(steps), "unreachable": unreachable, fate: 1})
            if document is not None and fate == "documents":
                known.add(document.lines)
                documents[split].append(document)
    return Programs(documents, make_manifest(sources, counts))


def make_manifest(sources: list[list[str]], counts: Counter[str]) -> dict[str, Any]:
    """What was read, as plain data."""
    version = platform.python_version()
    fingerprint = hashlib.sha256(json.dumps([version, sources]).encode()).hexdigest()
    keys = ("files", "code_objects", "instructions", "unreachable", "short", "duplicates", "documents")
    return {"python": version, "fingerprint": fingerprint, **{key: counts[key] for key in keys}, "sources": sources}


@functools.cache
def stdlib_programs() -> Programs:
    """The running Python's standard library, tests left out; read once."""
    return read_programs(stdlib_paths())


def bytecode_manifest() -> dict[str, Any]:
    """What the benchmark's text was made of: see `read_programs`."""
    return stdlib_programs().manifest


def bytecode_benchmark(split: str) -> Benchmark:
    """Rows of `train`, `val` or `test` of the running Python's standard library. ValueError as in `make_benchmark`."""
    benchmark = make_benchmark(stdlib_programs(), split)
    named = ("python", "fingerprint")
    return dataclasses.replace(benchmark, origin=lambda: {name: bytecode_manifest()[name] for name in named})


def make_benchmark(programs: Programs, split: str) -> Benchmark:
    """Rows of the programs of one split, all equally likely, padded where the next line does not fit.

    ValueError for a split that there is not; when rows are drawn, for fewer than 32 tokens, and where there are none.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")

    def sample(rows: int, length: int, generator: torch.Generator) -> Rows:
        table = make_tables(programs, length)[split]
        if len(table) == 0:
            raise ValueError(f"{split} has no rows of {length} tokens; read more files")
        picked = torch.randint(len(table), (rows,), generator=generator)
        return make_rows(table[picked].long())

    return Benchmark("bytecode", WORDS, "questions before this one in its row", math.nan, sample, far=None)


@functools.lru_cache(maxsize=4)
def make_tables(programs: Programs, length: int) -> dict[str, Tensor]:
    """All rows of `length` tokens (n, length) int16, padded with BOS, of each split; no row is twice in all of them."""
    if length < SHORTEST_ROW:
        raise ValueError(f"rows of {length} tokens cannot hold every line; take {SHORTEST_ROW} at least")
    known: set[bytes] = set()
    tables = {}
    for split in SPLITS:
        rows = []
        for row in (row for document in programs.documents[split] for row in cut_document(document, length)):
            padded = np.array(row + [BOS] * (length - len(row)), np.int16)
            if (key := padded.tobytes()) not in known:
                known.add(key)
                rows.append(padded)
        tables[split] = torch.from_numpy(np.array(rows, np.int16).reshape(-1, length))
    return tables


def cut_document(document: Document, length: int) -> Iterator[list[int]]:
    """Rows of at most `length` tokens: BOS, the state, and whole lines."""
    row: list[int] = []
    for line, (depth, blocks) in zip(*document, strict=True):
        if len(row) == 0 or len(row) + len(line) > length:
            if row:
                yield row
            row = [BOS, NUMBER[FROM], NUMBER[depth_word(depth)], NUMBER[blocks_word(blocks)]]
        row += line
    yield row


def make_rows(tokens: Tensor) -> Rows:
    """Rows (B, T) of tokens with what is asked of them: at both answers, the number of their question in the row."""
    question = tokens == NUMBER[ASK]
    asked = torch.full_like(tokens, NOTHING)
    for behind in (1, 2):
        answer = question[:, :-behind]
        asked[:, behind:][answer] = (question.cumsum(1) - 1)[:, :-behind][answer]
    floor = torch.full(tokens.shape, math.nan)
    floor[(asked != NOTHING) | (tokens == BOS)] = 0
    return Rows(tokens, floor, asked, (tokens != BOS).sum(1) + 1)
