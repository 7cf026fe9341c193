"""The rivals in the harness: Loop Transformer and latent thoughts equal an oracle of their own; sizes by hand.

B rows, T positions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import (
    BATCH,
    LENGTH,
    NONE,
    PAIRWISE,
    assert_differs,
    assert_same,
    assert_same_gradients,
    decode,
    exact_schedules,
    gradients,
    oracle_rows,
    over,
    random_model,
    random_tokens,
    unaligned,
    weights_of,
)
from support.rival_oracle import rival_oracle
from torch import Tensor

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, generate, load, refine, schedules, score
from lrt.data.tokenizer import Tokenizer
from lrt.experiments import rivals
from lrt.inference.decoders import decoder
from lrt.inference.engine import Engine
from lrt.inference.prefill import prefill
from lrt.inference.sampling import Sampling
from lrt.model.checkpoint import save
from lrt.model.cross_entropy import token_nats
from lrt.model.size import count_parameters
from lrt.schedules.flops import forward_flops, training_flops
from lrt.schedules.loss import StepLoss

BASE = replace(NONE, heads=2, kv_heads=1, value_embeddings="alternate", mlp_width=20)
LOOPS = {
    "loop 2": replace(BASE, loops=2),
    "loop 3": replace(BASE, loops=3, window_pattern="SL", window=3),
    "loop 2, lrt": replace(next(iter(PAIRWISE.values())), loops=2),
}
THOUGHTS = {
    "1 thought": replace(BASE, thoughts=1),
    "2 thoughts": replace(BASE, thoughts=2),
    "1 thought, loop 2": replace(BASE, thoughts=1, loops=2),
}
RIVALS = {**LOOPS, **THOUGHTS}


def expected_rows(model: Any, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
    rows = range(len(tokens))
    known: list[Tensor | None] = [None] * len(tokens) if documents is None else list(documents)
    return torch.stack([rival_oracle(weights_of(model), model.config, tokens[b], known[b]) for b in rows])


@over({"none": NONE, **dict(list(PAIRWISE.items())[:4])})
def test_the_rivals_oracle_is_the_models_where_there_is_one_forward(config: ModelConfig):
    model, tokens = random_model(config), random_tokens()
    assert_same(expected_rows(model, tokens), oracle_rows(model, tokens))


@over(RIVALS)
def test_live_equals_the_oracle(config: ModelConfig):
    model, tokens = random_model(config), random_tokens()
    expected = expected_rows(model, tokens)
    assert_same(decode(model, tokens, model.empty_state(BATCH, LENGTH)), expected, "the model")
    for mode in ("eager", "fused"):
        step = decoder(model, model.empty_state(BATCH, LENGTH), mode)
        assert_same(torch.stack([step(tokens[:, t], [t] * BATCH) for t in range(LENGTH)], 1), expected, mode)
    nats = token_nats(model, expected[:, :-1], tokens[:, 1:])
    assert_same(score(model, tokens), nats, "score")
    assert_differs(expected, oracle_rows(random_model(replace(config, loops=1, thoughts=0)), tokens))


@over(RIVALS)
def test_rows_at_positions_of_their_own(config: ModelConfig):
    model, tokens = random_model(config), random_tokens()
    expected = expected_rows(model, tokens)
    for mode in ("eager", "fused"):
        step = decoder(model, model.empty_state(BATCH, LENGTH), mode)
        step(tokens[:1, 0], [0])
        hidden = [step(torch.stack([tokens[0, t + 1], tokens[1, t]]), [t + 1, t]) for t in range(LENGTH - 1)]
        assert_same(torch.stack([h[0] for h in hidden], 0), expected[0, 1:], mode)
        assert_same(torch.stack([h[1] for h in hidden], 0), expected[1, :-1], mode)


@over(RIVALS)
def test_gradients_of_the_exact_schedule(config: ModelConfig):
    model, tokens = random_model(config), random_tokens()
    out = refine(model, tokens, schedules.sequential())
    assert_same_gradients(gradients(model, out.hidden), gradients(model, expected_rows(model, tokens)))


@over(RIVALS)
def test_packed_documents_are_separate(config: ModelConfig):
    model, tokens, documents = random_model(config), random_tokens(), unaligned()
    expected = expected_rows(model, tokens, documents)
    assert_same(refine(model, tokens, schedules.sequential(), documents).hidden, expected)
    assert_same(score(model, tokens, documents), token_nats(model, expected[:, :-1], tokens[:, 1:]))


@over({name: config for name, config in LOOPS.items() if config.memory.injection == "none"})
def test_a_loop_transformer_is_exact_in_one_pass(config: ModelConfig):
    model, tokens = random_model(config), random_tokens()
    expected = expected_rows(model, tokens)
    out = refine(model, tokens, schedules.plain())
    assert_same(out.hidden, expected)
    assert_same_gradients(gradients(model, out.hidden), gradients(model, expected))


@over(THOUGHTS)
def test_thoughts_settle_from_the_left(config: ModelConfig):
    """After n passes the first n tokens are exact: a pass reads earlier tokens' thoughts from the pass before."""
    model, tokens = random_model(config), random_tokens()
    expected = expected_rows(model, tokens)
    for refinements in range(LENGTH):
        hidden = refine(model, tokens, schedules.multi_refinement(refinements)).hidden
        assert_same(hidden[:, : refinements + 1], expected[:, : refinements + 1])
        if refinements < 2:  # later ones differ less and less: the iteration contracts
            assert_differs(hidden[:, refinements + 1], expected[:, refinements + 1])


