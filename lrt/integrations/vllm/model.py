# pyright: reportMissingImports=false
"""The class that vLLM runs: lrt's own model over vLLM's pages.

A step in which each request has one token is one run, without a decision on the host: it fits a CUDA graph. Other steps
are `step.Step`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tp_group, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import FullAttentionSpec

from lrt.inference.prefill import PrefillMode, tolerance
from lrt.integrations.vllm import refusals
from lrt.integrations.vllm.memory_cache import MemoryCache
from lrt.integrations.vllm.modes import more_exact
from lrt.integrations.vllm.paged_state import Placement, memory_width
from lrt.integrations.vllm.reports import Reports
from lrt.integrations.vllm.request_modes import ENGINES, numbers_of
from lrt.integrations.vllm.runs import Layers, Runs, forward
from lrt.integrations.vllm.sharing import readers
from lrt.integrations.vllm.spans import Chunk
from lrt.integrations.vllm.step import Step
from lrt.integrations.vllm.tensor_parallel import load_part, local_config, sum_over_ranks
from lrt.model.transformer import LatentRecurrentTransformer

GROUPS = 8
"""Stride of the sweeps: each makes so many more positions exact, in so many runs."""


class WindowedAttention(Attention):
    """vLLM's attention layer, in one block table with all others: a sliding window hides old positions, and frees none
    of their pages, which the memory of the same positions shares."""

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec:
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            head_size_v=self.head_size_v,
            dtype=self.kv_cache_torch_dtype,
            sliding_window=self.sliding_window,
        )


class LRTForCausalLM(nn.Module):
    """An exported LRT as vLLM runs it; `model` is lrt's own, or this rank's part of it."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.settings, whole = vllm_config, vllm_config.model_config.hf_config.model
        refusals.check(whole, vllm_config)
        self.ranks = vllm_config.parallel_config.tensor_parallel_size
        config = local_config(whole, self.ranks)
        attention = [
            WindowedAttention(
                config.heads,
                config.head_dim,
                config.head_dim**-0.5,
                num_kv_heads=config.num_kv_heads,
                cache_config=vllm_config.cache_config,
                per_layer_sliding_window=window,
                prefix=f"{prefix}model.layers.{layer}.attn",
            )
            for layer, window in enumerate(config.windows)
        ]
        refusals.check_head_size(whole, attention[0].get_attn_backend().get_supported_head_sizes())
        self.attention = nn.ModuleList(attention)
        self.model = LatentRecurrentTransformer(config)
        if self.ranks > 1:
            sum_over_ranks(self.model, tensor_model_parallel_all_reduce)
        self.whole = whole
        name = f"{prefix}model.layers.{config.kv_layers}.memory"
        self.memory = MemoryCache(memory_width(config), vllm_config.model_config.dtype, name)
        self.mode: PrefillMode = vllm_config.model_config.hf_config.prefill
        self.reports = Reports()
        self.layers: Layers | None = None

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embedding(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Final hidden states (N, D) of tokens and positions (N,)."""
        common = self.memory.step()
        if common is None:
            return self.without_pages(input_ids.long())
        if self.layers is None:
            self.layers = Layers.of(list(self.attention), self.memory, self.settings)
        count = common.num_actual_tokens
        tokens, positions = input_ids[:count].long(), positions[:count].long()
        hidden = torch.zeros(len(input_ids), self.model.config.width, dtype=self.memory.dtype, device=tokens.device)
        if common.max_query_len == 1 and not may_share(common):
            rows = torch.arange(count, device=tokens.device)
            place = Placement(common.block_table_tensor, rows, common.slot_mapping, positions)
            hidden[:count], _ = forward(self.model, tuple(self.attention), self.memory.pages, tokens, positions, place)
        else:
            hidden[:count] = self.compute_step(common, tokens, positions)
        return hidden

    def compute_step(self, common: Any, tokens: Tensor, positions: Tensor) -> Tensor:
        """A step with chunks of prompts."""
        assert self.layers is not None
        host, bounds = positions.cpu(), common.query_start_loc_cpu.tolist()
        chunks = [
            Chunk(row, start, stop - start, int(host[start]))
            for row, (start, stop) in enumerate(itertools.pairwise(bounds))
            if stop > start
        ]
        counts = torch.tensor([chunk.tokens for chunk in chunks])
        begins = torch.tensor([chunk.position for chunk in chunks]).repeat_interleave(counts)
        run = Runs(self.model, self.layers, common, tokens, positions, host, begins)
        numbers = numbers_of(common.num_reqs, common.req_idx)
        requests = ENGINES[self.settings.instance_id]
        batch = {chunk.request: requests.request(numbers[chunk.request]) for chunk in chunks}
        modes: dict[int, PrefillMode] = {row: more_exact(self.mode, request.mode) for row, request in batch.items()}
        tolerances = {row: tolerance(mode, self.model) for row, mode in modes.items()}
        hidden = self.model.embedding.weight.new_zeros(len(tokens), self.model.config.width)
        agree = get_tp_group().broadcast_object if self.ranks > 1 else lambda decision: decision
        waiting = readers(
            chunks, common.block_table_tensor.cpu(), common.slot_mapping.cpu(), self.memory.pages.shape[1]
        )
        step = Step(self.model.config, run, chunks, tolerances, GROUPS, hidden, agree, waiting)
        step.compute()
        for chunk in chunks:
            request, certificate = batch[chunk.request], step.certificates.get(chunk.request)
            request.certificates += [] if certificate is None else [certificate]
            self.reports.note(modes[chunk.request], request.prompt, request.certificates, chunk)
        return hidden

    def without_pages(self, tokens: Tensor) -> Tensor:
        """vLLM measures how much memory a step takes before it makes the pages: one page of a position then serves."""
        pages = self.model.embedding.weight.new_zeros(1, 1, self.memory.width)
        nowhere = torch.zeros_like(tokens)
        place = Placement(nowhere.new_zeros(1, 1), nowhere, nowhere, nowhere)
        return forward(self.model, tuple(self.attention), pages, tokens, nowhere, place)[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Next-token logits (n, V)."""
        return self.model.logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take this rank's part of an exported folder's weights, whose names are this class's."""
        named = dict(weights)
        own = {name.removeprefix("model."): weight for name, weight in named.items()}
        load_part(self.model, own, self.whole, get_tensor_model_parallel_rank(), self.ranks)
        return set(named)


def may_share(common: Any) -> bool:
    """Whether a step of one token per request may have one that begins with what another computes in the same step: one
    that has just come. vLLM's first runner does not tell those that come back; on a CPU it costs nothing to look."""
    return common.slot_mapping.device.type == "cpu" or bool(common.is_prefilling.any())
