"""`lrt bench inference` takes prompts of the length that it names, or says that there are too few."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lrt import ModelConfig
from lrt.data.prepared import Documents
from lrt.experiments.bench import inference
from lrt.inference.cost_model import fallback
from lrt.model.transformer import LatentRecurrentTransformer

LENGTH = 16


def read(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> inference.Pair:
    """The pair of tiny models over validation documents of these lengths."""
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    documents = Documents(np.ones(offsets[-1], np.uint16), offsets, bos=0)
    tokenizer = SimpleNamespace(sha256="same")
    prepared = SimpleNamespace(tokenizer=tokenizer, split=lambda name: documents)
    model = LatentRecurrentTransformer(ModelConfig(depth=2, width=16, heads=2, vocab_size=31, context=LENGTH)).eval()
    calibration = fallback(model.embedding.weight.device)

    def load(path: Path, device: str) -> tuple[LatentRecurrentTransformer, Any]:
        return model, tokenizer

    monkeypatch.setattr(inference.checkpoint, "load", load)
    monkeypatch.setattr(inference.Prepared, "open", lambda path: prepared)
    monkeypatch.setattr(inference, "ensure_calibration", lambda *arguments: calibration)
    return inference.read_pair(Path("pair"), Path("data"), "cpu", 1, progress=False)


def test_prompts_have_the_length_of_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, [3, *[LENGTH - 1] * 4]).prompts.shape == (4, LENGTH)


@pytest.mark.parametrize(
    "lengths",
    [[LENGTH - 1] * 3, [5] * 4, [*[LENGTH - 1] * 3, 5]],
    ids=["too few", "all short alike", "one short"],
)
def test_too_little_text(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=f"data has fewer than 4 validation windows of {LENGTH} tokens"):
        read(monkeypatch, lengths)
