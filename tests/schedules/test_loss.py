"""Nats: the fused head equals the plain one and stays small; a step's loss is the contract's formula.

B batch, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.models import TOLERANCE, VISIBLE, assert_same, difference, random_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lrt import MemoryConfig, ModelConfig, refine, schedules
from lrt.data.batch import IGNORED
from lrt.model.cross_entropy import ROWS, LinearCrossEntropy, summed_nats, summed_nats_reference, token_nats
from lrt.model.execution import EAGER
from lrt.schedules.base import Pass, Passes
from lrt.schedules.loss import StepLoss

V, D, T = 23, 12, 8
CONFIG = ModelConfig(depth=2, width=D, heads=2, vocab_size=V, context=16, mlp_width=20, memory=MemoryConfig())


def rows(n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden states (n, D), large enough that the soft-cap bends, and targets (n,) of which a quarter is ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 4 * torch.randn(n, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < 0.25] = IGNORED
    return hidden.to(dtype).requires_grad_(), targets


def value_and_gradients(model: Any, nats: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return nats, *torch.autograd.grad(1.7 * nats, [hidden, model.head.weight])


# The fused head


@pytest.mark.parametrize("n", [1, 7, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_fused_head_equals_the_plain_one(n: int, dtype: torch.dtype):
    model = random_model(CONFIG, dtype)
    hidden, targets = rows(n, dtype)
    targets[0] = 3  # at least one valid
    expected = value_and_gradients(model, summed_nats_reference(model, hidden, targets), hidden)
    for actual, wanted in zip(
        value_and_gradients(model, summed_nats(model, hidden, targets), hidden), expected, strict=True
    ):
        assert_same(actual, wanted)


def test_the_plain_head_is_the_specification():
    model = random_model(CONFIG)
    hidden, targets = rows(40)
    logits = 15 * torch.tanh(hidden @ model.head.weight.T / 15)
    assert float(logits.detach().abs().max()) > 7.5  # the cap is felt
    nats = torch.stack([-logits[i].log_softmax(0)[t] for i, t in enumerate(targets.tolist()) if t != IGNORED]).sum()
    assert_same(summed_nats_reference(model, hidden, targets), nats)
    assert_same(summed_nats(model, hidden, targets), nats)


def test_the_fused_head_passes_the_gradient_check():
    hidden, targets = rows(9)
    head = random_model(CONFIG).head.weight.detach().clone().requires_grad_()
    weights = (targets != IGNORED) * torch.linspace(0.5, 2, 9, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: LinearCrossEntropy.apply(h, w, targets, weights, 15.0, EAGER), (hidden, head)
    )


def test_ignored_rows_have_no_gradient_and_all_ignored_is_0():
    model = random_model(CONFIG)
    hidden, targets = rows(30)
    _, d_hidden, _ = value_and_gradients(model, summed_nats(model, hidden, targets), hidden)
    assert not d_hidden[targets == IGNORED].any()
    assert d_hidden[targets != IGNORED].any(dim=1).all()
    nothing = torch.full_like(targets, IGNORED)
    for tensor in value_and_gradients(model, summed_nats(model, hidden, nothing), hidden):
        assert not tensor.any()


def test_shapes_do_not_matter():
    model = random_model(CONFIG)
    hidden, targets = rows(24)
    folded = hidden.view(4, 6, D).transpose(0, 1)  # not contiguous
    assert_same(
        summed_nats(model, folded, targets.view(4, 6).transpose(0, 1)), summed_nats(model, hidden, targets), "folded"
    )


def test_in_bfloat16_the_heads_gradient_is_summed_in_float32():
    """Over 16 blocks of rows; a sum kept in bfloat16 would round 16 times what is rounded once here."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(16 * ROWS, 8, generator=generator, dtype=torch.float64).bfloat16()
    head = torch.randn(19, 8, generator=generator, dtype=torch.float64).bfloat16()
    wanted = torch.randint(0, 19, (16 * ROWS,), generator=generator)
    ones, grads = torch.ones(16 * ROWS), list[Tensor]()
    for dtype in (torch.bfloat16, torch.float64):
        weight = head.detach().to(dtype, copy=True).requires_grad_()
        nats: Tensor = LinearCrossEntropy.apply(hidden.to(dtype), weight, wanted, ones, 15.0, EAGER)  # type: ignore[assignment]
        (nats / 12345).backward()
        assert weight.grad is not None
        assert weight.grad.dtype == dtype
        grads.append(weight.grad.double())
    assert difference(grads[0], grads[1]) < 0.004  # bfloat16 itself: 2^-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fused_head_is_the_same_within_somebodys_autocast(dtype: torch.dtype):
    """Also where autocast made the hidden states bfloat16 and left the head in float32."""
    model = random_model(CONFIG, torch.float32)
    hidden, targets = rows(40, dtype)
    expected = value_and_gradients(model, summed_nats(model, hidden, targets), hidden)
    with torch.autocast("cpu", torch.bfloat16):
        total = summed_nats(model, hidden, targets)
    for actual, right in zip(value_and_gradients(model, total, hidden), expected, strict=True):
        assert actual.dtype == right.dtype
        assert torch.equal(actual, right)


