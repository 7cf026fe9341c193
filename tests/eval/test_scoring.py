"""Scores: bits per byte by hand, parallel and live, and the memory replaced at test time.

B rows, T positions.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from support.models import TOLERANCE, VISIBLE, assert_differs, assert_same, random_model
from support.oracle import oracle
from support.scoring import BYTES, CONTEXT, LRT, NONE, SHIFT, V, bpb, configuration, cut, on_ranks, text
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor

from lrt import ModelConfig, refine, schedules, score
from lrt.data.tokenizer import Tokenizer
from lrt.data.windows import Windows, windows
from lrt.distributed.single_process import SingleProcess
from lrt.eval.ablations import ABLATIONS, ablate
from lrt.eval.ledger import Ledger
from lrt.eval.scoring import (
    Metrics,
    bits_per_byte,
    evaluate,
    every_ablation,
    live_scorer,
    schedule_scorer,
    score_parallel,
    two_forwards,
)
from lrt.model.cross_entropy import token_nats
from lrt.model.transformer import LatentRecurrentTransformer

MIXED = schedules.mixture([(0.25, schedules.plain()), (0.75, schedules.multi_refinement(1))])


def by_hand(model: Any, schedule: Any) -> tuple[float, int]:
    """(nats, bytes) of `text()`: document by document, window by window, token by token."""
    nats, size = 0.0, 0
    for document in text():
        for start in range(0, len(document), CONTEXT - 1):
            piece = document[start : start + CONTEXT - 1].astype(np.int64)
            tokens = torch.tensor([[0, *piece]])
            with torch.no_grad():
                hidden = refine(model, tokens[:, :-1], schedule).hidden
                predicted = model.logits(hidden).log_softmax(-1)[0]
            for t, token in enumerate(piece.tolist()):
                nats -= float(predicted[t, token])
                size += token % 4
    return nats, size


def metrics(model: Any, schedule: Any, found: Windows | None = None, **fields: Any) -> Metrics:
    return evaluate(model, found or cut(), fields.pop("token_bytes", BYTES), schedule, progress=False, **fields)


# Bits per byte
@pytest.mark.parametrize(
    "schedule", [schedules.plain(), schedules.interleaved(2), schedules.settled(0, 1, 1)], ids=repr
)
def test_bits_per_byte_by_hand(schedule: Any):
    model = random_model(LRT)
    nats, size = by_hand(model, schedule)
    found, counted = bits_per_byte(model, cut(), BYTES, schedule_scorer(schedule), progress=False)
    assert counted == size
    assert found == pytest.approx(nats / (math.log(2) * size), rel=TOLERANCE[torch.float64])


def test_live_bits_per_byte_by_hand():
    model = random_model(LRT)
    nats, size = by_hand(model, schedules.sequential())
    assert bpb(model, live_scorer) == pytest.approx(nats / (math.log(2) * size), rel=TOLERANCE[torch.float64])
    assert abs(bpb(model, live_scorer) - bpb(model, schedule_scorer(schedules.plain()))) > VISIBLE


def test_a_uniform_model_needs_log2_v_bits_per_token():
    model = LatentRecurrentTransformer(LRT)
    with torch.no_grad():
        model.head.weight.zero_()
    documents = text()
    size = int(BYTES[torch.from_numpy(documents.tokens.astype(np.int64))].sum())
    assert bpb(model, live_scorer) == pytest.approx(math.log2(V) * len(documents.tokens) / size, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_no_score_depends_on_the_batch_size(batch_size: int):
    model = random_model(LRT)
    assert len(cut()) == 7  # full windows and short ones, so that batches are padded
    for scorer in (live_scorer, schedule_scorer(MIXED)):
        expected = bpb(model, scorer, batch_size=64)
        assert bpb(model, scorer, batch_size=batch_size) == pytest.approx(expected, rel=TOLERANCE[torch.float64])


SAME = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Bits per byte within which a checkpoint scores itself, however it is cut into batches and ranks."""


