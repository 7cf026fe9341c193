"""RetrofitForCausalLM: a decoder of transformers whose tokens read hidden states of the token before them.

A retrofitted class is `Recurrent` in front of the decoder's own, which it calls for every pass: masks, positions, heads
and losses stay the decoder's. In `eval()` all numbers are live, that is of true recurrence; `train()` runs the training
schedule (`PathwayConfig.schedule`).

Shapes: B rows, T new columns of a call (padding included), P remembered layers, D width, V vocabulary.

In `eval()` texts are read by passes over all new columns, each of which reads the memory of the one before. After n of
them the first n columns are exact; they end when a pass moves no memory by more than the tolerance. Where that does not
come soon the text is read token by token. A call with one new column is one pass, as in the decoder itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lrt.inference.certificate import moves_to_come
from lrt.integrations.hf.schedule_step import FollowsSchedule
from lrt.integrations.retrofit import cache as caches
from lrt.integrations.retrofit.columns import Predecessors, predecessors
from lrt.integrations.retrofit.configuration import CONFIG_MAPPING, RetrofitConfig, check_base, config_class
from lrt.integrations.retrofit.pathway import (
    KEYWORD,
    Pathway,
    Reading,
    ZeroLinear,
    attach,
    is_checkpointing,
    normalise,
    remember,
    remove,
)
from lrt.integrations.retrofit.pathway_config import TOLERANCES
from lrt.integrations.retrofit.training import train_output

if TYPE_CHECKING:
    Decoder = PreTrainedModel
else:
    Decoder = object
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What this version of transformers calls the cache. Under the other name it may be swallowed in silence."""
MOST_PASSES = 32
"""Over a text, before it is read token by token."""
AFTER_SAVING: list[Callable[[Path], None]] = []
"""What is done to a folder that was saved; nothing where this code comes from such a folder."""