@over(THOUGHTS)
@pytest.mark.parametrize("schedule", [schedules.plain(), schedules.multi_refinement(2)])
def test_passes_by_classes_equal_passes_over_slots(config: ModelConfig, schedule: schedules.Simple):
    """The State of training, by residue classes, against the general one: values, gradients, packed documents."""
    model, tokens, documents = random_model(config), random_tokens(), unaligned()
    fast = refine(model, tokens, schedule, documents)
    state = model.empty_state(BATCH, LENGTH, documents, tokens)
    slow = refine(model, tokens, schedule, state=state)
    assert type(fast.last) is not type(slow.last)
    assert_same(fast.hidden, slow.hidden)
    assert_same_gradients(gradients(model, fast.hidden), gradients(model, slow.hidden))
    assert_same(fast.state.keys[0], slow.state.keys[0])


@over(THOUGHTS)
def test_schedules_that_are_exact(config: ModelConfig):
    model, tokens = random_model(config), random_tokens()
    expected = expected_rows(model, tokens)
    for schedule in exact_schedules(LENGTH):
        assert_same(refine(model, tokens, schedule).hidden, expected, repr(schedule))


@over(THOUGHTS)
def test_refining_goes_on_behind_a_state(config: ModelConfig):
    model, tokens = random_model(config), random_tokens()
    first = refine(model, tokens[:, :4], schedules.sequential(), state=model.empty_state(BATCH, LENGTH))
    rest = refine(model, tokens[:, 4:], schedules.sequential(), state=first.state)
    assert_same(rest.hidden, expected_rows(model, tokens)[:, 4:])


@over(RIVALS)
def test_generation_is_greedy_decoding_of_the_oracle(config: ModelConfig):
    model, tokens = random_model(config), random_tokens()[:, :3]
    for drawn in generate(model, tokens, 3, Sampling(temperature=0)):
        assert torch.equal(model.logits(expected_rows(model, tokens)[:, -1]).argmax(-1), drawn)
        tokens = torch.cat([tokens, drawn.unsqueeze(1)], 1)
    assert tokens.shape[1] == 6


@over({name: RIVALS[name] for name in ("loop 2, lrt", "1 thought, loop 2")})
def test_a_checkpoint_rebuilds_it(config: ModelConfig, tmp_path: Path):
    tokenizer = Tokenizer.train(["some text, größer 🙂"] * 3, 300)
    model = random_model(replace(config, vocab_size=tokenizer.vocab_size), torch.float32)
    save(tmp_path / "checkpoint", model, tokenizer)
    again, _ = load(tmp_path / "checkpoint")
    assert again.config == model.config
    assert torch.equal(score(again, random_tokens()), score(model, random_tokens()))


def test_a_users_mistakes():
    with pytest.raises(ValueError, match="loops is 0; it must be a whole number of at least 1"):
        ModelConfig(loops=0)
    with pytest.raises(ValueError, match="thoughts is -1"):
        ModelConfig(thoughts=-1, memory=MemoryConfig(injection="none"))
    with pytest.raises(ValueError, match=r"latent thoughts need memory\.injection 'none' and full attention"):
        ModelConfig(thoughts=1)
    with pytest.raises(ValueError, match="latent thoughts need"):
        replace(NONE, thoughts=1, window_pattern="SL")
    model = LatentRecurrentTransformer(THOUGHTS["1 thought"])
    with pytest.raises(ValueError, match="decoded token by token only; use generate or score"):
        prefill(model, random_tokens(), model.empty_state(BATCH, LENGTH))
    with pytest.raises(ValueError, match="decoded token by token only"):
        Engine(model)
    with pytest.raises(ValueError, match=r"position 16 exceeds the 16 slots of this state \(context 16\)"):
        model(random_tokens(length=1), range(16, 17), model.empty_state(BATCH, 16))
    with pytest.raises(ValueError, match="position 16 exceeds the 16 slots"):
        decoder(model, model.empty_state(BATCH, 16))(random_tokens()[:, 0], [16, 16])


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and FLOPs at depth 20, by hand
# ---------------------------------------------------------------------------------------------------------------------