def by_oracle(model: Any) -> float:
    """Live bits per byte of `text()` from the reference alone: document by document, one token at a time."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    nats, size = 0.0, 0
    for document in text():
        for start in range(0, len(document), CONTEXT - 1):
            piece = document[start : start + CONTEXT - 1].astype(np.int64)
            hidden = oracle(weights, model.config, torch.tensor([0, *piece[:-1]]))
            logits = model.config.softcap * torch.tanh(hidden @ weights["head.weight"].T / model.config.softcap)
            nats -= float(logits.double().log_softmax(-1).gather(1, torch.from_numpy(piece).unsqueeze(1)).sum())
            size += int((piece % 4).sum())
    return nats / (math.log(2) * size)


def shuffled(found: Windows, seed: int) -> Windows:
    order = np.random.default_rng(seed).permutation(len(found))
    return replace(found, starts=found.starts[order], lengths=found.lengths[order])


@pytest.mark.parametrize("dtype", SAME, ids=str)
def test_live_is_the_oracle_s_for_every_batch_size_row_order_and_number_of_ranks(dtype: torch.dtype, tmp_path: Path):
    model = random_model(LRT, dtype)
    expected = by_oracle(model)
    assert abs(expected - bpb(model, schedule_scorer(schedules.plain()))) > VISIBLE
    for batch_size in (1, 2, 3, 7, 64):
        for found in (cut(), shuffled(cut(), 0), shuffled(cut(), 1)):
            assert bpb(model, live_scorer, found, batch_size=batch_size) == pytest.approx(expected, abs=SAME[dtype])
    for count in (1, 2, 3):
        folder = tmp_path / str(count)
        found = on_ranks(
            count, lambda r, at=folder: bpb(model, live_scorer, batch_size=2, ledger=Ledger(at, "live", {}, r))
        )
        assert found == pytest.approx([expected] * count, abs=SAME[dtype])
        assert len(list(folder.glob("*.jsonl"))) == count  # each had its share


def test_a_stopped_score_goes_on(tmp_path: Path):
    model, asked = random_model(LRT), []

    def stopping(model: Any, tokens: Tensor, advance: Any) -> Tensor:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(tokens))
        return live_scorer(model, tokens, advance)

    with pytest.raises(KeyboardInterrupt):
        bpb(model, stopping, batch_size=2, ledger=Ledger(tmp_path, "live", {}))
    asked[:] = [0, 0, 0]  # never two again
    assert bpb(model, stopping, batch_size=2, ledger=Ledger(tmp_path, "live", {})) == bpb(
        model, live_scorer, batch_size=2
    )
    assert asked[3:] == [2, 1]  # three of seven windows were left


def test_a_shuffled_memory_is_the_same_shared_and_resumed(tmp_path: Path):
    """What it finds depends on which windows are scored together: those of a batch, whoever scores it."""
    model = random_model(LRT)

    fields: dict[str, Any] = {"ablations": ("shuffled",), "batch_size": 2}
    alone = metrics(model, schedules.plain(), **fields)

    def of_rank(ranks: SingleProcess) -> Metrics:
        return metrics(model, schedules.plain(), open_ledger=lambda name: Ledger(tmp_path, name, {}, ranks), **fields)

    assert on_ranks(2, of_rank) == [alone, alone]
    (halved,) = tmp_path.glob("memory-shuffled-*.rank1.jsonl")
    halved.unlink()
    assert on_ranks(1, of_rank) == [alone]  # what is left


def test_a_single_window_has_no_shuffled_memory():
    found = metrics(random_model(LRT), schedules.plain(), windows(text((3,)), CONTEXT), ablations=every_ablation())
    assert found.live_bpb_memory_shuffled is None
    assert found.live_bpb_memory_frozen is not None


def test_a_sample_of_windows_counts_its_own_bytes():
    documents = text((400,))
    sampled, whole = windows(documents, CONTEXT, at_least=50), windows(documents, CONTEXT)
    assert not sampled.complete
    assert 50 <= sampled.targets < whole.targets
    model = LatentRecurrentTransformer(LRT)
    found, size = bits_per_byte(model, sampled, BYTES, live_scorer, progress=False)
    assert size < bits_per_byte(model, whole, BYTES, live_scorer, progress=False)[1]
    assert found == pytest.approx(
        bpb(model, live_scorer, whole), rel=0.2
    )  # an untrained model: bits per token over bytes


def test_a_space_that_the_tokenizer_puts_before_every_document_is_no_byte_of_it():
    """Sentencepiece-like tokenizers; a document's later windows have none."""
    documents = text((40, 3, 100))
    every = windows(documents, CONTEXT, at_least=None)
    assert every.document_starts == 3 < len(every)
    assert windows(documents, CONTEXT, at_least=10).document_starts < 3
    model = LatentRecurrentTransformer(LRT)
    found, size = bits_per_byte(model, every, BYTES, live_scorer, progress=False)
    stripped, smaller = bits_per_byte(model, every, BYTES, live_scorer, progress=False, prefix_bytes=2)
    assert smaller == size - 6
    assert stripped * smaller == pytest.approx(found * size, rel=1e-9)
    assert metrics(model, schedules.plain(), every, prefix_bytes=2).bytes == smaller


