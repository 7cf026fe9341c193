"""LRTForCausalLM: a latent recurrent transformer as transformers expects one. Every number comes from true recurrence.

Shapes: B rows, T new columns of a call (padding included), D width, V vocabulary.

In `eval()` a call is a prefill of its tokens behind what the cache holds (`config.prefill`), a call with one token a
decoded token. In `train()` it is the training schedule (`config.schedule`), with gradients. `config.scoring` says where
`eval()` takes the schedule too. Adapters (LoRA) around any projection are called: what the model fuses uses a weight
only of a plain `nn.Linear`.

The id of padding may be one above the vocabulary, for which there is no embedding: tokenizers that are trained here
have no other that is free. It is never computed; where no mask is given it is what the mask would hide.
"""

from __future__ import annotations

import copy
import dataclasses
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lrt.data.batch import IGNORED
from lrt.inference.prefill import prefill
from lrt.integrations.hf.cache import Columns, append, check_cache, past, read_cache
from lrt.integrations.hf.configuration import LRTConfig, check_scoring
from lrt.integrations.hf.schedule_step import FollowsSchedule
from lrt.integrations.hf.unpadded import MISCOUNTED, Unpadded, is_packed, real_columns
from lrt.model.cross_entropy import token_nats
from lrt.model.execution import EAGER
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.base import Schedule, Simple
from lrt.schedules.loss import StepLoss
from lrt.schedules.parse import parse
from lrt.schedules.refinement import refine

GENERATION_MODES = ("greedy_search", "sample", "beam_search", "beam_sample", "assisted_generation")
CACHES = (None, "dynamic", "static")
COMPONENTS = ("get_encoder", "set_encoder", "get_decoder", "set_decoder")
"""What transformers asks a base model for, so that others may lie in it."""
HF_IGNORED = -100
"""What transformers writes where a label counts nowhere."""
CACHE_NAME = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
"""What this version of transformers calls the cache of an output."""


@dataclass
class LRTOutput(CausalLMOutputWithPast):
    """Loss, logits and cache, and what the logits were made of."""

    last_hidden_state: Tensor | None = None
    """(B, T, D), for those who bring a head and a loss of their own (TRL)."""


class Backbone:
    """`base_model`: what tools call that bring a head and a loss of their own, and that compare two models by it (TRL).

    By `config.scoring` "auto" it runs the training schedule in `eval()` as in `train()`: the reference of a preference
    loss stands in `eval()`, its policy in `train()`, and both have to be scored by the same means. All else is the
    model's own.
    """

    def __init__(self, model: LRTForCausalLM) -> None:
        self.whole = model

    def __call__(self, *args: Any, **kwargs: Any) -> LRTOutput | tuple[Tensor, ...]:
        scoring = self.whole.config.scoring
        scored = {"scoring": "schedule" if scoring == "auto" else scoring}
        # Not by the model's own call, whose forward such tools replace, and whose hooks ran when they were called.
        return LRTForCausalLM.forward(self.whole, *args, **{**scored, **kwargs})

    def __getattr__(self, name: str) -> Any:
        if name in COMPONENTS:  # which the model would look for here, and find itself again
            raise AttributeError(name)
        return getattr(self.whole, name)


