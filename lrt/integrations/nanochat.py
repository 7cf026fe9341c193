"""Import of nanochat checkpoints, and of the LRT that the paper's authors published on top of it.

They write model_NNNNNN.pt (a state dict) and meta_NNNNNN.json (its configuration). What a checkpoint is follows from
the names of its tensors; one that is not understood is an error, so that no part of a model is dropped in silence. The
`.pt` is read with weights_only=True: nothing in it is run.

Source: karpathy/nanochat, nanochat/gpt.py; the authors' fork (arXiv 2605.26797): final-layer source, layerwise
projections, value embeddings on every layer, one triple gate for local, memory and value embedding.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrt.data.tokenizer import Tokenizer
from lrt.model import checkpoint
from lrt.model.config import ModelConfig
from lrt.model.memory_config import MemoryConfig
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules import library as schedules

Weights = dict[str, Tensor]


def import_checkpoint(source: Path | str, out: Path | str, tokenizer: Path | str) -> LatentRecurrentTransformer:
    """Convert `source` (a model_*.pt, or a folder: its newest) to a checkpoint folder `out`, and return the model.

    tokenizer: the tokenizer.json that it was trained with; nanochat's own pickle is not read.
    """
    if Path(tokenizer).suffix == ".pkl":
        raise ValueError(
            f"{tokenizer} is a pickle, which could run code; write its tokenizer.json, for example with transformers' "
            "TikTokenConverter, and give that"
        )
    weights, meta = read_weights(Path(source))
    config, schedule = read_config(weights, meta)
    vocabulary = Tokenizer.load(tokenizer)
    if vocabulary.vocab_size != config.vocab_size:
        raise ValueError(
            f"{tokenizer} has {vocabulary.vocab_size} tokens, the model {config.vocab_size}; give the tokenizer that "
            "it was trained with"
        )
    model = LatentRecurrentTransformer(config)
    try:
        model.load_state_dict(convert_weights(weights, config))
    except RuntimeError as error:  # names every tensor whose shape is another
        raise ValueError(f"{source} does not fit its own metadata: {error}") from error
    # KV refresh is how the authors may have trained, and no schedule here.
    refreshed = bool(meta["model_config"].get("interleaved_kv_refresh"))
    origin = {"from": Path(source).name, "step": meta.get("step"), "kv_refresh": refreshed}
    about = {"schedule": schedule, "imported": origin}
    checkpoint.save(out, model, vocabulary, about)
    return model


def read_weights(source: Path) -> tuple[Weights, dict[str, Any]]:
    """The state dict, in float32, and the metadata beside it. ValueError that names what is missing or damaged."""
    if source.is_dir():
        files = sorted(source.glob("model_*.pt"), key=lambda file: (len(file.name), file.name))
        if len(files) == 0:
            raise ValueError(f"{source} holds no model_*.pt; give a folder that nanochat wrote, or the file")
        source = files[-1]  # names hold the step: the longest number, then the largest, is the newest
    if not source.is_file():
        raise ValueError(f"there is no file {source}; give a model_*.pt, or the folder that holds it")
    beside = source.with_name(source.name.replace("model_", "meta_")).with_suffix(".json")
    if not beside.is_file():
        raise ValueError(f"{beside} is missing; it says how many heads {source.name} has: copy it beside the model")
    try:
        weights = torch.load(source, map_location="cpu", weights_only=True)
        meta = json.loads(beside.read_text())
    except Exception as error:  # torch passes on whatever its reader raises
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source} or {beside.name} cannot be read ({reason}); copy both again") from error
    if (
        not isinstance(weights, dict)
        or not all(isinstance(w, Tensor) for w in weights.values())
        or "model_config" not in meta
    ):
        raise ValueError(f"{source} is no state dict with a model_config beside it; give a checkpoint of nanochat")
    return {name.removeprefix("_orig_mod."): w.float() for name, w in weights.items()}, meta


def read_config(weights: Weights, meta: dict[str, Any]) -> tuple[ModelConfig, str]:
    """The model's configuration and the schedule that it was trained with."""
    theirs = meta["model_config"]
    lacking = [name for name in ("n_layer", "n_head", "vocab_size", "sequence_len") if name not in theirs]
    if lacking:
        raise ValueError(f"the metadata's model_config lacks {', '.join(lacking)}; copy it again")
    # By the names of the tensors: metadata may be of another file.
    depth = 1 + max((int(m[1]) for m in (re.match(r"transformer\.h\.(\d+)\.", n) for n in weights) if m), default=-1)
    if depth != theirs["n_layer"] or "transformer.wte.weight" not in weights:
        raise ValueError(
            f"these weights have {depth} blocks transformer.h.N, their metadata says {theirs['n_layer']}; copy both "
            "again"
        )
    width = weights["transformer.wte.weight"].shape[1]
    head_size = width // theirs["n_head"]
    recurrent = "interleaved_lambdas" in weights
    tables = value_embedding_names(weights)
    which = {0: "none", depth: "all"}.get(len(tables), "alternate")
    context = theirs["sequence_len"]
    pattern = theirs.get("window_pattern") or "L"
    tiled = "".join(pattern[i % len(pattern)] for i in range(depth - 1)).upper() + "L"  # the last is always full
    config = ModelConfig(
        depth=depth,
        width=width,
        heads=theirs["n_head"],
        kv_heads=weights["transformer.h.0.attn.c_k.weight"].shape[0] // head_size,
        vocab_size=theirs["vocab_size"],
        context=context,
        value_embeddings=which,  # type: ignore[arg-type]
        window_pattern=tiled if "S" in tiled else "L",
        window=context // 2 + 1 if "S" in tiled else None,  # theirs does not count the token itself
        mlp_width=weights["transformer.h.0.mlp.c_fc.weight"].shape[0],
        memory=MemoryConfig(injection="both", projection="layerwise") if recurrent else MemoryConfig(injection="none"),
    )
    check_gates(weights, theirs, recurrent, width)
    expected = {layer - 1 for layer in range(1, depth + 1) if config.has_value_embedding(layer)}
    if set(tables) != expected:
        raise ValueError(f"value embeddings on layers {sorted(tables)}; known are none, every other, all")
    return config, read_schedule(theirs) if recurrent else "plain()"


