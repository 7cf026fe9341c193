"""The rows that `lrt bench inference` prints of decoding, with tiny models and without compiling."""

from __future__ import annotations

import pytest

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig
from lrt.experiments.bench import decode
from lrt.inference.cost_model import fallback


def tiny(injection: str) -> LatentRecurrentTransformer:
    memory = MemoryConfig(injection=injection)  # type: ignore[arg-type]
    return LatentRecurrentTransformer(
        ModelConfig(depth=2, width=16, heads=2, vocab_size=31, context=96, memory=memory)
    ).eval()


def test_rows_of_decoding(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "STEPS", 4)
    rows = decode.decode_rows(tiny("both"), tiny("none"), 2, ("eager", "fused"), progress=False)
    assert [row.at_least for row in rows] == [0.95, 1.5] * 2
    assert [row.name for row in rows] == [
        f"decode, batch {batch}: {pair}, tokens/s"
        for batch in (1, 32)
        for pair in ("lrt / transformer", "transformer / transformers' generate")
    ]
    assert all(row.value > 0 and set(row.about["modes"].values()) <= {"eager", "fused"} for row in rows)


@pytest.mark.slow
def test_rows_of_ragged_batches():
    model = tiny("both")
    rows = decode.ragged_rows(model, list(range(31)), 1, fallback(model.embedding.weight.device), False, ("fused",))
    assert [row.at_least for row in rows] == [6, None]
    assert all(row.value > 0 and row.about["new_tokens"] > 0 for row in rows)
