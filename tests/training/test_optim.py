"""Every parameter has one optimiser; Muon is torch's, per logical matrix; rates follow their lines."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from support.models import PAIRWISE, assert_same, difference
from torch import Tensor, nn

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig
from lrt.training.optim import TABLE, Muon, Optimiser, newton_schulz, place
from lrt.training.optim_config import OptimConfig

# torch.optim.Muon runs Newton-Schulz in bfloat16, 8 bits: five iterations of a quintic amplify 2^-9 to about 1 %
# of the update's norm. The mistakes below change it by far more.
BFLOAT16 = 0.02

# Placing

MEMORIES = {
    f"{injection}-{projection}-{source}-{combine}": MemoryConfig(
        injection=injection, projection=projection, source=source, combine=combine
    )
    for injection in ("none", "residual", "key_value", "both")
    for projection in ("shared", "layerwise")
    for source, combine in ((None, "sum"), (0, "sum"), ((0, 2), "sum"), ((0, 1, 2), "channels"))
}


def tiny(**fields: Any) -> ModelConfig:
    return ModelConfig(**{"depth": 2, "width": 12, "heads": 2, "vocab_size": 31, "context": 16, **fields})


@pytest.mark.parametrize("value_embeddings", ["none", "alternate", "all"])
@pytest.mark.parametrize("memory", MEMORIES.values(), ids=list(MEMORIES))
def test_every_parameter_is_placed_once(memory: MemoryConfig, value_embeddings: Any):
    model = LatentRecurrentTransformer(tiny(memory=memory, value_embeddings=value_embeddings))
    placed = [p for _, parameters in place(model) for p in parameters]
    assert len(placed) == len({id(p) for p in placed})
    assert {id(p) for p in placed} == {id(p) for p in model.parameters()}
    optimiser = Optimiser(model, 12, 64, 10, OptimConfig())
    held = [p for part in optimiser.parts for group in part.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))


def placement(model: nn.Module) -> dict[str, tuple[str, str, float]]:
    """Parameter name -> (optimiser, rate, factor)."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (row.optimiser, row.rate, row.factor) for row, parameters in place(model) for p in parameters}


def test_what_goes_where():
    memory = MemoryConfig(injection="both", source=(0, 1), combine="sum")
    rows = placement(LatentRecurrentTransformer(tiny(depth=1, value_embeddings="all", memory=memory)))
    muon, block = ("muon", "matrix_lr", 1.0), "blocks.0."
    assert rows == {
        "embedding.weight": ("adamw", "embedding_lr", 1.0),
        "head.weight": ("adamw", "head_lr", 1.0),
        "recall.weights": ("adamw", "scalar_lr", 1.0),
        "projection.weight": muon,
        block + "alpha": ("adamw", "scalar_lr", 0.01),
        block + "beta": ("adamw", "scalar_lr", 1.0),
        block + "injection.gamma": ("adamw", "scalar_lr", 1.0),
        block + "injection.gate.weight": muon,
        block + "attention.query.weight": muon,
        block + "attention.key.weight": muon,
        block + "attention.value.weight": muon,
        block + "attention.out.weight": muon,
        block + "attention.value_embedding.table.weight": ("adamw", "embedding_lr", 1.0),
        block + "attention.value_embedding.gate.weight": muon,
        block + "mlp.up.weight": muon,
        block + "mlp.down.weight": muon,
    }


def test_every_row_of_the_table_is_used():
    used = {row for config in PAIRWISE.values() for row, _ in place(LatentRecurrentTransformer(config))}
    assert used == set(TABLE)


def test_a_parameter_without_a_row_is_an_error_that_says_so():
    model = LatentRecurrentTransformer(tiny())
    model.blocks[1].mlp.temperature = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.temperature matches no row of lrt\.training\.optim\.TABLE"):
        place(model)
    with pytest.raises(ValueError, match="matches no row"):
        Optimiser(model, 12, 64, 10, OptimConfig())