def test_an_adapted_heads_nats_are_float32_under_bfloat16():
    model = random_model(CONFIG, torch.bfloat16)
    model.head = nn.Sequential(model.head)  # as an adapter would stand around it
    hidden, targets = rows(40, torch.bfloat16)
    logits = model.logits(hidden).float()
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    assert_same(summed_nats(model, hidden, targets), expected)


def test_without_gradients_the_value_is_the_same():
    model = random_model(CONFIG)
    hidden, targets = rows(50)
    with torch.no_grad():
        assert_same(summed_nats(model, hidden, targets), summed_nats_reference(model, hidden, targets))
    frozen = hidden.detach()
    actual, expected = (
        torch.autograd.grad(nats(model, frozen, targets), model.head.weight)[0]  # a pass without gradient, with a loss
        for nats in (summed_nats, summed_nats_reference)
    )
    assert_same(actual, expected)


class Largest(TorchDispatchMode):
    """Records the largest number of elements of any tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_logits_never_exist_for_more_than_a_block_of_rows():
    model = random_model(CONFIG)
    n = 4 * ROWS
    hidden, targets = rows(n)

    def largest(nats: Callable[..., Tensor]) -> int:
        with Largest() as seen:
            torch.autograd.grad(nats(model, hidden, targets).sum(), [hidden, model.head.weight], allow_unused=True)
        return seen.elements

    assert n * D <= largest(summed_nats) < n * V  # the gradient of `hidden` is the largest there is
    assert largest(summed_nats_reference) >= n * V  # the recorder sees what it should
    with torch.no_grad(), Largest() as seen:
        token_nats(model, hidden, targets)
    assert seen.elements <= max(n * D, ROWS * V)


def test_token_nats_of_every_target_and_0_where_ignored():
    model = random_model(CONFIG)
    hidden, targets = rows(ROWS + 200)
    with torch.no_grad():
        nats = token_nats(model, hidden.view(2, -1, D), targets.view(2, -1))
        expected = F.cross_entropy(model.logits(hidden), targets.clamp(min=0), reduction="none")
    assert nats.shape == (2, (ROWS + 200) // 2)
    assert not nats.flatten()[targets == IGNORED].any()
    assert_same(nats.flatten()[targets != IGNORED], expected[targets != IGNORED])
    assert_same(nats.sum(), summed_nats(model, hidden, targets))


def test_half_precision_is_scored_in_single():
    model = random_model(CONFIG, torch.bfloat16)
    hidden, targets = rows(20, torch.bfloat16)
    with torch.no_grad():
        assert token_nats(model, hidden, targets).dtype == torch.float32
    assert summed_nats(model, hidden, targets).dtype == torch.float32


# The loss of a step


def batch(rows: int = 4, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Tokens and targets (rows, T); rows are valid to very different lengths, so that every pass counts differently."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(V, (rows, T), generator=generator) for _ in range(2))
    for row in range(rows):
        targets[row, T - 2 * row :] = IGNORED
        targets[row, 1] = IGNORED
    return tokens, targets


def by_hand(model: Any, tokens: Tensor, targets: Tensor, schedule: Any) -> Tensor:
    """L = Σ_p w_p · (N_p / n_p) / Σ_p w_p, passes without weight or targets left out."""
    top, bottom = torch.zeros((), dtype=torch.float64), 0.0
    for p, positions, hidden in refine(model, tokens, schedule).passes:
        wanted = targets[:, positions]
        n = int((wanted != IGNORED).sum())
        if p.loss_weight and n:
            top = top + p.loss_weight * summed_nats_reference(model, hidden, wanted) / n
            bottom += p.loss_weight
    return top / bottom


def step(model: Any, schedule: Any, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step over micro-batches, and every parameter's gradient."""
    step_loss = StepLoss.of(schedule, [targets for _, targets in parts])
    shares = [step_loss(model, tokens, targets, None) for tokens, targets in parts]
    return torch.stack(shares).sum(), collected(model, torch.stack(shares).sum())


