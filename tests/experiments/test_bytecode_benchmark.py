"""The bytecode benchmark: depths as the running interpreter and a second analysis have them, rows replayed by words."""

from __future__ import annotations

import dis
import functools
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lrt.data.corpus import stdlib_paths
from lrt.data.splits import split_of
from lrt.experiments.state_data import bytecode
from lrt.experiments.state_data.bytecode import make_benchmark, make_tables, read_programs
from lrt.experiments.state_data.rows import BOS, NOTHING
from lrt.experiments.state_data.stack_depth import read_steps

FOLDERS = ("json/", "asyncio/", "collections/", "importlib/", "unittest/")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def programs() -> bytecode.Programs:
    """A part of the standard library."""
    return read_programs({name: path for name, path in stdlib_paths().items() if name.startswith(FOLDERS)})


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


# --- rows ----------------------------------------------------------------------------------------------------------


def capped(value: int, limit: int, known: bool) -> str | None:
    """How a depth is written, if it is known."""
    if not known:
        return None
    return str(value) if value < limit else f"{limit}+"


def replay(text: str) -> tuple[list[list[str]], list[list[str | None]]]:
    """The answers in a row, and what its other words say that they are, None where those do not say it."""
    depth, blocks, written, expected = 0, 0, [], []
    exact, exact_blocks = True, True
    for line in text.split("\n")[1:]:
        name, *words = line.replace("=", "").split(" ")
        match name:
            case "from":
                depth, exact = int(words[0].strip("+")), not words[0].endswith("+")
                if len(words) == 3:
                    blocks, exact_blocks = int(words[2].strip("+")), not words[2].endswith("+")
            case "{":
                blocks += 1
            case "}":
                blocks -= 1
            case "depth?":
                written.append([words[0], words[2]])
                expected.append([capped(depth, 16, exact), capped(blocks, 7, exact_blocks)])
                if not exact and not words[0].endswith("+"):
                    depth, exact = int(words[0]), True
            case _:
                depth += line_effect(name, words)
    return written, expected


def line_effect(name: str, words: list[str]) -> int:
    """What an instruction that is followed by the next one does to the depth."""
    argument = int(words[0].strip("+")) if words and words[0][0] not in "+-" else 0 if words else None
    if name == "PRECALL":
        return 0
    if name == "CALL":
        assert argument is not None
        return -argument - 1
    if name == "RETURN_GENERATOR":
        return 1
    return dis.stack_effect(dis.opmap[name], argument, jump=False)


def check_rows(split: str, benchmark: bytecode.Benchmark, rows: int, length: int) -> tuple[int, int]:
    """Replay rows; how many answers there were, and how many of them do not follow from the other words."""
    sample = benchmark.sample(rows, length, seeded())
    answers = unknown = 0
    for tokens, floor, asked, end in zip(sample.tokens, sample.floor, sample.asked, sample.lengths, strict=True):
        assert tokens[0] == BOS
        assert (tokens[1:end] != BOS).all()
        assert (tokens[end:] == BOS).all()
        assert (floor[end:] == 0).all()
        assert floor[0] == 0
        text = benchmark.text(tokens)
        written, expected = replay(text)
        for pair, known in zip(written, expected, strict=True):
            answers += 2
            unknown += known.count(None)
            assert all(one in (None, other) for one, other in zip(known, pair, strict=True))
        assert asked[asked != NOTHING].tolist() == [n for n in range(len(written)) for _ in range(2)]
        places = [at for at in range(end) if asked[at] != NOTHING]
        assert [benchmark.words[tokens[at]].split()[-1].strip("=") for at in places] == [
            word for pair in written for word in pair
        ]
        assert (floor[places] == 0).all()
        assert int(floor[1:end].isnan().sum()) == int(end) - 1 - len(places)
    return answers, unknown


def instructions_between_questions(text: str) -> list[int]:
    names = [line.split(" ")[0] for line in text.split("\n")[1:]]
    counts = [0]
    for name in names:
        counts[-1] += name.isupper() or "_" in name
        if name == "depth?":
            counts.append(0)
    return counts


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_words_of_a_row_tell_its_answers(split: str):
    answers, unknown = check_rows(split, make_benchmark(programs(), split), 300, 128)
    assert answers > 1000
    assert unknown <= answers / 100


def test_a_question_comes_every_sixteen_instructions():
    benchmark = make_benchmark(programs(), "train")
    for tokens in benchmark.sample(100, 256, seeded()).tokens:
        first, *inner = instructions_between_questions(benchmark.text(tokens))
        assert first <= 16
        assert all(count == 16 for count in inner[:-1])
        assert all(count < 16 for count in inner[-1:])


def test_every_instruction_of_a_document_is_in_a_row_once():
    documents = [document for split in bytecode.SPLITS for document in programs().documents[split]]
    assert len({document.lines for document in documents}) == len(documents)
    for document in documents[:50]:
        assert len(document.lines) >= 32
        rows = list(bytecode.cut_document(document, 64))
        assert all(len(row) <= 64 for row in rows)
        assert [token for row in rows for token in row[4:]] == [token for line in document.lines for token in line]


