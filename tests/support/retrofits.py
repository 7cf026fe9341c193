"""Tiny random decoders of every architecture that can be retrofitted, and an oracle of the pathway without any cache.

Shapes: B rows, T positions, C channels, D width, G key/value heads, K head size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from lrt.integrations.retrofit.architectures import ARCHITECTURES

V, DEPTH = 60, 3
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_neox": {"num_key_value_heads": 4},
    "mistral": {"sliding_window": 4},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": None},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "stablelm": {"partial_rotary_factor": 0.5},
    "starcoder2": {"sliding_window": 4},
}
"""What differs from `SIZES`: a sliding window wherever there is one, so that it moves on within a few tokens."""


def plain(architecture: str, seed: int = 0, lively: bool = True, **options: Any) -> Any:
    """A decoder with random weights, lively ones or its own initial ones, in float64 and `eval()`."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **{**SIZES, **OWN.get(architecture, {}), **options})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if lively and p.dim() > 1:
                nn.init.normal_(p, std=0.3 if p.shape[0] != V else 1.0)
    return model.double().eval()


@torch.no_grad()
def awaken(model: Any, seed: int = 0, std: float = 0.3) -> Any:
    """The pathway's parameters set to lively random values."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.latent.parameters():
        p.copy_(std * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(seed))


class Double(TorchFunctionMode):
    """Where a decoder's code goes to float32 for precision (norms, softmax), float64 stays float64 in here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **{name: torch.float64 if a is torch.float32 else a for name, a in kwargs.items()})


class Oracle:
    """Token by token, each time from the whole text so far: no cache, no passes, and no code of the pathway but its
    weights. One row at a time."""

    def __init__(self, original: Any, retrofitted: Any) -> None:
        self.model = copy.deepcopy(original)
        config, pathway = retrofitted.config, retrofitted.latent
        self.sources = config.pathway.sources(DEPTH)
        self.readers = config.pathway.readers(DEPTH)
        self.groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.gamma = pathway.gamma.detach().clone()
        self.weights = [p.weight.detach().clone() for p in pathway.project]
        self.gates = [g.weight.detach().clone() for g in pathway.gate]
        self.memory = torch.zeros(0)
        self.outputs: dict[int, Tensor] = {}
        self._hook(ARCHITECTURES[config.base_model_type].attention)

    def _hook(self, attention_name: str) -> None:
        stack = next(m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == DEPTH)
        self.model.get_input_embeddings().register_forward_hook(lambda m, a, out: self.outputs.__setitem__(0, out))
        for number, layer in enumerate(stack, 1):
            if number in self.readers:
                layer.register_forward_pre_hook(self._residual(number), with_kwargs=True)
                for name, module in layer.get_submodule(attention_name).named_children():
                    if name in ("k_proj", "v_proj", "c_attn", "qkv_proj", "query_key_value"):
                        module.register_forward_hook(self._key_value(number, name))
            layer.register_forward_hook(
                lambda m, a, out, n=number: self.outputs.__setitem__(n, out[0] if isinstance(out, tuple) else out)
            )

    def _residual(self, number: int) -> Any:
        def add(module: nn.Module, args: Any, kwargs: Any) -> Any:
            added = torch.einsum("c,cbtd->btd", self.gamma[self.readers.index(number)], self.memory)
            return (args[0] + added, *args[1:]), kwargs

        return add

    def _key_value(self, number: int, name: str) -> Any:
        def add(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            index, channels = self.readers.index(number), len(self.sources)
            first = 0 if len(self.weights) == channels else index * channels
            parts = []
            for c in range(channels):
                gate = (
                    2 / (1 + torch.exp(-(args[0] @ self.gates[index].T)))[..., c * self.groups : (c + 1) * self.groups]
                )
                both = self.memory[c] @ self.weights[first + c].T
                k, v = both.chunk(2, -1)
                spread = (1 / gate).reciprocal().repeat_interleave(k.shape[-1] // self.groups, -1)
                parts.append((spread * k, spread * v))
            k, v = (sum(p[i] for p in parts) for i in (0, 1))
            if name in ("k_proj", "v_proj"):
                return out + (k if name == "k_proj" else v)
            if name == "query_key_value":  # per head: query, key, value
                size = k.shape[-1] // self.groups
                new = out.clone()
                for head in range(self.groups):
                    at, own = 3 * size * head, slice(size * head, size * (head + 1))
                    new[..., at + size : at + 2 * size] += k[..., own]
                    new[..., at + 2 * size : at + 3 * size] += v[..., own]
                return new
            return out + F.pad(torch.cat((k, v), -1), (out.shape[-1] - 2 * k.shape[-1], 0))

        return add

    @torch.no_grad()
    def logits(self, row: Tensor) -> Tensor:
        """(T, V) of one text (T,)."""
        width = self.model.config.hidden_size
        past = torch.zeros(len(self.sources), 1, 1, width, dtype=torch.float64)
        lines = []
        for end in range(1, len(row) + 1):
            self.memory = past
            out = self.model(row[None, :end], use_cache=False)
            lines.append(out.logits[0, -1])
            last = torch.stack([self.outputs[s][:, -1:] for s in self.sources])
            last = last / (last.pow(2).mean(-1, keepdim=True) + torch.finfo(last.dtype).eps).sqrt()
            past = torch.cat((past, last), 2)
        return torch.stack(lines)

    def greedy(self, row: Tensor, count: int) -> Tensor:
        """The `count` likeliest tokens behind a text (T,), one after the other."""
        for _ in range(count):
            row = torch.cat((row, self.logits(row)[-1].argmax()[None]))
        return row[-count:]