def collected(model: Any, loss: Tensor) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    return {n: torch.zeros_like(w) if g is None else g for n, w, g in zip(names, weights, grads, strict=True)}


WEIGHTED = [
    schedules.plain(),
    schedules.multi_refinement(2, (0.5, 1, 3)),
    schedules.multi_refinement(2, (0, 1, 0.25)),
    schedules.interleaved(2),
    schedules.interleaved(3, (1, 2, 0, 4)),
    schedules.chunked(3),
    schedules.settled(1, 2, 1),
    schedules.sequential(),
]
every_weighting = pytest.mark.parametrize("schedule", WEIGHTED, ids=repr)


@every_weighting
def test_the_loss_is_the_formula_of_the_contract(schedule: Any):
    model, (tokens, targets) = random_model(CONFIG), batch()
    loss, gradients = step(model, schedule, [(tokens, targets)])
    expected = by_hand(model, tokens, targets, schedule)
    assert_same(loss, expected)
    for name, wanted in collected(model, expected).items():
        assert float((gradients[name] - wanted).norm()) <= TOLERANCE[torch.float64] * max(1.0, float(wanted.norm())), (
            name
        )


def test_the_formula_is_neither_a_mean_over_targets_nor_over_passes():
    model, (tokens, targets) = random_model(CONFIG), batch()
    schedule = schedules.interleaved(2, (1, 1, 4))
    nats, counts, weights = [], [], []
    for p, positions, hidden in refine(model, tokens, schedule).passes:
        nats.append(summed_nats_reference(model, hidden, targets[:, positions]).item())
        counts.append(int((targets[:, positions] != IGNORED).sum()))
        weights.append(p.loss_weight)
    assert len({counts[1], counts[2]}) == 2  # unequal
    loss = step(model, schedule, [(tokens, targets)])[0].detach()
    assert float(loss) == pytest.approx(sum(w * n / c for w, n, c in zip(weights, nats, counts, strict=True)) / 6)
    for other in (
        sum(nats) / sum(counts),
        sum(n / c for n, c in zip(nats, counts, strict=True)) / 3,
        sum(w * n for w, n in zip(weights, nats, strict=True))
        / sum(w * c for w, c in zip(weights, counts, strict=True)),
    ):
        assert abs(float(loss) - other) > VISIBLE