# Parallel and live
def test_without_recurrence_parallel_and_live_are_one():
    # Whatever the schedule asked for: nothing recurs, so `plain` serves.
    for config in (NONE, SHIFT):
        for dtype in (torch.float32, torch.float64):
            found = metrics(random_model(config, dtype), schedules.interleaved(2))
            assert found.schedule == "plain()"
            assert abs(found.gap) < 1e-6
            assert found.live_bpb_memory_zero is None
            assert found.live_bpb_memory_embedding is None


def test_a_mixture_is_the_probability_weighted_mean():
    model = random_model(LRT)
    parts = [bpb(model, schedule_scorer(part)) for _, part in MIXED.parts]
    expected = 0.25 * parts[0] + 0.75 * parts[1]
    assert abs(parts[0] - parts[1]) > VISIBLE
    assert bpb(model, schedule_scorer(MIXED)) == pytest.approx(expected, rel=TOLERANCE[torch.float64])
    late = schedules.stages([(0.9, schedules.plain()), (0.1, MIXED)])  # stages: their last
    assert bpb(model, schedule_scorer(late)) == pytest.approx(expected, rel=TOLERANCE[torch.float64])
    found = metrics(model, MIXED, ablations=())
    assert found.parallel_bpb == pytest.approx(expected, rel=TOLERANCE[torch.float64])
    assert found.schedule == repr(MIXED)


def test_parallel_scores_take_each_position_by_its_last_writer():
    model, tokens = random_model(LRT), torch.randint(V, (2, 7), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2, 2]])
    for schedule in (schedules.interleaved(2), schedules.chunked(3)):
        hidden = refine(model, tokens[:, :-1], schedule, documents[:, :-1]).hidden
        assert_same(score_parallel(model, tokens, schedule, documents), token_nats(model, hidden, tokens[:, 1:]))
    assert_same(score_parallel(model, tokens, schedules.sequential(), documents), score(model, tokens, documents))


def test_metrics_are_consistent_and_plain_data():
    model = random_model(LRT)
    found = metrics(model, schedules.interleaved(2))
    assert found.schedule == "interleaved(2)"
    assert found.targets == len(text().tokens)
    assert found.complete
    assert found.bytes == by_hand(model, schedules.plain())[1]
    assert found.parallel_bpb == bpb(model, schedule_scorer(schedules.interleaved(2)))
    assert found.live_bpb == bpb(model, live_scorer)
    assert found.gap == found.live_bpb - found.parallel_bpb
    assert found.live_bpb_memory_zero == bpb(ablate(model, "zero"), live_scorer)
    assert found.live_bpb_memory_embedding == bpb(ablate(model, "embedding"), live_scorer)
    assert Metrics(**json.loads(json.dumps(found.to_dict()))) == found
    assert "live_bpb_memory_frozen" not in found.to_dict()  # only when asked for
    assert len({found.live_bpb, found.live_bpb_memory_zero, found.live_bpb_memory_embedding}) == 3


def test_evaluating_leaves_the_mode_and_the_gradients_alone():
    model = LatentRecurrentTransformer(LRT)
    for training in (True, False):
        model.train(training)
        metrics(model, schedules.plain())
        assert model.training == training
    assert all(p.grad is None for p in model.parameters())


# The memory replaced
SOURCES: dict[str, dict[str, Any]] = {
    "L": {},
    "1": {"source": 1},
    "delay": {"delay": 2},
    "delays": {"source": (0, 2, 2), "combine": "channels", "delay": (2, 1, 3)},
    "(0,L)channels": {"source": (0, 2), "combine": "channels"},
    "(0,L)sum": {"source": (0, 2), "combine": "sum"},
    "stand-in": {"initial": "embedding"},
    "residual": {"injection": "residual"},
    "key_value": {"injection": "key_value", "projection": "layerwise"},
    "some layers": {"layers": (2,)},
}
TWO_DELAYS: dict[str, Any] = {"source": (2, 2), "combine": "channels", "delay": (3, 1)}
every_source = pytest.mark.parametrize("memory", SOURCES.values(), ids=list(SOURCES))


def example() -> tuple[Tensor, Tensor]:
    """Tokens and packed documents (2, CONTEXT)."""
    tokens = torch.randint(V, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    return tokens, torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 2, 2]])