def test_splits_share_no_file_no_document_and_no_row():
    names = [name for name, _ in programs().manifest["sources"]]
    assert {split_of(name) for name in names} == {"train", "val", "test"}
    lines = {split: {d.lines for d in programs().documents[split]} for split in bytecode.SPLITS}
    assert not lines["train"] & lines["test"]
    assert not lines["train"] & lines["val"]
    for length in (64, 128):
        tables = make_tables(programs(), length)
        rows = [tuple(row) for split in bytecode.SPLITS for row in tables[split].tolist()]
        assert len(set(rows)) == len(rows)
        assert all(len(table) > 10 for table in tables.values())


def files(folder: Path, sources: dict[str, str]) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    for name, source in sources.items():
        (folder / name).write_text(source, encoding="utf-8")
    return {name: folder / name for name in sources}


def long_function(name: str, operator: str = "+") -> str:
    return f"def {name}(a, b):\n" + f"    a = (a {operator} b) * (b {operator} 1)\n" * 20 + "    return a\n"


def test_equal_code_in_two_files_is_one_document(tmp_path: Path):
    paths = files(tmp_path, {f"{n}.py": long_function("f") for n in range(40)} | {"x.py": long_function("f", "-")})
    programs = read_programs(paths)
    counts = {key: programs.manifest[key] for key in ("files", "code_objects", "short", "duplicates", "documents")}
    assert counts == {"files": 41, "code_objects": 82, "short": 41, "duplicates": 39, "documents": 2}
    empty = next(split for split in bytecode.SPLITS if not programs.documents[split])
    with pytest.raises(ValueError, match=f"{empty} has no rows of 64 tokens; read more files"):
        make_benchmark(programs, empty).sample(1, 64, seeded())


def test_the_manifest_names_the_text(tmp_path: Path):
    sources = {f"{n}.py": long_function(f"f{n}", "+-"[n % 2]) for n in range(4)}
    manifest = read_programs(files(tmp_path / "a", sources)).manifest
    assert manifest["python"] == ".".join(map(str, sys.version_info[:3]))
    assert [name for name, _ in manifest["sources"]] == ["0.py", "1.py", "2.py", "3.py"]
    assert manifest["fingerprint"] == read_programs(files(tmp_path / "b", sources)).manifest["fingerprint"]
    changed = sources | {"2.py": sources["2.py"] + "# other\n"}
    assert manifest["fingerprint"] != read_programs(files(tmp_path / "c", changed)).manifest["fingerprint"]
    assert manifest["instructions"] == sum(
        len(read_steps(code)[0]) for source in sources.values() for code in codes(compile(source, "", "exec"))
    )


def test_rows_repeat_with_their_seed():
    benchmark = make_benchmark(programs(), "train")
    one, same, other = (benchmark.sample(20, 64, seeded(n)) for n in (1, 1, 2))
    assert torch.equal(one.tokens, same.tokens)
    assert torch.equal(one.asked, same.asked)
    assert not torch.equal(one.tokens, other.tokens)


def test_what_is_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="no split 'dev'; choose one of train, val, test"):
        make_benchmark(programs(), "dev")
    with pytest.raises(ValueError, match="rows of 16 tokens cannot hold every line; take 32 at least"):
        make_benchmark(programs(), "train").sample(1, 16, seeded())
    with pytest.raises(ValueError, match=r"bad\.py cannot be compiled by this Python"):
        read_programs(files(tmp_path, {"a.py": "1", "bad.py": "print 1", "c.py": "1"}))
    with pytest.raises(ValueError, match=r"2 file\(s\) cannot be divided into train, val, test; read more files"):
        read_programs(files(tmp_path, {"a.py": "1", "c.py": "1"}))
    monkeypatch.setattr(sys.implementation, "name", "pypy")
    with pytest.raises(ValueError, match=r"this Python is pypy; read its bytecode with CPython"):
        read_programs({})


def test_large_arguments_and_states_are_written_as_at_least(tmp_path: Path):
    names = ", ".join(f"v{n}" for n in range(40))
    calls = f"def f(g):\n    {names} = g\n    return g\n"
    programs = read_programs(files(tmp_path, {f"{n}.py": calls + f"# {n}\n" for n in range(3)}))
    benchmark = make_benchmark(programs, next(split for split in bytecode.SPLITS if programs.documents[split]))
    text = benchmark.text(benchmark.sample(1, 512, seeded()).tokens[0])
    assert "\nUNPACK_SEQUENCE 32+\nfrom =16+\n" in text  # its words say "even, and at least 32"
    assert " 33+\n" in text
    assert "depth? =16+ in 0\n" in text
    assert math.isnan(benchmark.chance)


# --- the whole library ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_library():
    manifest = bytecode.bytecode_manifest()
    assert manifest["files"] == len(stdlib_paths())
    assert manifest["documents"] + manifest["duplicates"] + manifest["short"] == manifest["code_objects"]
    for split in bytecode.SPLITS:
        answers, unknown = check_rows(split, bytecode.bytecode_benchmark(split), 1000, 128)
        assert answers > 3000
        assert unknown < answers / 100
    longest = max(len(line) for d in bytecode.stdlib_programs().documents["train"] for line in d.lines)
    assert longest <= bytecode.SHORTEST_ROW - 4
