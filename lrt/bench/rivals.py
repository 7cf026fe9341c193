"""Others' models of the same shape, to be timed beside ours. They come with optional extras."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrt.config import ModelConfig

Generate = Callable[[Tensor, int], object]
"""(prompt (B, T) int, number of new tokens) -> whatever it gives."""


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
        num_key_value_heads=config.groups,
        max_position_embeddings=config.context,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=0,
    )
    model: Any = NanoChatForCausalLM(shape)  # its annotations hide what it inherits
    model = model.to(device).eval()

    def generate(prompt: Tensor, count: int) -> object:
        how = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
        with torch.inference_mode():
            return model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=how)

    return generate
