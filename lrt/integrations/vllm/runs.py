# pyright: reportMissingImports=false
"""The runs of one step in vLLM: spans of tokens as requests of their own, for the attention layers and for the memory.

The layers' own metadata builders are asked, as vLLM asks them once per step. What a run computes goes into the same
pages as what the step computes.

Shapes: N tokens of the step, n of a run, m spans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from lrt.integrations.vllm.memory_cache import MemoryCache, StepMetadata
from lrt.integrations.vllm.paged_state import PagedState, Placement
from lrt.integrations.vllm.spans import Spans
from lrt.model.transformer import LatentRecurrentTransformer


@dataclasses.dataclass(frozen=True)
class Layers:
    """The attention layers of a model and its memory, and who describes a batch to them."""

    attention: Sequence[Any]
    memory: MemoryCache
    builders: Sequence[Any]
    """One for the layers of each kind."""
    most: int
    """The most requests that the builders take."""

    @classmethod
    def of(cls, attention: Sequence[Any], memory: MemoryCache, settings: Any) -> Layers:
        """Once the pages are there. settings: a `VllmConfig`."""
        kinds: dict[Any, list[str]] = {}
        for layer in attention:
            spec = layer.get_kv_cache_spec(settings).copy_with_new_block_size(memory.pages.shape[1])
            kinds.setdefault((layer.get_attn_backend(), spec), []).append(layer.layer_name)
        device = memory.pages.device
        builders = [
            backend.get_builder_cls()(spec, names, settings, device) for (backend, spec), names in kinds.items()
        ]
        return cls(list(attention), memory, builders, settings.scheduler_config.max_num_seqs)

    def describe(self, common: CommonAttentionMetadata) -> dict[str, Any]:
        """Metadata by layer."""
        by_layer: dict[str, Any] = {}
        for builder in self.builders:
            metadata = builder.build(0, common)
            by_layer |= dict.fromkeys(builder.layer_names, metadata)
        return {**by_layer, self.memory.layer_name: StepMetadata(common)}


@dataclasses.dataclass(frozen=True)
class Runs:
    """The model over tokens of one step: a `lrt.integrations.vllm.step.Run`."""

    model: LatentRecurrentTransformer
    layers: Layers
    common: CommonAttentionMetadata
    """vLLM's description of the step."""
    tokens: Tensor
    """(N,) int."""
    positions: Tensor
    """(N,) int."""
    host_positions: Tensor
    """The same on the CPU."""
    begins: Tensor
    """(N,) int: the first position of the step, of each token's request; on the CPU."""

    def __call__(
        self, spans: Spans, swept: bool, blocks: range | None = None, stream: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if len(spans.requests) <= self.layers.most:
            return self.run(spans, swept, blocks, stream)
        outputs, memories = [], []
        for part, tokens in spans.split(self.layers.most):
            output, memory = self.run(part, swept, blocks, None if stream is None else stream[tokens])
            outputs.append(output)
            memories += [] if memory is None else [memory]
        return torch.cat(outputs), torch.cat(memories) if memories else None

    def run(
        self, spans: Spans, swept: bool, blocks: range | None, stream: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One run of as many spans as the builders take."""
        common, device = self.describe(spans), self.tokens.device
        index = spans.index.to(device)
        place = Placement(
            common.block_table_tensor, spans.rows.to(device), common.slot_mapping, self.begins[spans.index].to(device)
        )
        context = dataclasses.replace(
            get_forward_context(),
            attn_metadata=self.layers.describe(common),
            slot_mapping=dict.fromkeys(get_forward_context().slot_mapping, common.slot_mapping),
            batch_descriptor=None,
        )
        with override_forward_context(context):
            return forward(
                self.model,
                tuple(self.layers.attention),
                self.layers.memory.pages,
                self.tokens[index],
                self.positions[index],
                place,
                swept,
                blocks,
                stream,
            )

    def describe(self, spans: Spans) -> CommonAttentionMetadata:
        """Spans as vLLM describes requests."""
        common, device = self.common, self.tokens.device
        index, requests = spans.index.to(device), spans.requests.to(device)
        lengths = (self.host_positions[spans.lasts] + 1).to(torch.int32)
        bounds = spans.bounds.to(torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=bounds.to(device),
            query_start_loc_cpu=bounds,
            seq_lens=lengths.to(device),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=len(requests),
            num_actual_tokens=spans.tokens,
            max_query_len=spans.longest,
            max_seq_len=int(lengths.max()),
            block_table_tensor=common.block_table_tensor[requests],
            slot_mapping=common.slot_mapping[index],
            positions=self.positions[index],
            is_prefilling=spans.bounds.diff() > 1,
        )


def forward(
    model: LatentRecurrentTransformer,
    attention: tuple[Any, ...],
    pages: Tensor,
    tokens: Tensor,
    positions: Tensor,
    place: Placement,
    swept: bool = False,
    blocks: range | None = None,
    stream: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The model over tokens (n,) of the current forward context: (output (n, D), memory (n, P, D) or None)."""
    state = PagedState.of(model.config, attention, pages, place, swept)
    below = None if stream is None else stream.unsqueeze(0)
    output, state = model(tokens.unsqueeze(0), positions.unsqueeze(0), state, blocks, below)
    return output[0], None if state.memory is None else state.memory[0]
