# pyright: reportMissingImports=false
"""One more paged cache in vLLM: the memory (and the token) of every position, in the attention layers' block table.

To vLLM it is an attention layer whose pages are W numbers wide, in the model's own type, whatever keys and values have.
It attends to nothing. Its metadata is vLLM's own description of a step, from which the runs of the step are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec


@dataclass
class StepMetadata:
    """What a step computes."""

    common: CommonAttentionMetadata


class StepBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Hands vLLM's description on."""

    # Only steps of one token per request are one run, without a decision on the host: only these fit one CUDA graph.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        return StepMetadata(common_attn_metadata)


class NoAttention(AttentionImpl):
    """The memory attends to nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError


class MemoryBackend(AttentionBackend):
    """How vLLM is to treat the memory's pages."""

    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "LRT_MEMORY"

    @staticmethod
    def get_impl_cls() -> type[NoAttention]:
        return NoAttention

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(*args: Any) -> list[int | MultipleOf]:
        return [MultipleOf(1)]


class MemoryCache(nn.Module, AttentionLayerBase):
    """The layer that holds the pages."""

    def __init__(self, width: int, dtype: torch.dtype, name: str) -> None:
        """width: W. name: as vLLM calls the layer."""
        super().__init__()
        self.width, self.dtype, self.layer_name = width, dtype, name
        self.kv_cache = torch.tensor([])
        self.impl = NoAttention()
        layers = get_current_vllm_config().compilation_config.static_forward_context
        assert name not in layers
        layers[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return MemoryBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec:
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.width,
            head_size_v=0,
            dtype=self.dtype,
        )

    def step(self) -> CommonAttentionMetadata | None:
        """vLLM's description of the present step; None where it measures memory before there are pages."""
        metadata = get_forward_context().attn_metadata
        return None if metadata is None else metadata[self.layer_name].common

    @property
    def pages(self) -> Tensor:
        """(pages, page size, W)."""
        return self.kv_cache.squeeze(1)