def assert_scores_like(actual: Any, expected: Any) -> None:
    tokens, documents = example()
    for numbers in (None, documents):
        assert_same(score(actual, tokens, numbers), score(expected, tokens, numbers))


def copied(model: Any, config: ModelConfig) -> Any:
    """A model of another configuration with the same weights."""
    other = LatentRecurrentTransformer(config).double().eval()
    other.load_state_dict(model.state_dict())
    return other


@every_source
def test_memory_zero_is_a_model_that_adds_none(memory: dict[str, Any]):
    # Made by hand: γ and U at zero, so that whatever the memory holds, nothing of it arrives.
    model = random_model(configuration(**memory))
    without = copied(model, model.config)
    with torch.no_grad():
        for name, p in without.named_parameters():
            if name.endswith(".gamma") or name == "projection.weight":
                p.zero_()
    assert_scores_like(ablate(model, "zero"), without)
    tokens, _ = example()
    assert_differs(score(without, tokens), score(model, tokens))


@every_source
def test_memory_embedding_is_token_shift_with_the_same_weights(memory: dict[str, Any]):
    model = random_model(configuration(**memory))
    sources = model.config.memory.sources(2)
    if len(sources) == 1:
        shift = copied(model, replace(model.config, memory=replace(model.config.memory, source=0)))
    elif model.config.memory.combine == "channels":
        shift = copied(model, replace(model.config, memory=replace(model.config.memory, source=(0,) * len(sources))))
    else:
        # rms(Σ w · x_0) = ± x_0, by the sign of the weights' sum.
        shift = copied(model, model.config)
        shift.recall = Signed(shift.recall)
    assert_scores_like(ablate(model, "embedding"), shift)
    tokens, _ = example()
    assert_differs(score(shift, tokens), score(model, tokens))


class Previous(torch.nn.Module):
    """The normalised embedding of the token `delay` back, (B, T, D), without the library's reading."""

    def __init__(self, recall: Any) -> None:
        super().__init__()
        self.recall = recall

    def previous(self, state: Any, positions: Any, embedding: torch.nn.Embedding) -> Tensor:
        out = torch.zeros(state.batch, len(positions), embedding.embedding_dim, dtype=embedding.weight.dtype)
        for b in range(state.batch):
            for i, p in enumerate(positions):
                same = p >= 1 and (state.documents is None or state.documents[b, p - 1] == state.documents[b, p])
                if same:
                    x = embedding.weight[state.tokens[b, p - 1]]
                    out[b, i] = x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt()
        return out


class Signed(Previous):
    """The sum of two equal parts, normalised."""

    def forward(self, state: Any, positions: Any, embedding: torch.nn.Embedding) -> Tensor:
        sign = self.recall.weights.sum().sign()
        return sign * self.previous(state, positions, embedding).unsqueeze(0)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_shares_the_parameters_and_leaves_the_original_alone(name: str):
    model = random_model(LRT)
    tokens, _ = example()
    before, modules = score(model, tokens), dict(model.named_modules())
    other = ablate(model, name)
    assert_differs(score(other, tokens), before)
    assert torch.equal(score(model, tokens), before)
    assert dict(model.named_modules()) == modules
    shared = dict(other.named_parameters())
    assert set(shared) == set(dict(model.named_parameters()))
    assert all(shared[n] is p for n, p in model.named_parameters())


def reads(memory: dict[str, Any], name: str, *read: Any) -> None:
    """An ablation of a model is the same model with its reading replaced, channel by channel."""
    model = random_model(configuration(**memory))
    by_hand = copied(model, model.config)
    by_hand.recall = ByHand(by_hand.recall, *read)
    assert_scores_like(ablate(model, name), by_hand)


class ByHand(torch.nn.Module):
    """Memory looked up one position at a time: of each channel `read` names (row, position) or None for zeros."""

    def __init__(self, recall: Any, *read: Any) -> None:
        super().__init__()
        self.recall, self.reads = recall, read

    def forward(self, state: Any, positions: Any, embedding: torch.nn.Embedding) -> Tensor:
        sizes = (len(self.reads), state.batch, len(positions), embedding.embedding_dim)
        out = torch.zeros(sizes, dtype=embedding.weight.dtype)
        numbers = torch.zeros_like(state.tokens) if state.documents is None else state.documents
        for b in range(state.batch):
            for i, p in enumerate(positions):
                for channel, read in enumerate(self.reads):
                    found = read(numbers, b, p)
                    if found is not None:
                        out[channel, b, i] = state.memory[found[0], found[1], 0]
        return out


