"""benchmarks/retrofit_gain.py: which answers are counted, in what text, and that arms share their rows."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
from lrt.experiments.state_data.measure import held_out_rows
from lrt.experiments.state_data.repl import REPL

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gain():
    before = [*sys.path]
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("retrofit_gain")
    sys.path[:] = before


@pytest.fixture(scope="module")
def tokenizer(gain):
    text = "the state of a token is what the next one remembers\n" * 50
    return gain.make_tokenizer(SimpleNamespace(texts=lambda split: iter([text])))


@pytest.mark.parametrize(("moved", "part"), [(0, 1.0), (1, 0.0)])
def test_answers_are_counted_where_they_stand(gain, tokenizer, moved, part):
    """A model that knows the text has all of them right; one that says the next id, none."""
    rows = held_out_rows(REPL, "a test", 8, gain.WORDS, 0)

    def knows(input_ids):
        following = torch.roll(input_ids, -1, 1) + moved
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, len(tokenizer) + 1).float())

    bins = gain.score_sessions(knows, rows, tokenizer)
    assert sum(total for _, total in bins.values()) > 50
    for right, total in bins.values():
        assert right == part * total


def test_longer_training_begins_as_the_shorter_does(gain, tokenizer):
    fresh = torch.arange(40 * gain.LENGTH).view(40, gain.LENGTH) % len(tokenizer)
    short, long = (gain.continued_rows(tokenizer, fresh, count, 0) for count in (12, 20))
    assert torch.equal(short[1::2], long[1:12:2])  # the books
    assert torch.equal(short[::2], long[:12:2])  # the sessions
