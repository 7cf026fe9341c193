"""A checkpoint as nanochat publishes it."""

import json
from pathlib import Path

import torch
from torch import Tensor

DEPTH, HEADS, GROUPS, SIZE, CONTEXT = 3, 4, 2, 12, 12
WIDTH = HEADS * SIZE


def published(kind: str, vocab: int, channels: int = WIDTH, layers: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """A random state dict as nanochat (`first`, `embeddings`) or the authors' LRT (`recurrent`) write it."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.25

    padded = -(-vocab // 64) * 64 if kind != "first" else vocab
    kv = GROUPS * SIZE
    weights = {"transformer.wte.weight": random(padded, WIDTH), "lm_head.weight": random(padded, WIDTH)}
    for i in range(DEPTH):
        block = f"transformer.h.{i}."
        for name, rows in (("c_q", WIDTH), ("c_k", kv), ("c_v", kv), ("c_proj", WIDTH)):
            weights[f"{block}attn.{name}.weight"] = random(rows, WIDTH)
        weights[f"{block}mlp.c_fc.weight"] = random(4 * WIDTH, WIDTH)
        weights[f"{block}mlp.c_proj.weight"] = random(WIDTH, 4 * WIDTH)
    if kind == "first":
        return weights
    weights["resid_lambdas"], weights["x0_lambdas"] = 1 + random(DEPTH), random(DEPTH)
    for i in range(DEPTH):
        if kind == "recurrent":
            weights[f"transformer.h.{i}.attn.triple_gate.weight"] = random(3 * GROUPS, channels)
            weights[f"interleaved_projections.{i}.W_v.weight"] = random(kv, WIDTH)
            weights[f"interleaved_key_projections.{i}.W_v.weight"] = random(kv, WIDTH)
            weights[f"interleaved_init_value_embeds.{i}.weight"] = random(padded, kv)
        elif i in layers:
            weights[f"transformer.h.{i}.attn.ve_gate.weight"] = random(GROUPS, channels)
            weights[f"value_embeds.{i}.weight"] = random(padded, kv)
    if kind == "recurrent":
        weights["interleaved_lambdas"] = random(DEPTH)
    return weights


def write(folder: Path, weights: dict[str, Tensor], vocab: int, step: int = 7, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / f"model_{step:06d}.pt")
    meta = {
        "step": step,
        "model_config": {
            "sequence_len": CONTEXT, "vocab_size": vocab, "n_layer": DEPTH, "n_head": HEADS, "n_kv_head": GROUPS,
            "n_embd": WIDTH, **config,
        },
    }  # fmt: skip
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    return folder


RECURRENT = {"use_interleaved": True, "interleaved_num_passes": 3, "window_pattern": "SL"}
