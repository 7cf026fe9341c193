"""State tracking: the tasks against hand-computed cases, exact passes in chunks against `refine`, scores, streams."""

from __future__ import annotations

import dataclasses
import math
from decimal import Decimal, localcontext

import pytest
import torch

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig, refine, schedules
from lrt.data.batch import IGNORED
from lrt.eval.ablations import ablate
from lrt.experiments.state_tracking import measure
from lrt.experiments.state_tracking.tasks import (
    CLOSE,
    IGNORE,
    MINUS,
    OPEN,
    PLUS,
    READ,
    S5,
    TASKS,
    TIMES,
    VALUES,
    WRITE,
    alternating_group,
    expression,
    flat_values,
    prefix_products,
    symmetric_group,
)
from lrt.experiments.state_tracking.training import STRIDE, TrackingRun, step_loss, train_tracking
from lrt.model.execution import Execution
from lrt.model.layers import rotary
from lrt.schedules import unrolled
from lrt.training.optim_config import OptimConfig


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- tasks ---------------------------------------------------------------------------------------------------------


def test_flat_arithmetic_by_hand():
    rows = [
        ([1, PLUS, 2, TIMES, 3], [1, 3, 7 % 5]),
        ([1, MINUS, 1, MINUS, 1], [1, 0, -1 % 5]),
        ([0, TIMES, 1, PLUS, 4, TIMES, 3, MINUS, 2], [0, 0, 4, 12 % 5, 10 % 5]),  # Delétang et al.'s third example: 0
        ([4, MINUS, 3, TIMES, 2, TIMES, 4], [4, 1, -2 % 5, -20 % 5]),
    ]
    for words, values in rows:
        prefixes = flat_values(torch.tensor([words]))[0]
        assert prefixes[::2].tolist() == values
        assert (prefixes[1::2] == IGNORED).all()


def test_brackets_have_the_length_and_the_value():
    spelled = {PLUS: "+", MINUS: "-", OPEN: "(", CLOSE: ")", **{d: str(d) for d in range(5)}}
    for length in range(1, 41):
        words, value = expression(length, seeded(length))
        assert len(words) == length
        assert eval("".join(spelled[w] for w in words)) % 5 == value  # Python is the oracle


def test_groups_by_hand():
    assert [symmetric_group(3).order, alternating_group(5).order, symmetric_group(5).order] == [6, 60, 120]
    s3 = symmetric_group(3)
    number = {g: n for n, g in enumerate(s3.elements)}
    swap, cycle = number[1, 0, 2], number[1, 2, 0]  # 0 <-> 1; 0 -> 1 -> 2 -> 0
    assert s3.table[swap, cycle] == number[2, 1, 0]  # 0 -> 1 -> 2, 1 -> 0 -> 1, 2 -> 2 -> 0
    assert s3.table[cycle, swap] == number[0, 2, 1]
    assert s3.elements[s3.identity] == (0, 1, 2)
    assert len(S5.moving_at_most(2)) == 11
    assert prefix_products(s3, torch.tensor([[swap, swap, cycle, cycle, cycle]])).tolist() == [
        [swap, 0, cycle, number[2, 0, 1], 0]
    ]


def test_parity_and_words_ask_at_every_position():
    tokens, classes, _ = TASKS["parity"].sample(3, 17, seeded())
    assert classes[:, -1].tolist() == [sum(row) % 2 for row in tokens.tolist()]
    tokens, classes, _ = TASKS["s5_swaps"].sample(2, 9, seeded())
    state = list(range(5))
    for t in range(9):
        letter = S5.elements[S5.moving_at_most(2)[int(tokens[0, t])]]
        state = [letter[i] for i in state]
        assert S5.elements[int(classes[0, t])] == tuple(state)


