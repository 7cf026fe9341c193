"""Results as files, and the ledger that a stopped evaluation goes on from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lrt.distributed.single_process import SingleProcess
from lrt.eval.diagnose import MEASURES
from lrt.eval.ledger import Ledger
from lrt.eval.report.names import KINDS
from lrt.eval.report.result_tables import TABLES
from lrt.eval.report.sentences import SENTENCES
from lrt.eval.results import Result, read_results
from lrt.utils.files import temporary_name

RESULT = Result("bpb", "books/val", "ab12", {"targets": 3}, {"live_bpb": 1.5}, 2.0, {"device": "cpu"})


def test_results_are_read_as_written_and_replaced_by_kind_and_subject(tmp_path: Path):
    file = RESULT.write(tmp_path / "new")
    assert file.name == "bpb-books-val.json"
    replace(RESULT, kind="sweeps").write(tmp_path / "new")
    newer = replace(RESULT, values={"live_bpb": 1.25})
    newer.write(tmp_path / "new")
    assert read_results(tmp_path / "new") == [newer, replace(RESULT, kind="sweeps")]
    assert read_results(tmp_path / "nowhere") == []


@pytest.mark.parametrize("content", ['{"format": 1, "ki', '{"format": 2}', "[]", '{"format": 1}'])
def test_a_damaged_result_is_named(tmp_path: Path, content: str):
    RESULT.write(tmp_path).write_text(content)
    with pytest.raises(ValueError, match=r"bpb-books-val\.json is no result of this version"):
        read_results(tmp_path)


def test_a_result_that_is_being_written_passes_for_none(tmp_path: Path):
    temporary_name(RESULT.write(tmp_path)).write_text('{"format": 1, "ki')  # as a kill leaves it
    assert read_results(tmp_path) == [RESULT]


def test_every_kind_of_result_has_its_tables_a_sentence_and_a_title():
    assert set(TABLES) == set(SENTENCES) == set(KINDS) == {*MEASURES, "scores", "core", "probe"}


def test_a_ledger_goes_on_where_it_was_cut(tmp_path: Path):
    first = Ledger(tmp_path, "core arc", {"seed": 1})
    first.add({"0": 1.5, "1": [1, 2]})
    first.add({"2": {"correct": True}})
    first.file.write_bytes(first.file.read_bytes()[:-9])  # a kill in the middle of a line
    second = Ledger(tmp_path, "core arc", {"seed": 1})
    assert second.done == {"0": 1.5, "1": [1, 2]}
    second.add({"2": 7})
    assert second.gather() == {"0": 1.5, "1": [1, 2], "2": 7}
    assert Ledger(tmp_path, "core arc", {"seed": 2}).done == {}
    assert Ledger(tmp_path, "core boolq", {"seed": 1}).done == {}


def test_what_another_version_measured_is_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A result names the code that measured it, all of it."""
    Ledger(tmp_path, "bpb", {}).add({"0": 1.5})
    assert Ledger(tmp_path, "bpb", {}).done == {"0": 1.5}
    monkeypatch.setattr("lrt.eval.ledger.code_version", lambda: "another")
    assert Ledger(tmp_path, "bpb", {}).done == {}


def test_ranks_share_a_ledger(tmp_path: Path):
    ranks = [Ledger(tmp_path, "bpb", {}, SingleProcess(rank=r, ranks=2)) for r in range(2)]
    ranks[0].add({"0": 0.5})
    ranks[1].add({"1": 1.5})
    assert ranks[0].gather() == ranks[1].gather() == {"0": 0.5, "1": 1.5}
    assert Ledger(tmp_path, "bpb", {}).done == {"0": 0.5, "1": 1.5}
