"""A checkpoint says which plugins it needs, and is not read without them; its model goes where it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.generation import configuration
from support.models import random_model

from lrt.data.tokenizer import Tokenizer
from lrt.model.checkpoint import load, save


def test_a_checkpoint_is_not_read_without_the_plugin_that_it_needs(tmp_path: Path):
    tokenizer = Tokenizer.train(["some text, größer 🙂"] * 3, 300)
    model = random_model(configuration(vocab_size=tokenizer.vocab_size), torch.float32)
    record = {"name": "wide_memory", "version": "3", "sha256": "0" * 64, "provides": ["injection wide"]}
    save(tmp_path / "plain", model, tokenizer, {})
    save(tmp_path / "extended", model, tokenizer, {"plugins": [record]})
    loaded, _ = load(tmp_path / "plain", device="meta")
    assert (loaded.config, {p.device.type for p in loaded.parameters()}) == (model.config, {"meta"})
    with pytest.raises(ValueError, match="wide_memory"):
        load(tmp_path / "extended")
