"""New folders are split by content and size; those of version 0.1.0 and the standard library by names of files."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrt.cli.main import main
from lrt.data import prepare as preparing
from lrt.data.corpus import open_corpus, stdlib_files
from lrt.data.encode import Encoders
from lrt.data.prepare import prepare
from lrt.data.prepared import SPLITS, Prepared
from lrt.data.records import Selection
from lrt.data.sources import TextFile
from lrt.data.splits import (
    BY_CONTENT,
    BY_NAME,
    LONG,
    SHORT,
    SplitRule,
    assign_by_content,
    assign_splits,
    cut_places,
    split_of,
)

SIZES = st.lists(st.integers(100, 10_000), min_size=40, max_size=200)


def manuals(folder: Path, sizes: list[int], seed: int = 0) -> Path:
    """A folder with a text file of each size."""
    rng = random.Random(seed)
    for number, size in enumerate(sizes):
        path = folder / f"part{number % 3}" / f"manual{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines, length = [], 0
        while length < size:
            lines.append(f"{number} {rng.random()} a line of the manual")
            length += len(lines[-1]) + 1
        path.write_text("\n".join(lines) + "\n")
    return folder


def shares(made: Prepared) -> dict[str, float]:
    sizes = {name: made.manifest["splits"][name]["bytes"] for name in SPLITS}
    return {name: size / sum(sizes.values()) for name, size in sizes.items()}


def texts(made: Prepared) -> dict[str, list[str]]:
    return {name: [made.tokenizer.decode(d.tolist()) for d in made.split(name)] for name in SPLITS}


def test_a_folder_of_manuals_comes_near_the_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(1)
    sizes = [int(math.exp(rng.gauss(6, 1))) + 100 for _ in range(150)]
    folder = manuals(tmp_path / "in", [*sizes, sum(sizes) // 6])  # one of them is long
    made = prepare(tmp_path / "out", [folder], vocab_size=300, progress=False)
    for name in ("val", "test"):
        assert 0.04 <= shares(made)[name] <= 0.056
        documents = [len(text) for text in texts(made)[name]]
        assert max(documents) <= 0.32 * sum(documents)
    assert made.manifest["split_rule"] == {"val": 0.05, "test": 0.05, "files": "content"}
    assert sum(entry["files"] for entry in made.manifest["splits"].values()) == 151
    assert capsys.readouterr().err == ""
    more = prepare(tmp_path / "more", [folder], 300, progress=False, selection=Selection(rule=SplitRule(0.2, 0.1)))
    assert 0.16 <= shares(more)["val"] <= 0.22
    assert 0.08 <= shares(more)["test"] <= 0.11


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=SIZES, copies=st.integers(1, 3), val=st.floats(0.02, 0.3), test=st.floats(0.02, 0.3))
def test_equal_content_falls_to_one_split_and_shares_hold(
    sizes: list[int], copies: int, val: float, test: float
) -> None:
    files = {f"{n}-{copy}": (size, f"{n * n:08}") for n, size in enumerate(sizes) for copy in range(copies)}
    splits = assign_by_content(files, SplitRule(val, test))
    if not splits:  # whole files do not come near
        return
    assert splits == assign_by_content(dict(reversed(files.items())), SplitRule(val, test))
    assert splits.keys() == files.keys()
    total = copies * sum(sizes)
    for name, share in (("val", val), ("test", test)):
        in_split = [file for file, split in splits.items() if split == name]
        size = sum(files[file][0] for file in in_split)
        assert SHORT * share * total <= size <= LONG * share * total
        assert max(files[file][0] for file in in_split) * copies <= 0.5 * share * total
    for n in range(len(sizes)):
        assert len({splits[f"{n}-{copy}"] for copy in range(copies)}) == 1


def test_equal_files_are_said_and_stay_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = manuals(tmp_path / "in", [400] * 60)
    for number in range(60):
        (folder / f"copy{number}.txt").write_bytes((folder / f"part{number % 3}" / f"manual{number}.txt").read_bytes())
    made = prepare(tmp_path / "out", [folder], vocab_size=300, progress=False)
    parts = {name: set(documents) for name, documents in texts(made).items()}
    assert sum(map(len, parts.values())) == 60 == len(set.union(*parts.values()))
    assert "60 group(s) of files hold the same bytes and fall to one split each" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            [40_000, *[300] * 11],
            [
                "each is cut into a part for train",
                r"one of the 12 document\(s\) of val is \d\d% of it",
                r"of test is \d\d% of it",
            ],
        ),
        (
            [3000] * 12,
            [r"the sizes of the 12 text files allow no splits"],
        ),  # each is more than the share of a split: parts of all of them
    ],
)
def test_where_whole_files_do_not_come_near_they_are_cut(
    sizes: list[int], said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = prepare(tmp_path / "out", [manuals(tmp_path / "in", sizes)], vocab_size=300, progress=False)
    assert made.manifest["splits"]["val"]["files"] == len(sizes)
    assert 0.04 < shares(made)["val"] < 0.06
    assert 0.04 < shares(made)["test"] < 0.06
    err = capsys.readouterr().err
    assert err.count("warning") == len(said)
    assert all(re.search(each, err) for each in said)


def test_a_share_that_is_missed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"text": f"document {n} " + "x" * (40_000 if split_of(f"{n}") == "val" else 9), "id": n} for n in range(99)
    ]
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(tmp_path / "out", [path], 300, progress=False, selection=Selection(split_by="id"))
    assert "val is 9" in capsys.readouterr().err


def test_shares_move_the_borders_of_hashes_and_of_parts() -> None:
    rule = SplitRule(0.2, 0.1)
    drawn = [split_of(f"document {n}", rule) for n in range(4000)]
    assert drawn.count("val") == pytest.approx(800, abs=100)
    assert drawn.count("test") == pytest.approx(400, abs=80)
    val, test = cut_places(b"line\n" * 2000, rule)
    assert (val, test) == pytest.approx((7000, 9000), abs=5)


def test_the_rule_of_version_0_1_0_is_kept() -> None:
    """Its borders as they were, to the bit."""
    assert (BY_NAME.val_start, BY_NAME.test_start) == (0.9, 0.95)
    names = [f"{n}.py" for n in range(3000)]
    assert assign_splits(names)[:6] == [split_of(name) for name in names[:6]]
    assert cut_places(b"ab\ncd" * 997) == cut_places(b"ab\ncd" * 997, BY_CONTENT)


def test_the_standard_library_keeps_its_splits() -> None:
    corpus = open_corpus(None, None, Selection(rule=BY_NAME), lambda amount, text="": None)
    names = [name for name, *_ in corpus.description]
    assert len(names) == len(stdlib_files())
    sources = [source for source in corpus.sources if isinstance(source, TextFile)]
    assert [source.split for source in sources] == assign_splits(names)


def old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: bool) -> tuple[list[Path], dict[str, bytes]]:
    """What version 0.1.0 made, or began, of some files: split by name, its manifest names no rule."""
    folder = manuals(tmp_path / "in", [500] * 80)
    files = sorted(folder.rglob("*.txt"))
    rule = Selection(rule=BY_NAME)
    made = prepare(tmp_path / "whole", files, 300, progress=False, selection=rule)
    manifest = made.manifest | {}
    del manifest["split_rule"]
    if stop:
        with monkeypatch.context() as patch:
            patch.setattr(Encoders, "map", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                prepare(tmp_path / "out", files, 300, progress=False, selection=rule)
        assert (tmp_path / ".out.part").is_dir()
    else:
        (tmp_path / "whole").rename(tmp_path / "out")
        (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return files, {name: manifest["splits"][name] for name in SPLITS}


@pytest.mark.parametrize("stop", [False, True])
def test_what_the_last_version_made_or_began_stays(stop: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, splits = old_folder(tmp_path, monkeypatch, stop)
    again = prepare(tmp_path / "out", files, 300, progress=False)
    assert again.manifest["splits"] == splits
    assert again.manifest.get("split_rule") == ({"val": 0.05, "test": 0.05, "files": "name"} if stop else None)
    fresh = prepare(tmp_path / "fresh", files, 300, progress=False)
    assert fresh.manifest["splits"] != splits
    other = prepare(tmp_path / "out", files, 300, progress=False, selection=Selection(rule=SplitRule(0.1)))
    assert shares(other)["val"] > 0.08
    assert preparing.open_if_same(tmp_path / "fresh", fresh.manifest["inputs"]) is not None


# Folders as text


def test_a_folder_gives_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = manuals(tmp_path / "in", [500] * 6)
    one = prepare(tmp_path / "one", [folder], 300, progress=False)
    same = prepare(tmp_path / "same", sorted(folder.rglob("*.txt")), 300, progress=False)
    assert one.manifest == same.manifest
    (folder / ".hidden").write_text("hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / "empty.txt").write_text("")
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": f"record {n}"}) + "\n" for n in range(90)))
    capsys.readouterr()
    more = prepare(tmp_path / "more", [folder], 300, progress=False)
    assert [name for name, *_ in more.manifest["sources"]] == ["docs.jsonl", *(n for n, *_ in one.manifest["sources"])]
    err = capsys.readouterr().err
    assert "3 file(s) of the folder are left out" in err
    assert all(name in err for name in ("empty.txt holds no text", "image.png is binary", "latin.txt is not UTF-8"))
    with pytest.raises(ValueError, match="is given twice"):
        prepare(tmp_path / "x", [folder, folder / "docs.jsonl"], 300, progress=False)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"the folder .*nothing holds no files"):
        prepare(tmp_path / "x", [tmp_path / "nothing"], 300, progress=False)


# The command line


@pytest.mark.parametrize("share", ["0", "1", "nan", "-1", "inf", "0.96"])
def test_shares_that_cannot_be(share: str) -> None:
    with pytest.raises(ValueError, match=r"(val|test) is .*; give"):
        SplitRule(test=float(share))
    with pytest.raises(ValueError, match=r"val is .*; give|leaves nothing"):
        SplitRule(val=float(share))


def test_the_command_line_takes_shares_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = manuals(tmp_path / "in", [500] * 6)
    arguments = ["--text", str(folder), "--vocab-size", "300"]
    main(["prepare", str(tmp_path / "out"), *arguments, "--val", "0.2", "--test", "0.1"])
    made = Prepared.open(tmp_path / "out")
    assert shares(made)["val"] == pytest.approx(0.2, abs=0.03)
    assert made.manifest["split_rule"] == {"val": 0.2, "test": 0.1, "files": "content"}
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", str(tmp_path / "x"), *arguments, "--val", "nan"])
    assert "val is nan; give a finite number" in capsys.readouterr().err