def test_flip_flop_reads_what_was_written_last():
    for name, ignore in (("flip_flop", 0.8), ("flip_flop_sparse", 0.98), ("flip_flop_dense", 0.1)):
        tokens, classes, _ = TASKS[name].sample(200, 512, seeded())
        for row, asked in zip(tokens[:20].tolist(), classes[:20].tolist(), strict=True):
            held = None
            for t in range(0, 512, 2):
                held = row[t + 1] if row[t] == WRITE else held
                assert row[t] in (WRITE, READ, IGNORE)
                assert asked[t] == (held if row[t] == READ else IGNORED)
                assert row[t] != READ or row[t + 1] == held  # the answer stands behind the question
                assert asked[t + 1] == IGNORED
            assert row[0] == WRITE
            assert row[510] == READ
        inner = tokens[:, 2:-2:2]
        shares = [(inner == kind).float().mean().item() for kind in (IGNORE, WRITE, READ)]
        assert shares == pytest.approx([ignore, (1 - ignore) / 2, (1 - ignore) / 2], abs=0.01)


def test_recall_dyck_and_retrieval_by_replaying():
    tokens, classes, _ = TASKS["recall"].sample(20, 64, seeded())
    for row, asked in zip(tokens.tolist(), classes.tolist(), strict=True):
        pairs = {row[t]: row[t + 1] - 16 for t in range(0, 32, 2)}
        assert len(pairs) == 16
        assert asked == [IGNORED] * 32 + [pairs[key] for key in row[32:]]
    tokens, classes, _ = TASKS["dyck"].sample(20, 100, seeded())
    for row, asked in zip(tokens.tolist(), classes.tolist(), strict=True):
        stack: list[int] = []
        for word, top in zip(row, asked, strict=True):
            if word >= 2:
                assert stack.pop() == word - 2
            else:
                stack.append(word)
            assert len(stack) <= 8
            assert top == (stack[-1] if stack else 2)
    tokens, classes, _ = TASKS["tracked_retrieval"].sample(20, 30, seeded())
    for row, asked in zip(tokens.tolist(), classes.tolist(), strict=True):
        places = row[:5]
        for move in row[5:-1]:
            letter = S5.elements[S5.moving_at_most(2)[move - VALUES - 5]]
            moved = list(places)
            for i in range(5):
                moved[letter[i]] = places[i]
            places = moved
        assert asked == [IGNORED] * 29 + [places[row[-1] - VALUES]]


@pytest.mark.parametrize("name", TASKS)
def test_rows_repeat_with_their_seed_and_guessing_gives_chance(name: str):
    task = TASKS[name]
    length = task.length(33)
    rows = 300 if name == "mod5_brackets" else 3000
    tokens, classes, _ = task.sample(rows, length, seeded(1))
    again, _, _ = task.sample(rows, length, seeded(1))
    other, _, _ = task.sample(rows, length, seeded(2))
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, other)
    assert int(tokens.max()) < task.tokens
    assert int(classes.max()) < task.classes <= task.vocabulary
    where = torch.where(classes != IGNORED, torch.arange(length), -1).amax(1, keepdim=True)
    counts = torch.bincount(classes.gather(1, where).flatten(), minlength=task.classes)
    assert int(counts.sum()) == rows
    # The likeliest answer of many classes is above its expectation; four standard deviations are not.
    bound = 4 * (task.chance * (1 - task.chance) / rows) ** 0.5
    assert abs(counts.max() / rows - task.chance) < bound


