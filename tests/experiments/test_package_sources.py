"""The installed packages' sources as a text."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
from pathlib import Path

import pytest

from lrt.experiments.studies import package_sources
from lrt.experiments.studies.package_sources import SourceFile, installed_files, read_sources, write_sources


def files_of(folder: Path, **contents: bytes) -> list[SourceFile]:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [SourceFile("some-package", name, folder / name) for name in contents]


def test_every_content_counts_once_and_only_text(tmp_path: Path):
    files = files_of(tmp_path, one=b"a = 1\n", two=b"a = 1\n", empty=b" \n", binary=b"\xff\xfe", three=b"b\n")
    sources = read_sources(iter(files))
    assert {digest: (file.name, text) for digest, (file, text) in sources.items()} == {
        hashlib.sha256(b"a = 1\n").hexdigest(): ("one", "a = 1\n"),
        hashlib.sha256(b"b\n").hexdigest(): ("three", "b\n"),
    }


def test_the_text_is_a_sample_that_its_manifest_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = files_of(tmp_path, **{f"f{n}": f"x = {n}\n".encode() for n in range(50)})
    files = [SourceFile("torch", file.name, file.path) for file in files]
    monkeypatch.setattr(package_sources, "installed_files", lambda: iter(files))
    path = write_sources(tmp_path / "out", size=100)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    manifest = json.loads((tmp_path / "out" / "packages.json").read_text())
    digests = [digest for _, digest in manifest["files"]]
    assert digests == [hashlib.sha256(line["text"].encode()).hexdigest() for line in lines]
    every = [hashlib.sha256(file.path.read_bytes()).hexdigest() for file in files]
    assert digests == sorted(every, key=package_sources.place_of)[: len(digests)]
    # The hash of a content decides its split, so a sample by that hash would be of one split alone.
    assert min(digests) < "4"
    assert max(digests) > "c"
    assert 80 < sum(len(line["text"]) for line in lines) <= 100
    assert manifest["packages"] == {"torch": importlib.metadata.version("torch")}
    assert lines[0]["id"] == manifest["files"][0][0]
    again = path.read_bytes()
    files.reverse()
    assert write_sources(tmp_path / "out", size=100).read_bytes() == again
    monkeypatch.setattr(package_sources, "installed_files", lambda: iter(()))
    with pytest.raises(ValueError, match="no installed package"):
        write_sources(tmp_path / "none")


def test_what_is_installed():
    some = list(itertools.islice(installed_files(), 200))
    assert len({file.package for file in some}) > 1
    assert all(file.path.suffix == ".py" and file.path.is_file() for file in some)
    assert [file.package for file in some] == sorted(file.package for file in some)
