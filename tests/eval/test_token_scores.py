"""Scores token by token: they sum to the headline, are cut rightly, go on where they stopped; honest intervals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import random_model
from support.scoring import BYTES, CONTEXT, LRT, NONE, bpb, cut, text

from lrt import schedules
from lrt.data.windows import windows
from lrt.distributed.single_process import SingleProcess
from lrt.eval.ledger import Ledger
from lrt.eval.report.result_tables import bpb_tables
from lrt.eval.scoring import live_scorer, schedule_scorer
from lrt.eval.token_scores import (
    TokenScores,
    bfloat16_columns,
    bootstrap_interval,
    bpb_by_bucket,
    pass_nats,
    standard_columns,
    summarise,
    token_scores,
)
from lrt.eval.token_scores import column_bpb as column_bpb

SCHEDULE = schedules.interleaved(2)


def scored(folder: Path, model: Any = None, found: Any = None, columns: Any = None, **fields: Any) -> TokenScores:
    ledger = Ledger(folder, "bpb", {}, fields.pop("ranks", SingleProcess()))
    chosen = random_model(LRT) if model is None else model
    return token_scores(
        chosen, found or cut(), BYTES, columns or standard_columns(SCHEDULE), ledger, progress=False, **fields
    )


def test_the_columns_sum_to_the_scores_of_evaluate(tmp_path: Path):
    model = random_model(LRT)
    scores = scored(tmp_path, model)
    assert column_bpb(scores, "live") == pytest.approx(bpb(model, live_scorer), rel=1e-12)
    assert column_bpb(scores, "parallel") == pytest.approx(bpb(model, schedule_scorer(SCHEDULE)), rel=1e-12)
    assert column_bpb(scores, "off") == pytest.approx(bpb(model, schedule_scorer(schedules.plain())), rel=1e-12)
    assert scores.tokens.tolist() == text().tokens.tolist()  # the order of the text
    assert scores.document.tolist() == [0] * 19 + [1] * 3 + [2] * 11 + [3]
    assert scores.position[:19].tolist() == list(range(19))
    assert scores.place[:19].tolist() == [*range(7), *range(7), *range(5)]
    assert set(scores.length[:19]) == {19}


def test_every_pass_scores_its_own_positions(tmp_path: Path):
    model, tokens = random_model(LRT), torch.randint(1, 31, (2, CONTEXT))
    found = pass_nats(model, tokens, SCHEDULE)
    assert [int((~v.isnan()).sum()) for v in found.values()] == [14, 8, 6]
    last = torch.where(found["pass 3"].isnan(), found["pass 2"], found["pass 3"])
    assert torch.allclose(last, schedule_scorer(SCHEDULE)(model, tokens, lambda *_: None), atol=1e-12)
    scores = scored(tmp_path, model)
    assert np.isnan(scores.nats["pass 2"]).any()
    assert column_bpb(scores, "pass 1") == column_bpb(scores, "off")
    # A window too short for every subset: its passes keep their numbers.
    strided = pass_nats(model, tokens[:, :3], schedules.settled(1, 4, 1))
    assert [int((~v.isnan()).sum()) for v in strided.values()] == [4, 2, 2, 0, 0, 2, 2, 0, 0]
    whole = pass_nats(model, tokens, schedules.settled(1, 4, 1))
    assert torch.allclose(strided["pass 6"][:, 0], whole["pass 6"][:, 0])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_no_score_depends_on_batches_or_ranks(tmp_path: Path, batch_size: int):
    model = random_model(LRT)
    whole = scored(tmp_path / "whole", model)
    half = Ledger(tmp_path / "halves", "bpb", {}, SingleProcess(rank=1, ranks=2))
    with pytest.raises(KeyError):  # the other rank's half is not there
        token_scores(model, cut(), BYTES, standard_columns(SCHEDULE), half, batch_size, progress=False)
    again = scored(tmp_path / "halves", model, batch_size=batch_size)
    for name, nats in whole.nats.items():
        np.testing.assert_allclose(again.nats[name], nats, rtol=1e-10)


def test_what_is_done_is_not_done_again(tmp_path: Path):
    model = random_model(LRT)
    first = scored(tmp_path, model)

    def never(model: Any, tokens: Any) -> Any:
        raise AssertionError

    again = scored(tmp_path, model, columns=never)
    np.testing.assert_array_equal(again.nats["live"], first.nats["live"])


def made(nats: np.ndarray, document: np.ndarray) -> TokenScores:
    n = len(nats)
    place = np.arange(n)
    length = np.bincount(document)[document]
    return TokenScores(document, place, place, length, np.ones(n), np.full(n, 2), {"live": nats, "off": nats + 0.1})


def test_buckets_by_hand():
    nats = np.arange(40, dtype=float)
    found = bpb_by_bucket(made(nats, np.repeat([0, 1], 20)), np.arange(40))
    assert [(b["from"], b["to"], b["targets"]) for b in found] == [(0, 8, 8), (8, 32, 24), (32, 128, 8)]
    assert found[0]["bpb"]["live"] == pytest.approx(np.arange(8).sum() / (math.log(2) * 16))


def test_an_interval_covers_the_truth_and_knows_documents():
    """Documents of a mean of their own: their number is what counts, not that of their tokens."""
    g = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        document = np.repeat(np.arange(40), 25)
        nats = (2 + g.normal(size=40))[document] + 0.1 * g.normal(size=1000)
        low, high = bootstrap_interval(made(nats, document), "live", seed=trial)
        covered += low <= 2 / (2 * math.log(2)) <= high
    assert 50 <= covered <= 60  # 95 % of 60 are 57
    width = high - low
    assert width == pytest.approx(4 / math.sqrt(40) / (2 * math.log(2)), rel=0.35)
    # A paired difference that is the same everywhere has no width.
    assert bootstrap_interval(made(nats, document), "off", "live") == pytest.approx([0.05 / math.log(2)] * 2)


def test_one_document_has_no_interval(tmp_path: Path):
    """Drawn anew, it is always the same: a width of nothing would pass for certainty."""
    values = summarise(scored(tmp_path, found=windows(text((30,)), CONTEXT)), (("live", "parallel"),))
    row = values["columns"]["live"]
    assert (row["low"], row["high"]) == (None, None)
    (table,) = bpb_tables({**values, "schedule": "plain()"})
    assert [row[2] for row in table.body] == ["one document has none"] * len(table.body)
    assert table.title == "30 tokens of 1 documents, schedule plain()"


def test_bfloat16_stands_beside_its_control(tmp_path: Path):
    model = random_model(LRT, torch.float32)
    scores = scored(tmp_path, model, columns=bfloat16_columns(model))
    values = {name: column_bpb(scores, name) for name in scores.nats}
    assert len(set(values.values())) == 3
    assert max(values.values()) - min(values.values()) < 0.1
    # A model without recurrence has no errors that go round: control and live are one.
    plain = random_model(NONE, torch.float32)
    scores = scored(tmp_path / "none", plain, columns=bfloat16_columns(plain))
    assert column_bpb(scores, "bfloat16 control") == pytest.approx(column_bpb(scores, "bfloat16 live"), rel=2e-3)


def test_a_summary_is_plain_data(tmp_path: Path):
    values = summarise(scored(tmp_path), (("live", "parallel"),))
    assert values["targets"] == 34
    assert values["documents"] == 4
    assert values["bytes"] == int(BYTES[torch.from_numpy(text().tokens.astype(np.int64))].sum())
    live_column = values["columns"]["live"]
    assert live_column["low"] <= live_column["bpb"] <= live_column["high"]
    difference = values["differences"]["live - parallel"]["bpb"]
    assert difference == pytest.approx(live_column["bpb"] - values["columns"]["parallel"]["bpb"])
    assert sum(b["targets"] for b in values["by_place_in_window"]) == 34


def test_a_tokenizer_without_bytes_has_no_token_scores(tmp_path: Path):
    ledger = Ledger(tmp_path, "bpb", {})
    with pytest.raises(ValueError, match="no byte alphabet"):
        token_scores(random_model(LRT), windows(text(), 8), None, standard_columns(SCHEDULE), ledger, progress=False)


def test_a_space_before_a_document_is_no_byte_of_it(tmp_path: Path):
    plain, stripped = scored(tmp_path / "a"), scored(tmp_path / "b", prefix_bytes=1)
    assert plain.bytes.sum() - stripped.bytes.sum() == 4
