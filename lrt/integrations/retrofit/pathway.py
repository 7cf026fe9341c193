"""The pathway's parameters, and the hooks through which they reach a decoder whose code stays as it is.

Shapes: B rows, T positions, C channels (one per remembered layer), D width, G key/value heads, K head size.

With u the input of a key/value projection (the block's normalised input):

    x <- x + Σ_c γ_c m_c                          before a block
    k <- k + Σ_c g_c U_k,c m_c, v likewise        behind the projection: before rotary positions and norms of the heads
    g_c = 2σ(G_c u)                               per token and head

γ and U start at zero, so nothing is added; G too, so gates start at 1. The local part has no gate: the pathway only
adds, and adapters (LoRA) on the projections merge as they do without it.

The memory travels in the keyword arguments of the layers. A context variable alone would be empty where gradient
checkpointing runs a layer again: transformers 5.24 recomputes its `forward` without the hooks around it. Hooks hold
numbers and names only, so that copies of a model (deepcopy, PEFT) never reach into the original.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lrt.integrations.retrofit.architectures import ARCHITECTURES, Architecture, Layout

KEYWORD = "latent_memory"
"""The keyword argument of the layers that carries a `Reading`."""


class ZeroLinear(nn.Linear):
    """A linear layer without bias that starts at zero; a class of its own, as models initialise their `nn.Linear`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class Pathway(nn.Module):
    """All parameters of the pathway. Called, never looked into: PEFT puts a trainable copy in its place."""

    def __init__(
        self, width: int, heads: tuple[int, int], readers: tuple[int, ...], channels: int, shared: bool
    ) -> None:
        """heads: (G, K). readers: the blocks (1..L) that read the memory."""
        super().__init__()
        self.heads, self.readers, self.channels, self.shared = heads, readers, channels, shared
        rows = heads[0] * heads[1]
        sets = 1 if shared else len(readers)
        self.gamma = nn.Parameter(torch.zeros(len(readers), channels))
        self.project = nn.ModuleList(ZeroLinear(width, 2 * rows) for _ in range(sets * channels))
        """U_k and U_v, the channels of the first set first."""
        self.gate = nn.ModuleList(ZeroLinear(width, channels * heads[0]) for _ in readers)

    def forward(self, part: str, *arguments: Any) -> Any:
        """`residual`, `projected` or `gated`, in one call."""
        return PARTS[part](self, *arguments)

    def residual(self, layer: int, x: Tensor, memory: Tensor) -> Tensor:
        """The residual stream (B, T, D) before a block, with the memory (C, B, T, D) added."""
        scales = self.gamma.to(x.dtype)[self.readers.index(layer)]
        for channel in range(self.channels):  # indices: a decoded token notices what iterating over tensors takes
            x = torch.addcmul(x, scales[channel], memory[channel])
        return x

    def projected(self, layer: int, memory: Tensor) -> Tensor:
        """2 U_k m and 2 U_v m of each channel, (B, T, C, 2, G, K). The gates' 2 is in here, where it costs least."""
        first = 0 if self.shared else self.readers.index(layer) * self.channels
        products = [self.project[first + number](channel) for number, channel in enumerate(memory)]
        return 2 * torch.stack(products, 2).unflatten(-1, (2, *self.heads))

    def gated(self, layer: int, u: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to keys and to values, (B, T, G, K) each, where the block's normalised input is u (B, T, D)."""
        gates = torch.sigmoid(self.gate[self.readers.index(layer)](u))
        added = gates.view(*u.shape[:2], self.channels, 1, self.heads[0], 1) * projected
        key, value = (added.sum(2) if self.channels > 1 else added[:, :, 0]).unbind(2)
        return key, value


PARTS = {"residual": Pathway.residual, "projected": Pathway.projected, "gated": Pathway.gated}


@dataclass(frozen=True)
class Reading:
    """What one pass of the decoder reads: it travels through the keyword arguments of its layers."""

    pathway: nn.Module
    """A `Pathway`, or what stands in its place."""
    memory: Tensor
    """(C, B, T, D)."""
    projected: Tensor | None
    """What `Pathway.projected` gives, where all blocks share it; None: each block projects for itself."""

    @classmethod
    def of(cls, pathway: nn.Module, memory: Tensor, first: int | None) -> Reading:
        """Projected once for all blocks where `first` names the first that reads; it is then any of them."""
        return cls(pathway, memory, None if first is None else pathway("projected", first, memory))


@dataclass
class AttentionReading:
    """What one attention reads, while it runs."""

    reading: Reading
    u: Tensor | None = None
    """(B, T, D): its normalised input, once it is known …"""
    added: tuple[Tensor, Tensor] | None = None
    """… and what is added to its keys and values, which two projections ask for."""

    def add_to(self, layer: int, u: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to keys and to values, (B, T, G, K) each."""
        if self.added is None or self.u is not u:
            read, pathway = self.reading, self.reading.pathway
            projected = pathway("projected", layer, read.memory) if read.projected is None else read.projected
            self.u, self.added = u, pathway("gated", layer, u, projected)
        assert self.added is not None
        return self.added


READING: ContextVar[AttentionReading | None] = ContextVar("reading", default=None)
"""What the attention that runs now reads."""


class EnoughError(Exception):
    """The highest remembered layer has run, and nothing above it is wanted: it leaves the decoder's forward."""


@dataclass(frozen=True)
class Outputs:
    """What the remembered layers of a pass have computed."""

    by_layer: dict[int, Tensor]
    """Layer -> its output (B, T, D)."""
    last: int | None
    """The layer behind which the pass ends; None: it runs whole."""


OUTPUTS: ContextVar[Outputs | None] = ContextVar("outputs", default=None)
"""Where remembered layers put what they computed; None outside of a pass of ours."""


@contextmanager
def remember(last: int | None) -> Iterator[dict[int, Tensor]]:
    """Layer -> its output (B, T, D), of the remembered layers that run in here; no layer above `last` does."""
    outputs = Outputs({}, last)
    token = OUTPUTS.set(outputs)
    try:
        with suppress(EnoughError):
            yield outputs.by_layer
    finally:
        OUTPUTS.reset(token)
        READING.set(None)  # or the graph behind it would live until the next pass


@dataclass(frozen=True)
class RequirePass:
    """Before the stack: only the whole model may run it, which brings the memory along."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if OUTPUTS.get() is None:
            raise ValueError(
                f"{type(module).__name__} was called by itself, where it has no memory; call the retrofitted model, "
                "which runs it"
            )


@dataclass(frozen=True)
class AddResidual:
    """Before a block: the memory joins the residual stream."""

    layer: int

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        reading = kwargs.get(KEYWORD)  # stays: the block hands it on to its attention
        if reading is None:
            return args, kwargs
        if args:
            return (reading.pathway("residual", self.layer, args[0], reading.memory), *args[1:]), kwargs
        x = reading.pathway("residual", self.layer, kwargs["hidden_states"], reading.memory)
        return args, {**kwargs, "hidden_states": x}


@dataclass(frozen=True)
class TakeReading:
    """Before an attention: take what it reads out of its arguments, which it does not know."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        reading = kwargs.get(KEYWORD)
        READING.set(None if reading is None else AttentionReading(reading))
        return args, {name: value for name, value in kwargs.items() if name != KEYWORD}


@dataclass(frozen=True)
class AddKeyValue:
    """Behind a projection of keys or values: add what the memory is projected to."""

    layer: int
    projection: str
    layout: Layout

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        reading = READING.get()
        return out if reading is None else self.layout.add(self.projection, out, *reading.add_to(self.layer, args[0]))


@dataclass(frozen=True)
class Remember:
    """Behind a remembered layer."""

    layer: int

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        outputs = OUTPUTS.get()
        if outputs is None:  # a layer that gradient checkpointing runs again is of no pass
            return
        outputs.by_layer[self.layer] = out[0] if isinstance(out, tuple) else out
        if self.layer == outputs.last:
            raise EnoughError


def normalise(x: Tensor) -> Tensor:
    """RMS-normalised, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + torch.finfo(wide.dtype).eps)).to(x.dtype)


def decoder_layers(model: Any) -> Any:
    """The decoder's stack. Its elements are of one class, which transformers names for the devices' sake too."""
    depth = model.config.num_hidden_layers
    stacks = [m for m in model.stack.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    stacks = [stack for stack in stacks if all(isinstance(layer, GradientCheckpointingLayer) for layer in stack)]
    assert len(stacks) == 1, f"{type(model).__name__} has {len(stacks)} stacks of {depth} layers"
    return stacks[0]


def is_checkpointing(model: Any) -> bool:
    """Whether its layers are computed again in the backward."""
    return any(layer.gradient_checkpointing for layer in decoder_layers(model))


def attach(model: Any) -> None:
    """Give a model of a retrofitted class its pathway, and the hooks that reach it."""
    config, layers = model.config, decoder_layers(model)
    architecture, about = ARCHITECTURES[config.base_model_type], config.pathway
    sources, readers = about.sources(len(layers)), about.readers(len(layers))
    pathway = Pathway(config.hidden_size, head_shape(config), readers, len(sources), about.projection == "shared")
    like = next(layers.parameters())
    model.latent = pathway.to(device=like.device, dtype=like.dtype)
    model.latent.train(model.training)
    model.stack.register_forward_pre_hook(RequirePass(), with_kwargs=True)
    for number, layer in enumerate(layers, 1):
        hook_layer(layer, number, architecture, number in readers, number in sources)


HOOKS = (RequirePass, AddResidual, TakeReading, AddKeyValue, Remember)


def remove(model: Any) -> None:
    """Take the pathway and its hooks away. Hooks are known by their class, as copies of a model have their own."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [number for number, hook in hooks.items() if isinstance(hook, HOOKS)]:
                del hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
    del model.latent


def hook_layer(layer: nn.Module, number: int, architecture: Architecture, reads: bool, remembered: bool) -> None:
    """The hooks of one decoder layer."""
    attention = layer.get_submodule(architecture.attention)
    attention.register_forward_pre_hook(TakeReading(), with_kwargs=True)
    if reads:
        layer.register_forward_pre_hook(AddResidual(number), with_kwargs=True)
        for name in architecture.layout.projections:
            add = AddKeyValue(number, name, architecture.layout)
            attention.get_submodule(name).register_forward_hook(add)
    if remembered:
        layer.register_forward_hook(Remember(number))


def head_shape(config: Any) -> tuple[int, int]:
    """(G, K) of a decoder's configuration. transformers writes the two only where they differ from what H gives."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, size