@every_weighting
@pytest.mark.parametrize("cuts", [(2,), (1,), (3,), (1, 3)], ids=str)
def test_micro_batches_of_unequal_filling_count_as_one_batch(schedule: Any, cuts: tuple[int, ...]):
    model, (tokens, targets) = random_model(CONFIG), batch()
    borders = [0, *cuts, len(tokens)]
    parts = [(tokens[a:b], targets[a:b]) for a, b in itertools.pairwise(borders)]
    whole, expected = step(model, schedule, [(tokens, targets)])
    loss, gradients = step(model, schedule, parts)
    assert_same(loss, whole)
    scale = max(float(g.norm()) for g in expected.values())
    for name, wanted in expected.items():
        assert float((gradients[name] - wanted).norm()) <= TOLERANCE[torch.float64] * scale, name
    # The mean of the parts' own losses is something else.
    alone = torch.stack([step(model, schedule, [part])[0] for part in parts]).mean()
    assert difference(alone.detach(), whole.detach()) > VISIBLE


def test_a_micro_batch_without_targets_adds_nothing():
    model, (tokens, targets) = random_model(CONFIG), batch()
    empty = torch.full_like(targets, IGNORED)
    schedule = schedules.interleaved(2)
    whole, expected = step(model, schedule, [(tokens, targets)])
    loss, gradients = step(model, schedule, [(tokens, empty), (tokens, targets)])
    assert_same(loss, whole)
    assert_same(gradients["head.weight"], expected["head.weight"])


def test_documents_reach_the_model():
    model, (tokens, targets) = random_model(CONFIG), batch()
    documents = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]).expand(4, -1)
    step_loss = StepLoss.of(schedules.plain(), [targets])
    hidden = refine(model, tokens, schedules.plain(), documents).hidden
    n = int((targets != IGNORED).sum())
    assert_same(step_loss(model, tokens, targets, documents), summed_nats_reference(model, hidden, targets) / n)
    loss, without = (step_loss(model, tokens, targets, numbers).item() for numbers in (documents, None))
    assert abs(loss - without) > VISIBLE


class Matrices(TorchDispatchMode):
    """Counts the rows of matrix products with the head, forward only."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and args[1].shape == (D, V):
            self.rows += len(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("schedule", "rows"),
    [
        (schedules.plain(), 4 * T),
        (schedules.settled(2, 2, 1), 4 * T),
        (schedules.multi_refinement(3, (0, 0, 1, 0)), 4 * T),
        (schedules.interleaved(2, (0, 0, 1)), 4 * T // 2),
        (schedules.interleaved(2), 8 * T),
    ],
    ids=repr,
)
def test_passes_without_weight_never_run_the_head(schedule: Any, rows: int):
    model, (tokens, targets) = random_model(CONFIG), batch()
    step_loss = StepLoss.of(schedule, [targets])
    with Matrices() as seen:
        step_loss(model, tokens, targets, None)
    assert seen.rows == rows


@dataclass(frozen=True)
class Given:
    """A schedule that is just its passes."""

    listed: Passes

    def passes(self, length: int) -> Passes:
        return self.listed

    def draw(self) -> Given:
        return self


def test_passes_without_targets_drop_out_of_both_sums():
    model, (tokens, targets) = random_model(CONFIG), batch()
    targets[:, 4:] = IGNORED
    schedule = Given((Pass(0, 4, 1, 1.0), Pass(4, 8, 1, 100.0)))
    loss, _ = step(model, schedule, [(tokens, targets)])
    first = refine(model, tokens[:, :4], schedules.plain()).hidden
    assert_same(loss, summed_nats_reference(model, first, targets[:, :4]) / int((targets != IGNORED).sum()))


def test_a_step_without_any_target_is_an_error():
    empty = torch.full((2, T), IGNORED)
    for schedule in (schedules.plain(), schedules.settled(0, 1, 1)):
        with pytest.raises(ValueError, match="no pass with a loss weight has a valid target"):
            StepLoss.of(schedule, [empty, empty])
    some = empty.clone()
    some[0, 1] = 2  # only the odd positions have targets, only the even ones a weight
    with pytest.raises(ValueError, match="no pass with a loss weight has a valid target"):
        StepLoss.of(schedules.interleaved(2, (0, 1, 0)), [some])
