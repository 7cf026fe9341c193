"""The oracle of the rivals: a Loop Transformer and latent thoughts, one token at a time, in plain Python loops.

Built of `reference.py`'s arithmetic of one block; it shares no code with lrt. Keys and values are lists that grow.

T tokens, L blocks, H query heads, G key and value heads, K head size, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrt.model.config import ModelConfig
from support.oracle import Weights, attend, enter_block, query_key_value, read_memory, rms, rotate, same_document

Past = list[tuple[int, list[Tensor], list[Tensor]]]
"""(token, keys, values) of every position so far; keys and values (G, K) per application of a block."""


def rival_oracle(weights: Weights, config: ModelConfig, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
    """Hidden states (T, D) that are read for what follows each of one row of tokens (T,), decoded in order."""
    past: Past = []
    remembered: dict[int, list[Tensor]] = {}
    answers = []
    for t in range(len(tokens)):
        memory = read_memory(weights, config, tokens, documents, t, remembered)
        entered = rms(weights["embedding.weight"][tokens[t]])
        for _ in range(1 + config.thoughts):
            layers = position(weights, config, tokens, documents, t, entered, memory, past)
            entered = layers[-1]  # a thought is the final hidden state of the position before
        remembered[t] = layers
        answers.append(entered)
    return torch.stack(answers)


def position(
    weights: Weights,
    config: ModelConfig,
    tokens: Tensor,
    documents: Tensor | None,
    t: int,
    entered: Tensor,
    memory: list[Tensor],
    past: Past,
) -> list[Tensor]:
    """One position behind `past`, which it joins: the normalised outputs (D,) of the embedding and the last loop."""
    place, x = len(past), entered
    keys: list[Tensor] = []
    values: list[Tensor] = []
    seen = [(s, k, v) for s, k, v in past if same_document(documents, s, t)]
    for _ in range(config.loops):
        layers = [entered]
        for layer in range(1, config.depth + 1):
            name, turn = f"blocks.{layer - 1}", len(keys)
            x = enter_block(weights, config, layer, x, entered, memory)
            q, k, v = query_key_value(weights, config, layer, rms(x), tokens[t], memory)
            q, k = rms(rotate(q, place, config.rope_base)), rms(rotate(k, place, config.rope_base))
            window = config.windows[layer - 1]  # in tokens: thoughts have full attention
            near = [(ks[turn], vs[turn]) for s, ks, vs in seen if window is None or s > t - window]
            attended = attend(q, [ks for ks, _ in near] + [k], [vs for _, vs in near] + [v])
            x = x + weights[f"{name}.attention.out.weight"] @ attended
            up = weights[f"{name}.mlp.up.weight"] @ rms(x)
            x = x + weights[f"{name}.mlp.down.weight"] @ torch.relu(up) ** 2
            keys.append(k)
            values.append(v)
            layers.append(rms(x))
    past.append((t, keys, values))
    return layers
