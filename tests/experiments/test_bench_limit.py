"""`lrt bench inference --only limit` counts every matrix of a token once, and names what it timed."""

from __future__ import annotations

import pytest
import torch

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig
from lrt.experiments.bench import decode, limit

CONFIG = ModelConfig(
    depth=2, width=96, heads=2, vocab_size=31, context=32, value_embeddings="all",
    memory=MemoryConfig(source=(0, 2), combine="channels", projection="layerwise"),
)  # fmt: skip


def test_every_matrix_is_there_once():
    model = LatentRecurrentTransformer(CONFIG)
    matrices = limit.weight_matrices(model)
    tables = [name for name, _ in model.named_parameters() if "embedding" in name and "gate" not in name]
    others = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and name not in tables)
    assert len(tables) == 3  # x_0's, and each layer's value embedding
    assert sum(matrix.numel() for matrix in matrices) == others
    assert (31, 96) in {tuple(matrix.shape) for matrix in matrices}  # the head
    assert sum(tuple(matrix.shape) == (96, 96) for matrix in matrices) >= 2 * (4 + 4)  # attention's, U_k and U_v


def test_products_are_those_of_all_rows(monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[torch.Size, torch.Size]] = []
    monkeypatch.setattr(limit, "STEPS", 3)
    for name in ("mv", "mm"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda a, b, plain=plain: calls.append((a.shape, b.shape)) or plain(a, b))
    matrices = [torch.ones(5, 4), torch.ones(2, 5)]
    limit.bare_products(matrices, 1)()
    limit.bare_products(matrices, 7)()
    assert calls == [((5, 4), (4,)), ((2, 5), (5,))] * 3 + [((7, 4), (4, 5)), ((7, 5), (5, 2))] * 3


def test_rows_of_the_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limit, "STREAM", 2**16)
    for module in (limit, decode):
        monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(limit, "has_engine", lambda model: False)
    rows = limit.limit_rows([LatentRecurrentTransformer(CONFIG).eval()], 1, ("fused",), progress=False)
    assert [row.name for row in rows] == [f"bare products / a token, 2 x 96 LRT, batch {b}" for b in (1, 8, 32)]
    assert [row.at_least for row in rows] == [0.5, None, None]
    for row in rows:
        assert set(row.figures) == {"token_ms", "products_ms", "generate_ms", "bandwidth_ms"}
        assert 0 < row.value == pytest.approx(row.figures["products_ms"] / row.figures["token_ms"])


def test_a_llama_of_as_many_parameters_decodes_in_ctranslate2(tmp_path):
    pytest.importorskip("ctranslate2")
    generate = limit.ctranslate2_generate(CONFIG, tmp_path)
    answers = generate(torch.zeros(2, 1, dtype=torch.long), 5)
    assert [len(answer.sequences_ids[0]) for answer in answers] == [5, 5]