D, L, V, T, HEADS = 1280, 20, 32768, 2048, 10  # width 64 · 20, heads of 128
BASE_20 = ModelConfig.from_depth(L, context=T, vocab_size=V, value_embeddings="all")

# A block: q, k, v and out 4 · 1280² = 6,553,600; the MLP 8 · 1280² = 13,107,200; α and β 2; the value embedding's gate
# 10 · 1280 = 12,800. In all 19,673,602; twenty blocks 393,472,040.
BLOCKS = 393_472_040
# Embedding, head and 20 value tables of 32768 · 1280 = 41,943,040: 22 · 41,943,040 = 922,746,880.
TABLES_AND_HEAD = 922_746_880
GAMMAS = 20  # one γ per block
GATES = 512_000  # local and memory: 2 · 10 · 1280 = 25,600 per block
PAIR = 3_276_800  # U_k and U_v: 2 · 1280²
# Attention sees (2048 + 1) / 2 = 1024.5 keys on average; 4 · 1280 FLOPs per key and block: 104,908,800 over 20 blocks.
ATTENTION = 104_908_800
# With a thought 4096 positions see 2048.5 keys on average: 4 · 1280 · 2048.5 · 20.
LONGER = 209_766_400
HEAD = 83_886_080  # 2 · 1280 · 32768
PLAIN_STACK = 2 * BLOCKS + ATTENTION  # 891,852,880

# late: three channels. Blocks 1 to 14 read the embedding's two (2 γ, gates 3 · 10 · 1280), 15 to 20 layer 15 as well.
LATE_LOW = 14 * (PLAIN_STACK / 20 + 2 * (2 + 38_400 + 2 * PAIR))
LATE_FREE = PLAIN_STACK / 20 + 2 * (3 + 51_200 + 2 * PAIR)  # block 15, before anything is written
LATE_HIGH = 6 * (PLAIN_STACK / 20 + 2 * (3 + 51_200 + 3 * PAIR))