class LRTForCausalLM(FollowsSchedule, PreTrainedModel, GenerationMixin):
    """A LatentRecurrentTransformer behind transformers' interface; `model.model` is the native one.

    Supports generate() with greedy decoding, sampling, beam search, assisted decoding (this model or another LRT as
    the draft), left or right padding and chunked prefill; Trainer, PEFT and TRL. What it does not support raises a
    ValueError that says what works.
    """

    config_class = LRTConfig
    base_model_prefix = ""  # the part without a head is this model too: see `LRTOutput.last_hidden_state`
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _can_compile_fullgraph = False  # what a State holds is known to Python, not to a graph
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' own convention)

    def __init__(self, config: LRTConfig) -> None:
        super().__init__(config)
        self.model = LatentRecurrentTransformer(config.model)
        self.post_init()

    @property
    def base_model(self) -> Any:
        """The model as a source of hidden states for others' losses."""
        return Backbone(self)

    def generate(self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any):  # type: ignore[override]
        """transformers' generate(), in the modes whose tokens tests hold against the native model's.

        Prompts padded on the right are moved to the right end of their rows, and come back so: what follows the
        columns of the prompt is new, as ever.
        """
        config = copy.deepcopy(generation_config or self.generation_config)
        config.update(**kwargs)
        # An allow-list: a mode that is not known to carry the memory along would give other tokens in silence.
        mode = config.get_generation_mode(kwargs.get("assistant_model")).value
        if mode not in GENERATION_MODES:
            raise ValueError(f"{mode} is not supported by an LRT; what works: {', '.join(GENERATION_MODES)}")
        if config.cache_implementation not in CACHES:
            raise ValueError(
                f"cache_implementation {config.cache_implementation!r} is not supported by an LRT; choose one of "
                f"{', '.join(map(str, CACHES))}"
            )
        kwargs["scoring"] = "live"
        prompt = kwargs.pop("input_ids", None) if inputs is None else inputs
        if prompt is not None:
            caches = [kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None]
            held = int(caches[0].get_seq_length()) if caches else 0
            mask = kwargs.get("attention_mask")
            mask = self._mask_of_padding(prompt) if mask is None else mask
            inputs, moved = pad_left(prompt, mask, kwargs.get("position_ids"), held)
            kwargs |= moved
            if not self.config.model.unlimited_context:
                check_room(self.config.model.context, inputs, kwargs.get("attention_mask"), config)
        return super().generate(inputs, generation_config, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def padding(self) -> int | None:
        """The id of padding where it is above the vocabulary; None where it is one of its tokens."""
        pad = self.config.pad_token_id
        return pad if pad is not None and pad >= self.config.vocab_size else None

    def _mask_of_padding(self, ids: Tensor) -> Tensor | None:
        """A mask (B, T) that hides padding above the vocabulary; None where there is none."""
        if self.padding is None or not bool((ids == self.padding).any()):
            return None
        return (ids != self.padding).long()

    @staticmethod
    def create_masks_for_generate(config: LRTConfig, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """The mask as generate() was given it: the model needs to know what is padding, not what is causal."""
        return attention_mask

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the model initialises itself when made, and a checkpoint has all weights (`from_pretrained`)."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """transformers' own; ValueError where weights are missing, which it would leave at whatever memory held."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(f"the checkpoint lacks {', '.join(missing[:5])}; export or copy it again")
        return (model, info) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Only the size it has: value embeddings and head belong to one vocabulary. Padding needs no embedding."""
        sizes = {None, self.config.vocab_size} | (set() if self.padding is None else {self.padding + 1})
        if new_num_tokens not in sizes:
            raise ValueError(
                f"the vocabulary of an LRT is fixed ({self.config.vocab_size} tokens, {new_num_tokens} asked for); use "
                "tokens that its tokenizer has"
            )
        return self.model.embedding

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
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        scoring: str | None = None,
        **kwargs: Any,
    ) -> LRTOutput | tuple[Tensor, ...]:
        """Logits (B, T, V) of input_ids (B, T), and the loss where there are labels (B, T).

        attention_mask (B, T), or (B, columns held + T): 0 for padding, at either side. position_ids must count each
        row's real tokens; without a cache they may begin anew, which starts a packed text, computed as its own row.
        labels are those of the inputs themselves, -100 where ignored; `num_items_in_batch` is Trainer's count for
        accumulated batches. `scoring` stands for `config.scoring` in this call: "schedule" runs the training schedule
        in `eval()` too, with the numbers and gradients of `train()`; "live" is true recurrence in `train()` too, with
        the gradients of one last pass; a call with a cache is live whatever it says. Where `eval()` is live no
        gradients are made, so that no wrong ones can be.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError(
                "an LRT reads token ids (its memory may contain their embedding); pass input_ids, not inputs_embeds"
            )
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name):
                raise ValueError(f"{name} is not supported; lrt.refine on model.model gives hidden states")
        cache = past_key_values if cache is None else cache
        if self.padding is not None:
            attention_mask = self._mask_of_padding(input_ids) if attention_mask is None else attention_mask
            labels = None if labels is None else labels.masked_fill(labels == self.padding, HF_IGNORED)
            # generate() fills the rows that have ended with padding, and shows it: it is computed as another end.
            input_ids = input_ids.masked_fill(input_ids == self.padding, self.config.bos_token_id or 0)
        check_scoring(scoring or self.config.scoring)
        scoring = scoring or self.config.scoring
        if self.training and cache is not None and torch.is_grad_enabled():
            raise ValueError("a cache holds no gradients; train on whole sequences, or call model.eval() to continue")
        graded = cache is None and (self.training or scoring == "schedule")
        if graded and scoring == "live":
            hidden = self._recur_graded(input_ids, attention_mask, position_ids)
            if labels is not None:
                items = num_items_in_batch
                loss = self._loss(hidden, input_ids, labels, attention_mask, position_ids, items)
            else:
                loss = None
        elif graded:
            hidden, loss = self._train(input_ids, attention_mask, position_ids, labels, num_items_in_batch)
        else:
            with torch.no_grad():
                use_cache = self.config.use_cache if use_cache is None else use_cache
                if cache is None and use_cache and not is_packed(input_ids, attention_mask, position_ids):
                    cache = DynamicCache(config=self.config)
                hidden = self._recur(input_ids, attention_mask, position_ids, cache)
                loss = None if labels is None else self._loss(hidden, input_ids, labels, attention_mask, position_ids)
        # Their convention: a number counts from the end (0: all), a tensor names the columns.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        with torch.set_grad_enabled(graded and torch.is_grad_enabled()):
            logits = self.model.logits(hidden[:, kept])
        fields: dict[str, Any] = {CACHE_NAME: cache}
        output = LRTOutput(loss=loss, logits=logits, last_hidden_state=hidden, **fields)
        return output if return_dict is not False else output.to_tuple()

    def _recur(self, ids: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None) -> Tensor:
        """Hidden states (B, T, D) of new columns behind those of the cache, with true recurrence; zeros in padding."""
        config = self.config.model
        if cache is None:
            rows = Unpadded.of(ids, mask, position_ids)
            tokens, lengths = rows.split(ids, 0), (rows.index >= 0).sum(1)
            if not config.unlimited_context and tokens.shape[1] > config.context:
                raise ValueError(
                    f"{tokens.shape[1]} positions exceed the context of {config.context}; shorten the text"
                )
            state = self.model.empty_state(tokens.shape[0], tokens.shape[1]).in_place()
            return rows.join(prefill(self.model, tokens, state, self.config.prefill, lengths).sequence, ids.shape)
        known = past(check_cache(cache, config.kv_layers), config.kv_layers)
        columns = Columns.of(real_columns(ids, mask, known))
        tokens = columns.compact(ids, 1)
        state, start = read_cache(cache, config, tokens, columns, self.model.embedding.weight)
        check_positions(position_ids, start, columns)
        if bool((columns.lengths == 0).all()):
            raise ValueError("attention_mask leaves no token of this call; give at least one per row (BOS will do)")
        # A row that has only padding in this call computes one token, of which nothing is kept.
        out = prefill(self.model, tokens, state, self.config.prefill, columns.lengths.clamp(min=1))
        append(cache, config, out.state, start, tokens, columns)
        hidden = nn.functional.pad(out.sequence, (0, 0, 0, ids.shape[1] - out.sequence.shape[1]))
        return columns.spread(hidden, 1)

    def _recur_graded(self, ids: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Hidden states (B, T, D) with true recurrence and the gradients of one pass that reads the memory it settles
        to, which is held fixed; zeros in padding."""
        rows = Unpadded.of(ids, mask, position_ids)
        tokens, lengths = rows.split(ids, 0), (rows.index >= 0).sum(1)
        state = self.model.empty_state(tokens.shape[0], tokens.shape[1])
        settled = prefill(self.model, tokens, state, self.config.prefill, lengths).state
        hidden, _ = self.model(tokens, range(tokens.shape[1]), settled)
        return rows.join(hidden, ids.shape)

    def _loss(
        self,
        hidden: Tensor,
        ids: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        items: Tensor | int | None = None,
    ) -> Tensor:
        """Mean nats of the labels (B, T) under live hidden states (B, T, D); nothing foretells a text's first token.
        `items`: how many there are in the accumulated batch of which these are a share."""
        new = None if mask is None else mask[:, -ids.shape[1] :]
        starts = position_ids if is_packed(ids, new, position_ids) else None
        rows = Unpadded.of(ids, new, starts)
        targets = shift_labels(rows.split(labels, HF_IGNORED))
        nats = token_nats(self.model, hidden.flatten(0, 1)[rows.index.clamp(min=0)], targets)
        return nats.sum() / ((targets != IGNORED).sum() if items is None else items)

    def _train(
        self,
        ids: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor | None,
        items: Tensor | int | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states (B, T, D) by the last pass of the training schedule, and the loss over its passes."""
        rows = Unpadded.of(ids, mask, position_ids)
        tokens = rows.split(ids, 0)
        targets = None if labels is None else shift_labels(rows.split(labels, HF_IGNORED))
        schedule = parse(self.config.schedule)
        schedule = self.schedule_now(schedule) if labels is not None else draw_for(schedule, tokens)
        out = refine(self.model, tokens, schedule, execution=EAGER)
        loss = None
        if targets is not None and items is not None and bool((targets == IGNORED).all()):
            loss = 0 * out.hidden.sum()  # nothing of an accumulated batch is here: a loss with gradients, all zero
        elif targets is not None:
            loss = StepLoss.of(schedule, [targets]).over(self.model, [hidden for _, _, hidden in out.passes], targets)
            if items is not None:  # a share of an accumulated batch
                loss = loss * (targets != IGNORED).sum() / items
        return rows.join(out.hidden, ids.shape), loss


def draw_for(schedule: Schedule, tokens: Tensor) -> Schedule:
    """What a mixture draws for tokens (B, T): the same for the same rows, so that two models are scored by one."""
    if isinstance(schedule, Simple):
        return schedule
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(tokens.cpu().numpy().tobytes()))
        return schedule.draw()


def pad_left(
    ids: Tensor, mask: Tensor | None, position_ids: Tensor | None, held: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """(ids (B, T), mask and position_ids, as far as there are any) with each row's padding before its new tokens.

    The first `held` columns are in the cache, and stay. generate() reads the next token off the last column.
    """
    others = {"attention_mask": mask, "position_ids": position_ids}
    kept = {name: tensor for name, tensor in others.items() if tensor is not None}
    if mask is None or mask.shape != ids.shape or bool(mask[:, -1].all()):
        return ids, kept
    order = torch.argsort(mask[:, held:].bool().to(torch.uint8), dim=1, stable=True)  # stable: tokens keep their order
    index = torch.arange(held, device=ids.device).expand(len(ids), held)
    order = torch.cat((index, order + held), 1)
    return ids.gather(1, order), {name: t.expand_as(ids).gather(1, order) for name, t in kept.items()}


def check_room(context: int, prompt: Tensor, mask: Tensor | None, config: GenerationConfig) -> None:
    """ValueError before any work where prompt and new tokens exceed the context."""
    width = prompt.shape[1]
    longest = width if mask is None else int(mask.sum(1).max())
    new = config.max_new_tokens if config.max_new_tokens is not None else (config.max_length or width) - width
    if longest + new - 1 > context:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones exceed the context of {context}; shorten one of them, "
            "or use a model in which every layer has a sliding window"
        )


def check_positions(position_ids: Tensor | None, start: Tensor, columns: Columns) -> None:
    """ValueError where positions do not count the real tokens of each row: they would be ignored, not obeyed."""
    if position_ids is None:
        return
    positions = columns.compact(position_ids.expand(len(start), -1), 1)
    index = torch.arange(positions.shape[1], device=positions.device)
    counted = (positions == start.unsqueeze(1) + index) | (index >= columns.lengths.unsqueeze(1))  # padding may be any
    if not bool(counted.all()):
        raise ValueError(MISCOUNTED)


def shift_labels(labels: Tensor) -> Tensor:
    """Targets (B, T) from labels (B, T): the next one, IGNORED at the end and where transformers ignores."""
    targets = torch.cat((labels[:, 1:], labels.new_full((len(labels), 1), HF_IGNORED)), dim=1)
    return targets.masked_fill(targets == HF_IGNORED, IGNORED)


# transformers shifts the labels (for label smoothing) only for the models that this table names.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(LRTConfig.model_type, LRTForCausalLM.__name__)
