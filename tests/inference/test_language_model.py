"""A model with its tokenizer: text in, the text out that its tokens spell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lrt
from lrt import LatentRecurrentTransformer, ModelConfig, Sampling, generate
from lrt.data.tokenizer import Tokenizer
from lrt.inference.language_model import USUAL, LanguageModel
from lrt.model import checkpoint

PROMPT = "größer 🙂"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Random weights, and a head that is not small: every token may come."""
    tokenizer = Tokenizer.train(["some text, größer 🙂"] * 3, 300)
    torch.manual_seed(0)
    network = LatentRecurrentTransformer(
        ModelConfig(depth=2, width=16, heads=2, vocab_size=tokenizer.vocab_size, context=64)
    )
    torch.nn.init.normal_(network.head.weight)
    return LanguageModel(network.eval(), tokenizer)


def ids(model: LanguageModel, text: str) -> list[int]:
    return [model.tokenizer.bos, *model.tokenizer.encode(text)]


def drawn(model: LanguageModel, prompt: str, count: int, seed: int) -> list[int]:
    """The tokens themselves, document ends included."""
    tokens = generate(model.network, torch.tensor([ids(model, prompt)]), count, USUAL, seed)
    return [int(token) for token in tokens]


@pytest.mark.parametrize("seed", range(4))
def test_text_is_what_its_tokens_spell_up_to_the_documents_end(model: LanguageModel, seed: int):
    tokens = drawn(model, PROMPT, 30, seed)
    tokens = tokens[: tokens.index(model.tokenizer.bos)] if model.tokenizer.bos in tokens else tokens
    whole = model.tokenizer.decode([*ids(model, PROMPT), *tokens])
    assert PROMPT + model.complete(PROMPT, 30, seed=seed) == whole
    assert "".join(generate(model, PROMPT, 30, seed=seed)) == model.complete(PROMPT, 30, seed=seed)


def test_a_document_that_ends_is_not_gone_on_with(model: LanguageModel):
    network = LatentRecurrentTransformer(model.network.config)
    with torch.no_grad():
        network.head.weight.zero_()  # all tokens alike, of which the most likely is the first: BOS
    ending = LanguageModel(network, model.tokenizer)
    assert model.tokenizer.bos == 0
    assert ending.complete(PROMPT, 20, Sampling(temperature=0)) == ""


def test_text_comes_in_pieces(model: LanguageModel):
    streams = [list(model.stream("", 12, seed=seed)) for seed in range(4)]
    assert max(map(len, streams)) > 5
    assert ["".join(pieces) for pieces in streams] == [model.complete("", 12, seed=seed) for seed in range(4)]


def test_seeds_and_sampling_decide(model: LanguageModel):
    greedy = Sampling(temperature=0)
    assert model.complete(PROMPT, 20, greedy, seed=1) == model.complete(PROMPT, 20, greedy, seed=2)
    assert model.complete(PROMPT, 20, seed=1) != model.complete(PROMPT, 20, seed=2)


def test_mistakes_are_errors_before_any_work(model: LanguageModel):
    with pytest.raises(ValueError, match="has no tokenizer; give tokens"):
        generate(model.network, PROMPT)  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(ValueError, match="the prompt is 3; give text"):
        generate(model, 3)  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(ValueError, match="exceed the context of 64"):
        model.stream(PROMPT, 100)


def test_a_loaded_model_unpacks_and_completes(model: LanguageModel, tmp_path: Path):
    checkpoint.save(tmp_path / "saved", model.network, model.tokenizer)
    loaded = lrt.load(tmp_path / "saved")
    assert loaded.complete(PROMPT, 20) == model.complete(PROMPT, 20)
    network, tokenizer = loaded
    assert network is loaded.network
    assert tokenizer.sha256 == model.tokenizer.sha256
    assert repr(loaded) == f"LanguageModel({network!r}, Tokenizer(vocabulary {tokenizer.vocab_size:,}))"