def test_a_parameter_of_two_rows_is_an_error_that_names_both(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lrt.training.optim.TABLE", (*TABLE, TABLE[3].__class__(r"\.up\.weight$", "adamw", "head_lr")))
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.up\.weight matches \[.*query.*up.*must match one"):
        place(LatentRecurrentTransformer(tiny()))


# Muon

SHAPES = {"tall": (40, 16), "wide": (16, 40), "square": (24, 24), "a row": (1, 12)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def quintic(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz by its definition, on the singular values: σ -> aσ + bσ³ + cσ⁵, from σ / ‖matrix‖."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ v


@every_shape
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_newton_schulz_is_the_quintic_iteration(shape: tuple[int, int], scale: float):
    matrices = scale * noise(3, *shape)
    expected = torch.stack([quintic(m) for m in matrices])
    assert_same(newton_schulz(matrices), expected)
    assert_same(newton_schulz(matrices.float()), expected)


@every_shape
def test_newton_schulz_makes_singular_values_near_1(shape: tuple[int, int]):
    values = torch.linalg.svdvals(newton_schulz(noise(2, *shape)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_newton_schulz_of_nothing_is_nothing_and_of_half_precision_is_exact_inside():
    assert not newton_schulz(torch.zeros(2, 4, 3)).any()
    half = noise(1, 8, 5).bfloat16()
    assert newton_schulz(half).dtype == torch.bfloat16
    assert torch.equal(newton_schulz(half), newton_schulz(half.float()).bfloat16())


def steps(make: Any, starts: list[Tensor], count: int = 6) -> list[Tensor]:
    """Parameters after `count` updates with the same random gradients."""
    parameters = [nn.Parameter(start.clone()) for start in starts]
    optimiser = make(parameters)
    for step in range(count):
        for i, p in enumerate(parameters):
            p.grad = noise(*p.shape, seed=100 * step + i).to(p.dtype)
        optimiser.step()
    return [p.detach() for p in parameters]


def moved(make: Any, shape: tuple[int, ...]) -> Tensor:
    """How far a parameter goes in six steps."""
    start = noise(*shape, seed=1, dtype=torch.float32)
    return steps(make, [start])[0] - start


@every_shape
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_muon_is_torchs(shape: tuple[int, int], weight_decay: float):
    settings: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": weight_decay}
    ours = moved(lambda p: Muon(p, **settings), shape)
    assert difference(ours, moved(lambda p: torch.optim.Muon(p, **settings), shape)) < BFLOAT16


def test_the_comparison_with_torch_would_notice_a_mistake():
    settings: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.05}
    ours = moved(lambda p: Muon(p, **settings), SHAPES["tall"])
    mistakes: list[dict[str, Any]] = [
        {"nesterov": False},
        {"momentum": 0.8},
        {"weight_decay": 0.0},
        {"ns_steps": 4},
        {"adjust_lr_fn": "match_rms_adamw"},
        {"lr": 0.05 / math.sqrt(40 / 16)},  # no growth with sqrt(rows / columns)
    ]
    for mistake in mistakes:
        other = moved(lambda p, mistake=mistake: torch.optim.Muon(p, **{**settings, **mistake}), SHAPES["tall"])
        assert difference(ours, other) > 5 * BFLOAT16, mistake


def test_a_step_is_the_formula():
    # Two steps in float64: Nesterov momentum, orthogonalisation, sqrt(rows / columns), decoupled decay.
    start, momentum, lr, decay = noise(9, 4, seed=1), 0.9, 0.05, 0.5
    p = nn.Parameter(start.clone())
    optimiser, buffer, expected = Muon([p], lr=lr, momentum=momentum, weight_decay=decay), torch.zeros(9, 4), start
    for seed in (2, 3):
        p.grad = noise(9, 4, seed=seed)
        buffer = momentum * buffer + (1 - momentum) * p.grad
        update = (1 - momentum) * p.grad + momentum * buffer
        expected = (1 - lr * decay) * expected - lr * math.sqrt(9 / 4) * quintic(update)
        optimiser.step()
    assert_same(p.detach(), expected)


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 3, 2, 5, 8)], ids=str)
def test_a_stack_moves_as_its_matrices_do_alone(shape: tuple[int, ...]):
    # As the memory projections are stored: (layers, channels, [k, v], G·K, D).
    stack = noise(*shape, seed=1)
    grads = [noise(*shape, seed=seed) for seed in (2, 3, 4)]

    def run(parameters: list[nn.Parameter], gradients: list[list[Tensor]]) -> None:
        optimiser = Muon(parameters, lr=0.05, weight_decay=0.1)
        for step in gradients:
            for p, g in zip(parameters, step, strict=True):
                p.grad = g.clone()
            optimiser.step()

    whole = nn.Parameter(stack.clone())
    run([whole], [[g] for g in grads])
    alone = [nn.Parameter(m.clone()) for m in stack.flatten(0, -3)]
    run(alone, [list(g.flatten(0, -3)) for g in grads])
    for actual, expected in zip(whole.detach().flatten(0, -3), alone, strict=True):
        assert_same(actual, expected.detach())
    flat = nn.Parameter(stack.flatten(0, -2).clone())  # one tall matrix instead: what must not happen
    run([flat], [[g.flatten(0, -2)] for g in grads])
    assert difference(flat.detach().view(shape), whole.detach()) > 0.01


def test_equal_shapes_are_orthogonalised_in_one_batch_and_keep_their_order(monkeypatch: pytest.MonkeyPatch):
    starts = [noise(*shape, seed=i) for i, shape in enumerate([(8, 5), (5, 8), (3, 8, 5), (8, 5)])]
    grads = [noise(*start.shape, seed=10 + i) for i, start in enumerate(starts)]
    batched: list[torch.Size] = []

    def counted(matrices: Tensor) -> Tensor:
        batched.append(matrices.shape)
        return newton_schulz(matrices)

    monkeypatch.setattr("lrt.training.optim.newton_schulz", counted)
    parameters = [nn.Parameter(start.clone()) for start in starts]
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g
    Muon(parameters, lr=1.0, momentum=0.0).step()
    assert sorted(batched) == [(1, 5, 8), (5, 8, 5)]
    for p, start, g in zip(parameters, starts, grads, strict=True):
        scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
        assert_same(start - p.detach(), scale * newton_schulz(g.view(-1, *g.shape[-2:])).view_as(g))


def test_a_parameter_without_a_gradient_stays():
    moving, still = nn.Parameter(noise(4, 3)), nn.Parameter(noise(4, 3))
    optimiser = Muon([moving, still], weight_decay=0.5)
    moving.grad = noise(4, 3, seed=5)
    optimiser.step()
    assert torch.equal(still, noise(4, 3))
    assert not torch.equal(moving, noise(4, 3))


# Rates


def make_optimiser(total: int = 100, **fields: Any) -> Optimiser:
    model = LatentRecurrentTransformer(tiny(memory=MemoryConfig(source=(0, 2))))
    return Optimiser(model, 12, 64, total, OptimConfig(**{"reference_batch": 64, **fields}))


@pytest.mark.parametrize(
    ("warmdown", "expected"),
    [
        (0.5, [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        (0.2, [1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5]),
        (1.0, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        (0.0, [1] * 10),
    ],
)
def test_rates_are_constant_then_fall_in_a_straight_line_to_0(warmdown: float, expected: list[float]):
    optimiser = make_optimiser(10, warmdown=warmdown)
    assert [optimiser.fraction(step) for step in range(10)] == pytest.approx(expected)
    assert optimiser.fraction(10) == (0 if warmdown else 1)


def rates(optimiser: Optimiser) -> list[float]:
    return [group["lr"] for part in optimiser.parts for group in part.param_groups]


def test_a_step_uses_and_returns_its_fraction_of_the_peak():
    optimiser = make_optimiser(10)
    peak = rates(optimiser)
    for step in range(10):
        assert optimiser.step(step) == pytest.approx(optimiser.fraction(step))
        assert rates(optimiser) == pytest.approx(
            [rate * optimiser.fraction(step) for rate in peak]
        )  # of the peak, not the last


def test_rates_scale_with_batch_and_width():
    model = LatentRecurrentTransformer(tiny(memory=MemoryConfig(source=(0, 2)), value_embeddings="all"))
    optimiser = Optimiser(
        model, 192, 4096, 10, OptimConfig(reference_batch=16384)
    )  # half the batch rate, twice the width's
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [group for part in optimiser.parts for group in part.param_groups]
    rate = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rate["blocks.0.mlp.up.weight"] == pytest.approx(0.02 / 2)
    assert rate["embedding.weight"] == pytest.approx(0.3 * 2 / 2)
    assert rate["blocks.0.attention.value_embedding.table.weight"] == pytest.approx(0.3 * 2 / 2)
    assert rate["head.weight"] == pytest.approx(0.004 * 2 / 2)
    assert rate["blocks.0.beta"] == rate["recall.weights"] == pytest.approx(0.5 / 2)
    assert rate["blocks.0.alpha"] == pytest.approx(0.5 / 2 / 100)


def test_momentum_rises_and_decay_falls_in_straight_lines():
    optimiser = make_optimiser(10, momentum=(0.8, 0.9), momentum_steps=4, weight_decay=0.2)
    momenta, decays = [], []
    for step in range(10):
        optimiser.step(step)
        momenta += [{group["momentum"] for group in optimiser.muon.param_groups}]
        decays += [{group["weight_decay"] for group in optimiser.muon.param_groups}]
        assert all(group["weight_decay"] == 0 for group in optimiser.adamw.param_groups)  # matrices only
    assert all(len(values) == 1 for values in itertools.chain(momenta, decays))
    expected = [0.8, 0.825, 0.85, 0.875, *[0.9] * 6]
    assert [v for values in momenta for v in values] == pytest.approx(expected)
    assert [v for values in decays for v in values] == pytest.approx([0.2 * (1 - step / 10) for step in range(10)])


def test_a_step_moves_every_parameter_and_forgets_the_gradients():
    model = LatentRecurrentTransformer(tiny(memory=MemoryConfig(source=(0, 2)), value_embeddings="all"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = Optimiser(model, 12, 64, 10, OptimConfig(reference_batch=64))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimiser.step(0)
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    assert all(p.grad is None for p in model.parameters())