# name: (parameters, FLOPs per token of one call without the head, of training, forwards per generated token)
BY_HAND: dict[str, tuple[int, float, float, int]] = {
    "transformer": (BLOCKS + TABLES_AND_HEAD, PLAIN_STACK, 3 * (PLAIN_STACK + HEAD), 1),
    "token shift": (
        BLOCKS + TABLES_AND_HEAD + GAMMAS + GATES + PAIR,
        PLAIN_STACK + 2 * (GAMMAS + GATES + PAIR),
        3 * (PLAIN_STACK + 2 * (GAMMAS + GATES + PAIR) + HEAD),
        1,
    ),
    # As the two recommended ones, below, in one pass.
    "token shift, 2 channels": (
        BLOCKS + TABLES_AND_HEAD + 40 + 768_000 + 2 * PAIR,
        PLAIN_STACK + 2 * (40 + 768_000 + 2 * PAIR),
        3 * (PLAIN_STACK + 2 * (40 + 768_000 + 2 * PAIR) + HEAD),
        1,
    ),
    "token shift, 2 channels, layerwise": (
        BLOCKS + TABLES_AND_HEAD + 40 + 768_000 + 40 * PAIR,
        PLAIN_STACK + 2 * (40 + 768_000 + 40 * PAIR),
        3 * (PLAIN_STACK + 2 * (40 + 768_000 + 40 * PAIR) + HEAD),
        1,
    ),
    # Three channels: 3 γ per block, gates 4 · 10 · 1280, three pairs.
    "short convolution, width 4": (
        BLOCKS + TABLES_AND_HEAD + 60 + 1_024_000 + 60 * PAIR,
        PLAIN_STACK + 2 * (60 + 1_024_000 + 60 * PAIR),
        3 * (PLAIN_STACK + 2 * (60 + 1_024_000 + 60 * PAIR) + HEAD),
        1,
    ),
    "loop 2": (BLOCKS + TABLES_AND_HEAD, 2 * PLAIN_STACK, 3 * (2 * PLAIN_STACK + HEAD), 2),
    "loop 3": (BLOCKS + TABLES_AND_HEAD, 3 * PLAIN_STACK, 3 * (3 * PLAIN_STACK + HEAD), 3),
    # Two positions per token. Jacobi: K + 1 passes for K = 1, 2, 3 at 34, 33 and 33 %: 2.99 passes; one head.
    "ponder": (
        BLOCKS + TABLES_AND_HEAD,
        2 * (2 * BLOCKS + LONGER),
        3 * (2.99 * 2 * (2 * BLOCKS + LONGER) + HEAD),
        2,
    ),
    # One block, 10, reads layer 15: 1 γ, gates 25,600, one pair. The default: in half of training 1 pass forward only
    # and one of 3, which has the head, in the other half 2 and one. The 9 blocks below are run once; the free ones run
    # blocks 10 to 15: 3 stacks, and 1.5 times 6 of 20 blocks.
    "middle recurrence": (
        BLOCKS + TABLES_AND_HEAD + 1 + 25_600 + PAIR,
        PLAIN_STACK + 2 * (1 + 25_600 + PAIR),
        (3 + 1.5 * 0.3) * PLAIN_STACK + 4.5 * 2 * (1 + 25_600 + PAIR) + 3 * HEAD,
        1,
    ),
    "chunked": (
        BLOCKS + TABLES_AND_HEAD + GAMMAS + GATES + PAIR,
        PLAIN_STACK + 2 * (GAMMAS + GATES + PAIR),
        3 * (PLAIN_STACK + 2 * (GAMMAS + GATES + PAIR) + HEAD),
        1,
    ),
    # interleaved(2): a full pass and two halves, all with the head: 6 stacks, 6 heads.
    "shared": (
        BLOCKS + TABLES_AND_HEAD + GAMMAS + GATES + PAIR,
        PLAIN_STACK + 2 * (GAMMAS + GATES + PAIR),
        6 * (PLAIN_STACK + 2 * (GAMMAS + GATES + PAIR) + HEAD),
        1,
    ),
    "layerwise": (
        BLOCKS + TABLES_AND_HEAD + GAMMAS + GATES + 20 * PAIR,
        PLAIN_STACK + 2 * (GAMMAS + GATES + 20 * PAIR),
        6 * (PLAIN_STACK + 2 * (GAMMAS + GATES + 20 * PAIR) + HEAD),
        1,
    ),
    # Two channels: 2 γ per block, gates 3 · 10 · 1280 per block, two pairs, or two per block. The default schedule, as
    # above.
    "recommended, shared": (
        BLOCKS + TABLES_AND_HEAD + 40 + 768_000 + 2 * PAIR,
        PLAIN_STACK + 2 * (40 + 768_000 + 2 * PAIR),
        4.5 * (PLAIN_STACK + 2 * (40 + 768_000 + 2 * PAIR)) + 3 * HEAD,
        1,
    ),
    # Until the onset at 0.9 a pass without the 6 pairs of layer 15; then the lower blocks once, a free pass of block 15
    # and the upper blocks.
    "late": (
        BLOCKS + TABLES_AND_HEAD + 46 + 844_800 + 46 * PAIR,
        LATE_LOW + LATE_HIGH,
        3 * LATE_LOW + 3 * LATE_HIGH - 0.9 * 3 * 2 * 6 * PAIR + 0.1 * LATE_FREE + 3 * HEAD,
        1,
    ),
    "recommended": (
        BLOCKS + TABLES_AND_HEAD + 40 + 768_000 + 40 * PAIR,
        PLAIN_STACK + 2 * (40 + 768_000 + 40 * PAIR),
        4.5 * (PLAIN_STACK + 2 * (40 + 768_000 + 40 * PAIR)) + 3 * HEAD,
        1,
    ),
}


@pytest.mark.parametrize("name", list(rivals.rivals(L)))
def test_sizes_and_flops_equal_those_by_hand(name: str):
    rival = rivals.rivals(L)[name]
    parameters, call, training, forwards = BY_HAND[name]
    config = rival.model(BASE_20)
    assert count_parameters(config)[0] == parameters
    assert forward_flops(config, T) == (pytest.approx(call, rel=1e-12), HEAD)
    assert training_flops(config, schedules.parse(rival.schedule), T) == pytest.approx(training, rel=1e-12)
    assert config.forwards == forwards


def test_the_published_sizes_at_depth_20():
    """The paper's figures (spec, section 1): shared adds 0.3 %, layerwise 5 % of the total; the model is 1.3 B."""
    plain, shared, layerwise = (BY_HAND[name][0] for name in ("transformer", "shared", "layerwise"))
    assert plain == 1_316_218_920
    assert shared / plain - 1 == pytest.approx(0.003, abs=0.0005)
    assert layerwise / plain - 1 == pytest.approx(0.05, abs=0.0005)


@pytest.mark.parametrize("name", list(rivals.rivals(2)))
def test_every_rival_trains(name: str):
    """Each rival's schedule gives a gradient to every parameter once the zero outputs have moved."""
    rival = rivals.rivals(2)[name]
    model = random_model(rival.model(replace(NONE, mlp_width=20)))
    tokens = random_tokens()
    # A chunk as long as the text would leave the memory unread.
    passes = schedules.parse(rival.schedule.replace("chunked(64)", "chunked(4)")).draw()
    loss = StepLoss.of(passes, [tokens])(model, tokens, tokens, None)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert all(float(g.abs().max()) > 0 for g in grads)
