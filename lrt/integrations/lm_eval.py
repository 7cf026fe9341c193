"""EleutherAI's lm-evaluation-harness on a checkpoint, with true recurrence: `lrt evaluate --tasks`.

It is the harness's own Hugging Face adapter around `LRTForCausalLM`, so `lm_eval --model hf` on an exported folder
gives the same numbers wherever texts fit the context. Where they do not, the harness cuts BOS off with the beginning,
and the model never saw a text without it. Here BOS stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models import huggingface
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lrt.integrations.hf.export import prepend_bos, wrap_model
from lrt.model import checkpoint
from lrt.utils.progress import warn

# Both are behind decorators whose types the checker cannot read.
HFLM: Any = huggingface.HFLM
simple_evaluate: Any = lm_eval.simple_evaluate


Tokens = list[int]
PairTokens = tuple[Any, Tokens, Tokens]
"""What the harness remembers a request by, its context and its continuation."""
DEFAULT_NEW_TOKENS = 256
"""The harness's own, for tasks that name no `max_gen_toks`."""


class Adapter(HFLM):
    """The harness's own, except that every row begins with BOS and fits the context.

    Too long a prompt loses its beginning, BOS stays, and a line says so. A rolling text is cut into the windows of
    `lrt evaluate` (contract, section 4).
    """

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task does not say how many: at most half the context, so that a prompt fits."""
        return min(DEFAULT_NEW_TOKENS, self.max_length // 2)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether its tokens are the likeliest; an empty one is certain."""
        scores = iter(super().loglikelihood([r for r in requests if r.args[1]], disable_tqdm=disable_tqdm))
        return [next(scores) if r.args[1] else (0.0, True) for r in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text: of all its tokens, each scored once, in windows that start with BOS."""
        texts = [self.tok_encode(request.args[0])[1:] for request in requests]
        size = self.max_length - 1
        windows = [
            (i, (None, [self.prefix_token_id], text[first : first + size]))
            for i, text in enumerate(texts)
            for first in range(0, len(text), size)
        ]
        totals = [0.0] * len(texts)
        scores = self._loglikelihood_tokens([window for _, window in windows], disable_tqdm=disable_tqdm)
        for (i, _), (nats, _) in zip(windows, scores, strict=True):
            totals[i] += nats
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Each prompt's continuation. ValueError, before any is generated, where a task leaves no room for a prompt."""
        for request in requests:
            self.check_room(request.task_name, request.args[1])
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def check_room(self, task: str | None, options: dict[str, Any] | None) -> None:
        """ValueError unless BOS and a token of a prompt fit beside what a task's options ask to be generated."""
        limits: Any = normalize_gen_kwargs(options or {}, self.max_gen_toks)
        wanted = limits["max_gen_toks"]
        if not 1 <= wanted <= self.max_length - 2:
            raise ValueError(
                f"task {task} wants {wanted} new tokens (max_gen_toks), and this model's context of {self.max_length} "
                f"holds the prompt too; give 1 to {self.max_length - 2} in a copy of the task (--tasks-include)"
            )

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        # The harness finds an empty stop string in every text, and would end each after its first token.
        return super()._model_generate(context, max_length, [text for text in stop if text], **options)

    def _encode_pair(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        before, scored = super()._encode_pair(context, continuation)
        if scored:
            return before, scored
        # The tokenizer joins all of the continuation with what the context ends with: that token is scored.
        whole = self.tok_encode(context + continuation)
        return whole[:-1], whole[-1:]

    def _loglikelihood_tokens(
        self, requests: Sequence[PairTokens], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        longest = max((len(scored) for _, _, scored in requests), default=0)
        if longest > self.max_length:
            raise ValueError(
                f"a continuation of {longest:,} tokens is to be scored, and this model's context is {self.max_length}; "
                "leave the task out, or take a model with a longer context"
            )
        # The last token of a continuation is only predicted: it takes no place.
        rows = [(key, self._crop(before, self.max_length + 1 - len(c)), c) for key, before, c in requests]
        self._warn_of_cropped([before for _, before, _ in requests], [before for _, before, _ in rows])
        scores: dict[int, tuple[float, bool]] = {}
        # The harness computes rows of equal inputs once. That is right where their continuations have one token each.
        for self.logits_cache in (True, False):
            chosen = [i for i, row in enumerate(rows) if (len(row[2]) == 1) == self.logits_cache]
            part = super()._loglikelihood_tokens([rows[i] for i in chosen], disable_tqdm, override_bs)
            scores |= dict(zip(chosen, part, strict=True))
        return [scores[i] for i in range(len(rows))]

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Prompts as tokens and mask, each (B, T), padded; `left_truncate_len` tokens of each at most, BOS first."""
        whole = [self.tok_encode(string) for string in strings]
        rows = whole if left_truncate_len is None else [self._crop(row, left_truncate_len) for row in whole]
        self._warn_of_cropped(whole, rows)
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def _crop(self, tokens: Tokens, length: int) -> Tokens:
        """At most `length` tokens: BOS, and the end of what follows it."""
        assert tokens[0] == self.prefix_token_id
        return tokens if len(tokens) <= length else [tokens[0], *tokens[len(tokens) + 1 - length :]]

    def _warn_of_cropped(self, whole: Sequence[Tokens], rows: Sequence[Tokens]) -> None:
        cropped = sum(len(w) > len(r) for w, r in zip(whole, rows, strict=True))
        if cropped:
            warn(
                f"{cropped:,} of {len(rows):,} prompts do not fit this model's context of {self.max_length} tokens: "
                "their beginning is left out, after BOS"
            )


class RoomyTasks(TaskManager):
    """The harness's tasks, checked as soon as they are loaded: a ValueError comes before hours of other tasks."""

    def __init__(self, model: Adapter, include: Path | None) -> None:
        super().__init__(include_path=None if include is None else str(include))
        self.model = model

    def load(self, task_list: Any) -> Any:
        loaded = super().load(task_list)
        for name, task in loaded["tasks"].items():
            if task.OUTPUT_TYPE == "generate_until":
                self.model.check_room(name, task.config.generation_kwargs)
        return loaded


def make_adapter(source: Path | str, prefill: str = "converged", batch_size: int = 16, device: str = "cpu") -> Adapter:
    """A checkpoint as the harness's model; BOS opens every text, as in training."""
    native, tokenizer = checkpoint.load(source, device)
    model = wrap_model(native, tokenizer, checkpoint.about(source).get("schedule", "plain()"), prefill)
    special = tokenizer.inner.id_to_token(tokenizer.bos)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=prepend_bos(tokenizer), bos_token=special, eos_token=special, pad_token=special
    )
    return Adapter(
        pretrained=model,
        tokenizer=fast,
        batch_size=batch_size,
        max_length=native.config.context,
        add_bos_token=True,
    )


def run_tasks(
    source: Path | str,
    tasks: Sequence[str],
    prefill: str = "converged",
    batch_size: int = 16,
    limit: int | None = None,
    shots: int | None = None,
    include: Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """{task: {metric: value}}. `include` is a folder with tasks of one's own (YAML), `limit` items of each task.

    ValueError for tasks that the harness does not know, or that ask for more new tokens than the context holds.
    """
    model = make_adapter(source, prefill, batch_size, device)
    manager = RoomyTasks(model, include)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"lm-eval knows no task {', '.join(unknown)}; `lm_eval ls tasks` lists its own, --tasks-include adds yours"
        )
    report = simple_evaluate(model, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager)
    return {name: dict(metrics) for name, metrics in report["results"].items()}