class Recurrent(FollowsSchedule, Decoder):
    """In front of a decoder's class. It is never made alone: `model_class` puts it there."""

    _can_compile_fullgraph = False  # how many passes a text takes is known to Python, not to a graph
    _auto_class: str | None = None
    latent: nn.Module
    """The pathway: a `Pathway`, or what PEFT puts in its place."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        attach(self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Pathway | ZeroLinear):  # neutral, where a checkpoint has none of it
            for parameter in module.parameters():
                parameter.zero_()
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, and the code that loads the folder where lrt is not installed."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        for write in AFTER_SAVING:
            write(Path(save_directory))
        return saved

    @staticmethod
    def create_masks_for_generate(config: Any, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """The mask as generate() was given it: the pathway has to know what is padding."""
        return attention_mask

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        backbone: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The decoder's own output for input_ids (B, T) or inputs_embeds (B, T, D), live or, in `train()`, by the
        training schedule. attention_mask: (B, columns held + T), 0 for padding. `backbone`: of its stack alone.

        Where it is live gradients are those of the last pass, with the memory that it reads held fixed. A call with a
        cache is live whatever `PathwayConfig.scoring` says.
        """
        cache = past_key_values if cache is None else cache
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is None:
            raise ValueError("give input_ids or inputs_embeds")
        text = {"attention_mask": attention_mask, "position_ids": position_ids}
        text |= {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        out = None if backbone else {"labels": labels, "logits_to_keep": logits_to_keep, **kwargs}
        scheduled = {"auto": self.training or backbone, "schedule": True, "live": False}[self.config.pathway.scoring]
        if self.training and cache is not None and torch.is_grad_enabled():
            raise ValueError("a cache holds no gradients; train on whole texts, or call model.eval() to continue")
        if cache is None and scheduled:
            return train_output(self, text, out)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache and not (self.training or backbone):
            cache = DynamicCache(config=self.config)
        return self.run_live(text, out, cache)

    def detach(self) -> Any:
        """Take the pathway away, in place: the decoder that it was added to, as it is now. Returns the model."""
        config = self.config
        remove(self)
        config.__class__, self.__class__ = type(config).__bases__[1], type(self).__bases__[1]
        config.architectures = [type(self).__name__]
        for name in ("base_model_type", "latent_memory", "model_type", "auto_map"):  # what config.json brought, too
            vars(config).pop(name, None)
        return self

    # --- one pass ----------------------------------------------------------------------------------------------

    @property
    def stack(self) -> Any:
        """The decoder without a head."""
        return getattr(self, self.base_model_prefix)

    @property
    def base_model(self) -> Any:
        """The model as a source of hidden states for others' losses."""
        return Backbone(self)

    @property
    def _sources(self) -> tuple[int, ...]:
        return self.config.pathway.sources(self.config.num_hidden_layers)

    def run_pass(
        self,
        text: dict[str, Any],
        memory: Tensor,
        cache: Cache | None,
        out: dict[str, Any] | None = None,
        ends: bool = False,
    ) -> tuple[Any, Tensor]:
        """(the decoder's output, the memory (P, B, T, D) that it leaves) of one pass that reads `memory`.

        Without `out`, the arguments that decide what comes back, only the stack runs. With `ends`, no layer above those
        that are remembered: there is no output then, and keys and values are not to be read any more.
        """
        about, depth = self.config.pathway, self.config.num_hidden_layers
        # Checkpointed blocks project for themselves: a reentrant one would go backward through what they share.
        apart = about.projection == "layerwise" or (self.training and is_checkpointing(self))
        reading = Reading.of(self.latent, memory, None if apart else about.readers(depth)[0])
        arguments = {**text, CACHE: cache, "use_cache": cache is not None, KEYWORD: reading}
        output = None
        with remember(max(about.sources(depth)) if ends else None) as outputs:
            output = self.stack(**arguments) if out is None else super().forward(**arguments, **out)
        return output, self.memory_of(text, outputs)

    def memory_of(self, text: dict[str, Any], outputs: dict[int, Tensor]) -> Tensor:
        """(P, B, T, D), zeros for layers that have not run."""
        embedded = text.get("inputs_embeds")
        if embedded is None and (0 in self._sources or not outputs):
            embedded = self.get_input_embeddings()(text["input_ids"])
        like = embedded if embedded is not None else next(iter(outputs.values()))
        outputs = outputs if embedded is None else {**outputs, 0: embedded}
        return torch.stack([normalise(outputs[s]) if s in outputs else torch.zeros_like(like) for s in self._sources])

    # --- live --------------------------------------------------------------------------------------------------

    def run_live(self, text: dict[str, Any], out: dict[str, Any] | None, cache: Cache | None) -> Any:
        """The decoder's output for a text behind what the cache holds, by true recurrence; of its stack alone where
        there is no `out`. Gradients are those of the last pass, with the memory that it reads held fixed."""
        depth = self.config.num_hidden_layers
        if cache is not None:
            caches.check_cache(cache, depth)
        with torch.no_grad():
            known = self.memory_of(text, {})
            held, has = caches.read_last(cache, depth, known)
            before = predecessors(text, known.shape[1:3], has)
            memory = before.read(known, held)
            if known.shape[2] > 1 and any(self._sources):
                memory = self._settle(text, before, memory, held, cache)
        output, known = self.run_pass(text, memory, cache, out)
        if cache is not None:
            caches.append(cache, depth, known.detach(), before.real)
        return output

    def _settle(
        self, text: dict[str, Any], before: Predecessors, memory: Tensor, held: Tensor, cache: Cache | None
    ) -> Tensor:
        """The memory (P, B, T, D) that a last pass over the text reads, from passes over all of it; token by token
        where these do not settle soon."""
        mode, columns = self.config.pathway.prefill, memory.shape[2]
        if mode == "exact":
            return self._one_by_one(text, before, held, cache)
        tolerance = max(TOLERANCES[mode], torch.finfo(memory.dtype).eps)
        fork = cache if caches.held_columns(cache) else None  # where nothing is held a pass needs no cache
        move: float | None = None
        for number in range(1, columns):  # after columns - 1 passes all that is read is exact
            if number > MOST_PASSES:
                return self._one_by_one(text, before, held, cache)
            known = self.run_pass(text, memory, fork if fork is None else caches.fork(fork), ends=True)[1]
            new = before.read(known, held)
            last, move = move, largest_move(new, memory, before.real)
            memory = new
            if move <= tolerance and (number > 1 or move == 0):
                to_come = moves_to_come(move, move / last if last else None)
                if move == 0 or (to_come is not None and to_come <= tolerance):
                    break
        return memory

    def _one_by_one(self, text: dict[str, Any], before: Predecessors, held: Tensor, cache: Cache | None) -> Tensor:
        """The same, token by token: the reference."""
        cache = DynamicCache(config=self.config) if cache is None else caches.fork(cache)
        start, columns = caches.held_columns(cache), before.real.shape[1]
        known = held.expand(-1, -1, columns, -1).clone()
        for number in range(columns):
            memory = before.column(number).read(known, held)
            known[:, :, number : number + 1] = self.run_pass(column_of(text, number, start, columns), memory, cache)[1]
        return before.read(known, held)


class Backbone:
    """`base_model`: what tools call that bring a head and a loss of their own (TRL). All else is the stack's own.

    It runs the training schedule, in `eval()` as in `train()`, so that a preference loss scores its policy and its
    reference by the same means; live where `PathwayConfig.scoring` is "live".
    """

    def __init__(self, model: Recurrent) -> None:
        self.whole = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not by the model's own call, whose forward such tools replace, and whose hooks ran when they were called.
        return Recurrent.forward(self.whole, *args, backbone=True, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole.stack, name)


def largest_move(new: Tensor, old: Tensor, real: Tensor) -> float:
    """By how much of its length the memory (P, B, T, D) of a token changed at most; a memory has length √D."""
    moves = (new - old).float().norm(dim=-1) / new.shape[-1] ** 0.5
    return float(moves.masked_fill(~real, 0).max())


def column_of(text: dict[str, Any], column: int, held: int, columns: int) -> dict[str, Any]:
    """One column of a text behind `held` columns of the cache, with the part of the mask up to it."""
    part = dict(text)
    for name in ("input_ids", "inputs_embeds", "position_ids"):
        if text.get(name) is not None:
            part[name] = text[name][:, column : column + 1]
    mask = text["attention_mask"]
    if mask is not None:
        # A mask of the new columns alone says nothing of those in the cache, which are then all seen.
        missing = held + columns - mask.shape[1]
        mask = nn.functional.pad(mask, (missing, 0), value=1)
        part["attention_mask"] = mask[:, : held + column + 1]
    return part


@functools.cache
def model_class(base_type: str) -> type[Any]:
    """The class of a retrofitted decoder of this model type, known to transformers' Auto classes."""
    check_base(base_type)
    base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[base_type]]
    name, config = RetrofitForCausalLM.__name__, config_class(base_type)
    made = type(name, (Recurrent, base), {"__module__": __name__, "config_class": config})
    AutoModelForCausalLM.register(config, made)
    return made


class RetrofitForCausalLM(PreTrainedModel):
    """What config.json names: loading it gives a model of the decoder's own retrofitted class."""

    config_class = RetrofitConfig

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, of the decoder's class."""
        config: Any = kwargs.pop("config", None)
        if config is None:
            # A configuration would take "auto", which is no dtype, for its own.
            asked = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
            loaded: Any = RetrofitConfig.from_pretrained(path, return_unused_kwargs=True, **kwargs)
            config, kwargs = loaded[0], {**loaded[1], **asked}
        return model_class(config.base_model_type).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModelForCausalLM") -> None:
        """Note that the class comes from a folder, whose code is to be saved along: of all decoders' classes."""
        Recurrent._auto_class = auto_class if isinstance(auto_class, str) else auto_class.__name__

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return model_class(config.base_model_type)._from_config(config, **kwargs)