def check_gates(weights: Weights, theirs: dict[str, Any], recurrent: bool, width: int) -> None:
    """ValueError for another version of nanochat, told apart by how many channels its gates read.

    A later nanochat reads 12, and with the same names of tensors has other gates (3σ), keys and queries times 1.15,
    another rotary base and other windows: it would load, and score wrongly.
    """
    known = {theirs.get("ve_gate_channels") or width} if recurrent else {32, width}
    for name, weight in weights.items():
        if name.endswith(("ve_gate.weight", "triple_gate.weight")) and weight.shape[1] not in known:
            raise ValueError(
                f"{name} reads {weight.shape[1]} channels; known are {', '.join(map(str, sorted(known)))}: this was "
                "trained by a version of nanochat that computes otherwise"
            )


def read_schedule(theirs: dict[str, Any]) -> str:
    """The authors' flags as a schedule."""
    if theirs.get("use_multi_refine"):
        weights = tuple(theirs.get("multi_refine_loss_weights") or ()) or None
        passes, detach = theirs["multi_refine_num_passes"], theirs["multi_refine_detach"]
        return repr(schedules.multi_refinement(passes, weights, detach))
    return repr(schedules.interleaved(theirs.get("interleaved_num_passes", 2)))


def value_embedding_names(weights: Weights) -> dict[int, str]:
    """Layer (from 0) -> name of its table of value embeddings."""
    matches = (re.match(r"(?:interleaved_init_)?value_embeds\.(\d+)\.weight$", name) for name in weights)
    return {int(match[1]): match[0] for match in matches if match}


def convert_weights(weights: Weights, config: ModelConfig) -> Weights:
    """Their tensors under our names. ValueError where any is missing or left over."""
    left = dict(weights)  # what no name of ours has taken yet

    def take(name: str, default: Tensor | None = None) -> Tensor:
        if name not in left and default is None:
            raise ValueError(f"{name} is missing; this is no checkpoint of a known nanochat")
        return left.pop(name, default)  # type: ignore[return-value]

    def crop_vocabulary(table: Tensor) -> Tensor:
        return table[: config.vocab_size].clone()  # they pad it to a multiple of 64

    def pad_gate(rows: Tensor) -> Tensor:
        """Gates may read only the first channels of their input."""
        return torch.nn.functional.pad(rows, (0, config.width - rows.shape[1]))

    ours = {
        "embedding.weight": crop_vocabulary(take("transformer.wte.weight")),
        "head.weight": crop_vocabulary(take("lm_head.weight")),
    }
    ones, zeros = torch.ones(config.depth), torch.zeros(config.depth)
    # α and β of all blocks are one vector each; the first versions had none, which is 1 and 0.
    alpha, beta = take("resid_lambdas", ones), take("x0_lambdas", zeros)
    recurrent = config.memory.injection == "both"
    gamma = take("interleaved_lambdas") if recurrent else zeros
    tables, groups = value_embedding_names(weights), config.num_kv_heads
    for i in range(config.depth):
        theirs, block = f"transformer.h.{i}.", f"blocks.{i}."
        for their_name, our_name in NAMES.items():
            ours[block + our_name] = take(theirs + their_name)
        ours[block + "alpha"], ours[block + "beta"] = alpha[i : i + 1], beta[i : i + 1]
        if recurrent:
            gates = take(theirs + "attn.triple_gate.weight")  # rows: local, memory, value embedding
            ours[block + "injection.gamma"] = gamma[i : i + 1]
            ours[block + "injection.gate.weight"] = pad_gate(gates[: 2 * groups])
        if i in tables:
            own = gates[2 * groups :] if recurrent else take(theirs + "attn.ve_gate.weight")  # pyright: ignore[reportPossiblyUnboundVariable]
            ours[block + "attention.value_embedding.table.weight"] = crop_vocabulary(take(tables[i]))
            ours[block + "attention.value_embedding.gate.weight"] = pad_gate(own)
    if recurrent:
        pairs = [
            torch.stack([take(f"interleaved_{kind}projections.{i}.W_v.weight") for kind in ("key_", "")])
            for i in range(config.depth)
        ]
        ours["projection.weight"] = torch.stack(pairs).unsqueeze(1)  # (L, C, [k, v], G·K, D)
    if left:
        raise ValueError(
            f"this model has parts that are not known here: {', '.join(sorted(left)[:5])}; it was trained by a newer "
            "nanochat, and would score wrongly without them"
        )
    return ours


NAMES = {
    "attn.c_q.weight": "attention.query.weight",
    "attn.c_k.weight": "attention.key.weight",
    "attn.c_v.weight": "attention.value.weight",
    "attn.c_proj.weight": "attention.out.weight",
    "mlp.c_fc.weight": "mlp.up.weight",
    "mlp.c_proj.weight": "mlp.down.weight",
}
"""Tensors of a block that only have another name."""