def test_tests_draw_rows_that_training_cannot():
    """A generator knows 32 bits of its seed: those of training end where those of tests begin."""
    seeds = [
        measure.held_out_generator(purpose, name, length, seed).initial_seed()
        for purpose in ("last state", "reads", "stream")
        for name in ("parity", "s5")
        for length in (40, 256)
        for seed in range(3)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(measure.HELD_OUT <= seed < 2**32 for seed in seeds)
    run = TrackingRun("parity", dataclasses.replace(small(), vocab_size=2), OPTIM, seed=213)
    assert STRIDE * (run.seed + 1) <= measure.HELD_OUT
    with pytest.raises(ValueError, match="seeds go from 0 to 213"):
        dataclasses.replace(run, seed=214)


def test_lengths_that_a_format_lacks():
    assert [TASKS["mod5"].length(40), TASKS["mod5"].length(63), TASKS["flip_flop"].length(41)] == [39, 63, 40]
    with pytest.raises(ValueError, match="mod5 has no sequences of 40 tokens; take 1 plus a multiple of 2"):
        TASKS["mod5"].sample(1, 40, seeded())


# --- exact passes --------------------------------------------------------------------------------------------------


def small(**changes: object) -> ModelConfig:
    base = {"depth": 2, "width": 16, "heads": 2, "vocab_size": 7, "context": 64, "window_pattern": "S", "window": 5}
    return ModelConfig(**{**base, **changes})  # type: ignore[arg-type]


def awake(config: ModelConfig, seed: int = 0) -> LatentRecurrentTransformer:
    """In float64, with every parameter at work: none at zero."""
    torch.manual_seed(seed)
    model = LatentRecurrentTransformer(config).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


VARIANTS = {
    "default": small(),
    "layerwise, two sources": small(memory=MemoryConfig(projection="layerwise", source=(1, 2), combine="channels")),
    "summed, some layers": small(memory=MemoryConfig(source=(1, 2), layers=(2,), injection="residual")),
    "grouped heads, value embeddings": small(kv_heads=1, value_embeddings="all", window=9),
    "window of one": small(window=1, memory=MemoryConfig(source=1)),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("schedule", ["sequential()", "sequential(3)"])
def test_chunks_are_sequential_passes(name: str, schedule: str):
    model = awake(VARIANTS[name])
    tokens = torch.randint(7, (3, 21), generator=seeded())
    asked = torch.randint(7, (3, 21), generator=seeded(1))
    asked[:, ::3] = IGNORED
    backprop = 3 if "3" in schedule else None
    expected = refine(model, tokens, schedules.parse(schedule)).hidden
    chunked = unrolled.over(model, tokens, backprop)
    assert (chunked - expected).abs().max() < 1e-10
    weight = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((hidden * weight).sum(), list(model.parameters()), allow_unused=True)
        for hidden in (expected, chunked)
    ]
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() < 1e-10 * max(1.0, float(a.abs().max()))


def test_the_fast_loss_is_the_loss_of_the_step():
    model = awake(small())
    tokens, classes, _ = TASKS["mod5"].sample(4, 21, seeded())
    config = dataclasses.replace(small(), vocab_size=8)
    model = awake(config)
    fast, final = step_loss(model, tokens, classes, schedules.sequential())
    hidden = refine(model, tokens, schedules.sequential()).hidden
    plain = torch.nn.functional.cross_entropy(
        model.logits(hidden).flatten(0, 1), classes.flatten(), ignore_index=IGNORED
    )
    assert fast.item() == pytest.approx(plain.item(), abs=1e-10)
    assert final == fast.item()


def test_mastery_is_that_of_the_last_pass():
    model = awake(dataclasses.replace(small(), vocab_size=8))
    tokens, classes, _ = TASKS["mod5"].sample(4, 21, seeded())
    schedule = schedules.multi_refinement(2)
    loss, final = step_loss(model, tokens, classes, schedule)
    nats = [
        torch.nn.functional.cross_entropy(model.logits(h).flatten(0, 1), classes.flatten(), ignore_index=IGNORED)
        for _, _, h in refine(model, tokens, schedule).passes
    ]
    assert final == pytest.approx(nats[-1].item(), abs=1e-10)
    assert loss.item() == pytest.approx(sum(n.item() for n in nats) / 3, abs=1e-10)


def test_a_carry_is_constant_in_size_and_can_be_carried_on():
    model = awake(small())
    tokens = torch.randint(7, (2, 60), generator=seeded())
    whole = unrolled.over(model, tokens)
    carry, hidden = unrolled.empty_carry(model, 2), []
    for part in tokens.split([1, 7, 20, 32], 1):
        out, carry = unrolled.run_chunks(model, part, carry)
        hidden.append(out)
    assert (torch.cat(hidden, 1) - whole).abs().max() < 1e-10
    assert [k.shape[2] for k in carry.keys] == [4, 4]
    assert carry.position == 60


def test_models_that_chunks_do_not_cover_say_why():
    for config, words in (
        (small(memory=MemoryConfig(source=0)), "sources >= 1"),
        (small(memory=MemoryConfig(delay=2)), "delay 1"),
        (small(memory=MemoryConfig(injection="none")), "sources"),
        (small(window_pattern="SL"), "slide"),
        (small(window=10), "at most 9"),
    ):
        with pytest.raises(ValueError, match=words):
            unrolled.over(LatentRecurrentTransformer(config), torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="memory reader is replaced"):
        unrolled.over(ablate(awake(small()), "zero"), torch.zeros(1, 2, dtype=torch.long))


REACH = {
    "plain()": (1, 6),
    "interleaved(2)": (2, 16),
    "multi_refinement(1)": (2, 13),
    "multi_refinement(3)": (4, 27),
    "settled(1, 1, 1)": (3, 20),
    "settled(1, 8, 1)": (16, 22),
    "strided(8, 2)": (16, 15),
    "strided(16, 2)": (32, 31),
}
"""docs/state-tracking.md: positions that are exact from the start of a row; how far a changed token is felt at most."""


@pytest.mark.parametrize("schedule", REACH)
@torch.no_grad()
def test_how_far_a_schedule_carries_a_state(schedule: str):
    """At 2 layers and a window of 4, where attention alone carries 2 · 3 positions per pass."""
    model = awake(small(window=4))
    tokens = torch.randint(7, (1, 60), generator=seeded())

    def hidden(tokens: torch.Tensor, schedule: str) -> torch.Tensor:
        return refine(model, tokens, schedules.parse(schedule)).hidden[0]

    base = hidden(tokens, schedule)
    right = (base - hidden(tokens, "sequential()")).abs().amax(-1) < 1e-10
    reach = []
    for position in range(20):
        other = tokens.clone()
        other[0, position] = (other[0, position] + 1) % 7
        reach.append(int(((hidden(other, schedule) - base).abs().amax(-1) > 1e-13).nonzero().max()) - position)
    assert (int(right.long().cumprod(0).sum()), max(reach)) == REACH[schedule]


def test_truncation_cuts_the_memory_and_not_the_window():
    """`sequential(b)` cuts the memory's gradient; keys and values in the window keep theirs, here as in `refine`."""
    model = awake(small(window=4))
    tokens = torch.randint(7, (1, 24), generator=seeded())

    def gradient_norm(schedule: str) -> float:
        """Of a number of the last hidden state (its norm is the same always) by the first token's embedding."""
        model.zero_grad()
        embedded: list[torch.Tensor] = []
        hook = model.embedding.register_forward_hook(lambda *a: embedded.append(a[-1].requires_grad_()))
        out = refine(model, tokens, schedules.parse(schedule)).hidden[0, -1, 0]
        hook.remove()
        (gradient, *_) = torch.autograd.grad(out, embedded, allow_unused=True)
        return 0.0 if gradient is None else float(gradient[:, 0].norm())

    whole, cut = gradient_norm("sequential()"), gradient_norm("sequential(1)")
    assert whole > 0
    assert cut == 0  # 2 layers and a window of 4 reach back 6 positions, and no further
    assert 0 < gradient_norm("sequential(8)") < whole


# --- training and scores -------------------------------------------------------------------------------------------

OPTIM = OptimConfig(matrix_lr=0.02, embedding_lr=0.05, head_lr=0.01, scalar_lr=0.02, momentum_steps=100, clip=1.0)


def test_parity_is_learned_and_carried_on():
    """The whole point, in a few seconds: trained on at most 16 bits, right at 100."""
    model = ModelConfig(
        depth=1, width=32, heads=1, vocab_size=2, context=64, window_pattern="S", window=4, mlp_ratio=2.0
    )
    run = TrackingRun("parity", model, OPTIM, steps=120, rows=64, longest=16)
    done = train_tracking(run)
    assert list(done.grown) == run.lengths() == [2, 4, 6, 8, 10, 12, 14, 16]
    starts = [*done.grown.values(), 120]
    assert done.tokens == 64 * sum(n * (b - a) for n, a, b in zip(done.grown, starts[:-1], starts[1:], strict=True))
    assert measure.score_last_state(done.model, TASKS["parity"], 100, rows=200).accuracy > 0.99
    # A run's first steps do not depend on how many follow; not so the rates.
    assert train_tracking(dataclasses.replace(run, steps=3)).losses[0] == done.losses[0]


def test_lengths_grow():
    run = TrackingRun("mod5", dataclasses.replace(small(), vocab_size=8), OPTIM, shortest=1, longest=40, by=13)
    assert run.lengths() == [1, 13, 27, 39]
    with pytest.raises(ValueError, match="unknown task"):
        dataclasses.replace(run, task="mod7")
    with pytest.raises(ValueError, match="lengths must not fall"):
        dataclasses.replace(run, shortest=41)


def test_scores_count():
    answers = torch.tensor([[1, 0, 1], [0, 0, 0]])
    classes = torch.tensor([[1, 1, 1], [0, 1, IGNORED]])
    assert measure.count_last(answers, classes) == measure.Answers(2, 1)  # row 1 is asked last at position 1
    assert measure.count_all(answers, classes) == measure.Answers(5, 3)
    assert measure.count_all(answers, classes).errors == 2


# --- streams -------------------------------------------------------------------------------------------------------

FAR = 1_000_000


def test_a_million_positions_on_nothing_has_changed():
    """Attention sees distances only, so that rows at a million positions give what they give at 0, also in float32."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        model = awake(small()).to(dtype)
        tokens = torch.randint(7, (2, 30), generator=seeded())
        near, _ = unrolled.run_chunks(model, tokens, unrolled.empty_carry(model, 2))
        far, _ = unrolled.run_chunks(model, tokens, dataclasses.replace(unrolled.empty_carry(model, 2), position=FAR))
        assert (near - far).abs().max() < tolerance


def test_rotary_angles_are_exact_at_a_million_positions():
    """Against angles of 50 decimal digits; float32 angles would be wrong by up to 0.03 there."""
    places = [FAR, FAR + 1, 3 * FAR + 7]
    cos, sin = rotary(torch.tensor(places), 8, 10000.0, torch.zeros((), dtype=torch.float64))
    with localcontext() as context:
        context.prec = 50
        turn = 2 * Decimal("3.14159265358979323846264338327950288419716939937510")
        for n, place in enumerate(places):
            for i in range(4):
                angle = float(Decimal(place) * Decimal(10000) ** (-Decimal(2 * i) / 8) % turn)
                assert cos[n, 0, i].item() == pytest.approx(math.cos(angle), abs=1e-9)
                assert sin[n, 0, i].item() == pytest.approx(math.sin(angle), abs=1e-9)


def test_reused_slots_give_what_a_carry_gives():
    """Where every layer slides, a State of a few slots serves an endless stream (contract, section 2)."""
    model = awake(small())
    tokens = torch.randint(7, (2, 25), generator=seeded())
    state, hidden = model.empty_state(2, model.config.lookback + 1).in_place(), []
    with torch.no_grad():
        for t in range(25):
            out, state = model(tokens[:, t : t + 1], range(FAR + t, FAR + t + 1), state)
            hidden.append(out)
        carry = dataclasses.replace(unrolled.empty_carry(model, 2), position=FAR)
        assert (torch.cat(hidden, 1) - unrolled.run_chunks(model, tokens, carry)[0]).abs().max() < 1e-9
    assert state.slots == 5


def test_streams_are_counted_in_parts():
    model = awake(dataclasses.replace(small(), vocab_size=2))
    tokens, classes, _ = TASKS["parity"].sample(2, 50, seeded())
    answers = measure.stream_answers(model, tokens, classes, parts=4)
    assert [part.asked for part in answers.parts] == [26, 26, 26, 22]
    assert answers.carried == 16 + 2 * 2 * 4 * 16  # the memory; keys and values of 4 positions in 2 layers
    expected = measure.count_all(measure.live_answers(model, tokens), classes)
    assert sum(part.right for part in answers.parts) == expected.right


@pytest.mark.slow
def test_compiled_chunks_are_chunks():
    model = awake(small(depth=1, window=3))
    tokens = torch.randint(7, (3, 24), generator=seeded())
    with torch.no_grad():
        compiled = unrolled.over(model, tokens, execution=Execution("always"))
        assert (compiled - unrolled.over(model, tokens)).abs().max() < 1e-10