def test_delayed_memory_is_read_further_back():
    def read(back: int) -> Any:
        def find(numbers: Tensor, b: int, p: int) -> Any:
            before = p - back
            return (b, before) if before >= 0 and numbers[b, before] == numbers[b, p] else None

        return find

    reads({}, "delayed_1", read(2))
    reads(TWO_DELAYS, "delayed_1", read(4), read(2))
    model, tokens = random_model(LRT), torch.randint(1, V, (2, CONTEXT), generator=torch.Generator().manual_seed(3))
    assert_same(score(ablate(model, "delayed_8"), tokens), score(ablate(model, "zero"), tokens))  # 8 positions only


def test_frozen_memory_is_the_first_of_the_document():
    def read(delay: int) -> Any:
        def find(numbers: Tensor, b: int, p: int) -> Any:
            first = next(q for q in range(p + 1) if numbers[b, q] == numbers[b, p])
            return (b, first) if p - first >= delay else None

        return find

    reads({}, "frozen", read(1))
    reads(TWO_DELAYS, "frozen", read(3), read(1))


def test_shuffled_memory_is_another_row_s():
    def read(numbers: Tensor, b: int, p: int) -> Any:
        other = (b - 1) % len(numbers)
        return (other, p - 1) if p > 0 and numbers[other, p - 1] == numbers[other, p] else None

    reads({}, "shuffled", read)
    model = random_model(LRT)
    with pytest.raises(ValueError, match="score at least 2 windows at once"):
        score(ablate(model, "shuffled"), example()[0][:1])


def test_every_ablation_can_be_asked_for():
    """Seven windows in batches of three: none may be alone in its batch, or it had no other's memory to read."""
    model = random_model(LRT)
    found = metrics(model, schedules.interleaved(2), ablations=every_ablation(), batch_size=3)
    values = found.to_dict()
    assert len({v for k, v in values.items() if k.startswith("live_bpb")}) == len(every_ablation())
    assert found.live_bpb_memory_delayed_8 == found.live_bpb_memory_zero  # windows of 8
    assert all(values[k] is not None for k in values)
    with pytest.raises(ValueError, match="unknown ablations noise; choose among zero"):
        metrics(model, schedules.plain(), ablations=("noise",))


def test_two_forwards_read_what_the_first_one_wrote():
    model, tokens = random_model(LRT), example()[0]
    again = copied(model, model.config)
    again.recall = ByHand(again.recall, lambda numbers, b, p: (b, p))
    state, hidden = model.empty_state(2, CONTEXT - 1), []
    with torch.no_grad():
        for t in range(CONTEXT - 1):
            _, state = model(tokens[:, t : t + 1], range(t, t + 1), state)
            h, state = again(tokens[:, t : t + 1], range(t, t + 1), state)
            hidden.append(h)
        expected = token_nats(model, torch.cat(hidden, 1), tokens[:, 1:])
    assert_same(two_forwards(model, tokens, lambda *_: None), expected)
    assert_differs(expected, score(model, tokens))


def test_an_unknown_ablation_is_told_the_known_ones():
    with pytest.raises(ValueError, match="unknown ablation 'noise'; choose one of zero, embedding"):
        ablate(random_model(LRT), "noise")


# Tokenizers without bytes
def word_tokenizer() -> Tokenizer:
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=V, special_tokens=["<s>", "[UNK]"], show_progress=False)
    inner.train_from_iterator(["plain words only"], trainer)
    return Tokenizer(inner)


def test_a_tokenizer_without_bytes_needs_the_whole_split():
    assert word_tokenizer().token_bytes() is None
    model, documents = random_model(LRT), text((60,), size=234)
    sampled, whole = windows(documents, CONTEXT, at_least=20), windows(documents, CONTEXT, at_least=None)
    with pytest.raises(ValueError, match=r"no byte alphabet: score the whole split \(at_least=None\)"):
        metrics(model, schedules.plain(), sampled, token_bytes=None)
    found = metrics(model, schedules.plain(), whole, token_bytes=None)
    assert found.bytes == 234
    nats = found.live_bpb * math.log(2) * 234
    counted = metrics(model, schedules.plain(), whole)
    assert nats == pytest.approx(counted.live_bpb * math.log(2) * counted.bytes, rel=TOLERANCE[torch.float64])
