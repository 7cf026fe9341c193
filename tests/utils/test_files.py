"""What replaces a file or a folder is whole, or the old one is untouched and nothing is left beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrt.utils.files import (
    append_durably,
    format_bytes,
    place_and_size,
    recover,
    replace_atomically,
    replace_folder,
    set_aside,
    temporary_name,
)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (12_400, "12 kB"),
        (6_300_000, "6.3 MB"),
        (1_500_000_000, "1.5 GB"),
        (2_345_000_000_000, "2,345 GB"),
    ],
)
def test_sizes_are_in_units_for_people(count: int, shown: str) -> None:
    assert format_bytes(count) == shown


def test_a_folder_weighs_what_its_files_do(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(b"x" * 1500)
    (tmp_path / "b").write_bytes(b"x" * 600)
    assert place_and_size(tmp_path) == f"{tmp_path}, 2.1 kB"
    assert place_and_size(tmp_path / "b") == f"{tmp_path / 'b'}, 600 bytes"
    assert place_and_size(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}, 0 bytes"


def test_text_bytes_and_a_writer_replace_a_file(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    replace_atomically(file, "größer\n")
    assert file.read_bytes() == "größer\n".encode()
    replace_atomically(file, b"\x00\xff")
    assert file.read_bytes() == b"\x00\xff"
    replace_atomically(file, lambda path: path.write_text("by a function"))
    assert file.read_text() == "by a function"
    assert names(tmp_path) == ["data.json"]


@pytest.mark.parametrize("failing", ["writer", "os.fsync", "pathlib.Path.replace"])
def test_a_write_that_fails_leaves_the_old_file_alone(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "data.json"
    file.write_text("old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    def write_half(path: Path) -> None:
        path.write_text("ha")
        if failing == "writer":
            fail()

    if failing != "writer":
        monkeypatch.setattr(failing, fail)
    with pytest.raises(KeyboardInterrupt):
        replace_atomically(file, write_half)
    assert file.read_text() == "old"
    assert names(tmp_path) == ["data.json"]


def test_a_temporary_name_is_hidden_and_passes_for_no_file_of_that_kind(tmp_path: Path) -> None:
    name = temporary_name(tmp_path / "bpb.json").name
    assert name.startswith(".bpb.json.saving-")
    assert not name.endswith(".json")


def test_what_a_library_writes_through_a_temporary_file_gets_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    usual = (tmp_path / "plain").stat().st_mode

    def write(path: Path) -> None:
        path.write_text("a secret by its mode")
        path.chmod(0o600)

    replace_atomically(tmp_path / "file", write)
    assert (tmp_path / "file").stat().st_mode == usual
    fresh = temporary_name(tmp_path / "out")
    (fresh / "deep").mkdir(parents=True)
    write(fresh / "deep" / "file")
    replace_folder(fresh, tmp_path / "out")
    assert (tmp_path / "out" / "deep" / "file").stat().st_mode == usual
    assert names(tmp_path / "out") == ["deep"]


def test_what_is_set_aside_takes_no_place_of_another(tmp_path: Path) -> None:
    for content in ("one", "two", "three"):
        (tmp_path / "run").write_text(content)
        set_aside(tmp_path / "run")
    set_aside(tmp_path / "run")  # nothing there
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == {
        "run.old": "one",
        "run.old-2": "two",
        "run.old-3": "three",
    }


def test_a_line_that_is_appended_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    append_durably(tmp_path / "lines", "a\n")
    append_durably(tmp_path / "lines", "b\n")
    assert (tmp_path / "lines").read_text() == "a\nb\n"
    assert len(synced) == 4  # the file, and the folder that names it


def test_what_others_keep_in_a_folder_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".git").mkdir(parents=True)
    (out / ".git" / "HEAD").write_text("main")
    (out / "notes.txt").write_text("theirs")
    (out / "old.json").write_text("ours")
    fresh = temporary_name(out)
    fresh.mkdir()
    (fresh / "new.json").write_text("ours")
    replace_folder(fresh, out, ("*.json",))
    assert names(out) == [".git", "new.json", "notes.txt"]
    assert (out / ".git" / "HEAD").read_text() == "main"
    assert names(tmp_path) == ["out"]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for content in ("one", "two"):
        fresh = temporary_name(tmp_path / "out")
        (fresh / "deep").mkdir(parents=True)
        (fresh / "deep" / content).write_text(content)
        replace_folder(fresh, tmp_path / "out")
        assert names(tmp_path) == ["out"]
        assert names(tmp_path / "out" / "deep") == [content]


def test_a_folder_comes_back_where_the_second_rename_never_happened(tmp_path: Path) -> None:
    (tmp_path / ".out.previous").mkdir()
    recover(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    (tmp_path / ".out.previous").mkdir()  # beside one that is there, it is no longer needed
    recover(tmp_path / "out")
    assert names(tmp_path) == [".out.previous", "out"]
