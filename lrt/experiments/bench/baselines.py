"""What the library is timed against: the same model as anybody would write it, and transformers' `generate`.

The model is plain PyTorch modules, eager, one pass, logits for all tokens at once.

Shapes: B batch, T positions, D width, H heads, K head size, V vocabulary. It shares no code with lrt.model: it is what
`lrt bench train` compares the library's plain step with, and a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrt.model.config import ModelConfig


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Without a bias: no layer here has one."""
    return nn.Linear(inputs, outputs, bias=False)


class RMSNorm(nn.RMSNorm):
    """Over the last dimension, without parameters."""

    def __init__(self, size: int) -> None:
        super().__init__(size, elementwise_affine=False)


class PlainAttention(nn.Module):
    """Attention whose keys and values are gated sums of a local and a remembered part."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, self.heads, self.size = config.width, config.heads, config.head_dim
        self.query, self.key, self.value = (linear(width, width) for _ in range(3))
        self.gate, self.out = linear(width, 2 * config.heads), linear(width, width)
        self.norm = RMSNorm(config.head_dim)

    def forward(self, u: Tensor, memory_k: Tensor, memory_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = (*u.shape[:2], self.heads, self.size)
        q, k, v = (layer(u).view(shape) for layer in (self.query, self.key, self.value))
        local, remembered = (2 * torch.sigmoid(self.gate(u))).unsqueeze(-1).chunk(2, dim=2)
        k = local * k + remembered * memory_k.view(shape)
        v = local * v + remembered * memory_v.view(shape)
        q, k = (self.norm(self.rotate(x, cos, sin)) for x in (q, k))  # QK-norm, after the rotation
        y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary positions of x (B, T, H, K): halves are pairs, not neighbours. cos, sin (T, 1, K/2)."""
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


class PlainBlock(nn.Module):
    """Attention and MLP with their residuals."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.alpha, self.beta, self.gamma = (nn.Parameter(torch.ones(1)) for _ in range(3))
        self.attention = PlainAttention(config)
        self.up, self.down = linear(config.width, config.mlp_dim), linear(config.mlp_dim, config.width)
        self.norm = RMSNorm(config.width)

    def forward(self, x: Tensor, x0: Tensor, memory: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.alpha * x + self.beta * x0 + self.gamma * memory
        x = x + self.attention(self.norm(x), k, v, cos, sin)
        return x + self.down(F.relu(self.up(self.norm(x))).square())


class PlainModel(nn.Module):
    """One pass of an LRT (injection both, shared projections) over T positions, with zeros for memory."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        memory = config.memory
        if (
            (memory.injection, memory.projection, memory.initial) != ("both", "shared", "zeros")
            or memory.source not in (None, config.depth)
            or memory.layers is not None
            or (config.value_embeddings != "none")
            or (config.num_kv_heads != config.heads)
            or (config.heads * config.head_dim != config.width)
            or any(config.windows)
        ):
            raise ValueError(f"plain modules are written for the shared LRT without options, not for {config}")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.key, self.value = linear(config.width, config.width), linear(config.width, config.width)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.depth))
        self.norm, self.head = RMSNorm(config.width), linear(config.width, config.vocab_size)
        angles = torch.arange(config.context)[:, None] * config.rope_base ** (
            -torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        )
        # (T, 1, K/2): they broadcast over the heads. No buffers, which would be moved to devices without float64.
        self.cos, self.sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of tokens (B, T)."""
        x = x0 = self.norm(self.embedding(tokens))
        memory = torch.zeros_like(x)  # of a first pass: the products with it are computed all the same
        k, v = self.key(memory), self.value(memory)
        cos, sin = (angles[: tokens.shape[1]].to(x.dtype).to(x.device) for angles in (self.cos, self.sin))
        for block in self.blocks:
            x = block(x, x0, memory, k, v, cos, sin)
        return self.config.softcap * torch.tanh(self.head(self.norm(x)) / self.config.softcap)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean nats."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the weights of a LatentRecurrentTransformer, by its names."""
        keys, values = weights["projection.weight"][0, 0]
        renamed = {"key.weight": keys, "value.weight": values}
        for name, weight in weights.items():
            if name != "projection.weight":
                flat = name.replace(".injection.gamma", ".gamma").replace(".injection.gate", ".attention.gate")
                renamed[flat.replace(".mlp.", ".")] = weight
        self.load_state_dict(renamed)


Generate = Callable[[Tensor, int], object]
"""(prompt (B, T) int, number of new tokens) -> the tokens, in whatever form."""


def transformers_generate(config: ModelConfig, device: str | torch.device) -> Generate:
    """`generate` of transformers' NanoChat, greedy, with its default cache, of the shape of a plain Transformer.

    NanoChat is this library's base model but for α, β and the skip, so it does a little less work per token. Weights
    are random: the number of tokens is fixed. Raises ValueError where transformers is not installed.
    """
    try:
        from transformers import GenerationConfig, NanoChatConfig, NanoChatForCausalLM
    except ImportError as error:
        raise ValueError(
            "the comparison needs transformers: pip install 'latent-recurrent-transformer[hf]', or measure other "
            "sections (--only)"
        ) from error
    shape = NanoChatConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.context,
        eos_token_id=None,  # nothing ends a text before its number of tokens
        pad_token_id=0,
        bos_token_id=0,
    )
    model: Any = NanoChatForCausalLM(shape)  # its annotations hide what it inherits
    model = model.to(device).eval()

    def generate(prompt: Tensor, count: int) -> object:
        greedy = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
        with torch.inference_mode():
            return model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy)

    return generate
