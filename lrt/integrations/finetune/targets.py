"""What is fine-tuned: a run of lrt, or a folder of transformers. How its rows become tokens, and how it is saved.

A run's conversations are written as `lrt chat` and `lrt serve` write them, token by token; a folder's by transformers,
with its tokenizer's own template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoModelForCausalLM, AutoTokenizer

import lrt.integrations.retrofit  # noqa: F401  (so that retrofitted folders are known)
from lrt.data.tokenizer import Tokenizer
from lrt.inference.chat_template import ChatTemplate, Message, Part, turn_tokens
from lrt.inference.jinja_template import choose_template, copy_template
from lrt.integrations.hf.export import wrap_model, wrap_tokenizer
from lrt.integrations.retrofit.configuration import MODEL_TYPE
from lrt.model import checkpoint

RUN_PROJECTIONS = ["query", "key", "value", "out", "up", "down"]
"""Of an LRT's blocks: what adapters are put around."""


class FinetuneTarget(Protocol):
    """A model of transformers, and what belongs to it."""

    @property
    def source(self) -> Path:
        """The folder that it was read from."""
        ...

    @property
    def model(self) -> Any: ...

    @property
    def tokenizer(self) -> Any:
        """transformers' own."""
        ...

    @property
    def has_pathway(self) -> bool:
        """Whether the model is a retrofitted one."""
        ...

    @property
    def lora_fields(self) -> dict[str, Any]:
        """Fields of PEFT's LoraConfig: what adapters are put around, and what is trained whole beside them."""
        ...

    def rows(self, rows: Sequence[dict[str, Any]], length: int) -> list[dict[str, Any]]:
        """What TRL takes for rows of `read_rows`."""
        ...

    def save(self, model: Any, out: Path) -> None:
        """Write the trained model to a new folder."""
        ...


def open_target(source: Path, template: str | None) -> FinetuneTarget:
    """A run, checkpoint or folder of transformers. ValueError, naming it, where it is none of them."""
    if (source / "config.json").is_file() and not (source / "manifest.json").exists():
        if template is not None:
            raise ValueError(
                f"{source} is a folder of transformers, whose tokenizer has its own template; leave it out"
            )
        return TransformersTarget.open(source)
    return LRTTarget.open(source, template)


@dataclass(frozen=True)
class LRTTarget:
    """An LRT, trained here."""

    source: Path
    model: Any
    tokenizer: Any
    lora_fields: dict[str, Any]
    own: Tokenizer
    template: ChatTemplate
    about: dict[str, Any]
    has_pathway: bool = False

    @classmethod
    def open(cls, source: Path, template: str | None) -> LRTTarget:
        """A run's folder or a checkpoint's."""
        native, own = checkpoint.load(source)
        about = checkpoint.about(source)
        model = wrap_model(native, own, about.get("schedule", "plain()"), "converged")
        tokenizer = wrap_tokenizer(own, native.config.context)
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        _, written = choose_template(own, template, checkpoint.verify(source))
        return cls(source, model, tokenizer, {"target_modules": RUN_PROJECTIONS}, own, written, about)

    def rows(self, rows: Sequence[dict[str, Any]], length: int) -> list[dict[str, Any]]:
        limit = min(length, self.model.config.model.context)
        pairs = [self.encode(row) for row in rows]
        return [{"input_ids": ids[:limit], "assistant_masks": mask[:limit]} for ids, mask in pairs]

    def encode(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        """(tokens, 1 for those that are learned) of a row. BOS opens a text, and ends it."""
        bos = self.own.bos
        if "messages" in row:
            return masked_turns(self.own, self.template, [Message(m["role"], m["content"]) for m in row["messages"]])
        prompt = [bos, *self.own.encode(row["prompt"])] if "prompt" in row else [bos]
        answer = [*self.own.encode(row["completion"] if "prompt" in row else row["text"]), bos]
        return prompt + answer, [0] * len(prompt) + [1] * len(answer)

    def save(self, model: Any, out: Path) -> None:
        # Not the scores and counts of its training, which these weights have not got.
        kept = {name: self.about[name] for name in ("schedule", "plugins") if name in self.about}
        checkpoint.save(out, model.model, self.own, {**kept, "finetuned": True})
        copy_template(checkpoint.verify(self.source), out)


@dataclass(frozen=True)
class TransformersTarget:
    """A causal language model of transformers."""

    source: Path
    model: Any
    tokenizer: Any
    lora_fields: dict[str, Any]
    has_pathway: bool

    @classmethod
    def open(cls, source: Path) -> TransformersTarget:
        """A folder as transformers saves it."""
        tokenizer = AutoTokenizer.from_pretrained(source)
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {source} has no token that ends a text; name one as eos_token in its "
                "tokenizer_config.json"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        return cls.of(source, model, tokenizer)

    @classmethod
    def of(cls, source: Path, model: Any, tokenizer: Any) -> TransformersTarget:
        """A model that was read from `source`."""
        fields: dict[str, Any] = {"target_modules": "all-linear"}
        if model.config.model_type == MODEL_TYPE:
            fields |= {"modules_to_save": ["latent"], "exclude_modules": r"latent\..*"}
        return cls(source, model, tokenizer, fields, model.config.model_type == MODEL_TYPE)

    def rows(self, rows: Sequence[dict[str, Any]], length: int) -> list[dict[str, Any]]:
        if "messages" in rows[0] and not self.tokenizer.chat_template:
            raise ValueError(
                "this tokenizer has no chat template; put one into its tokenizer_config.json, or give prompts and "
                "completions"
            )
        return list(rows)

    def save(self, model: Any, out: Path) -> None:
        model.save_pretrained(out)
        self.tokenizer.save_pretrained(out)


def masked_turns(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message]
) -> tuple[list[int], list[int]]:
    """(tokens, 1 for the assistant's and for what ends its turns) of a conversation, up to its last answer.

    ValueError where its turns are in no order that the template can write.
    """
    ids, mask = [tokenizer.bos], [0]

    def write(parts: Sequence[Part], counted: int) -> None:
        new = turn_tokens(tokenizer, template, parts)
        ids.extend(new)
        mask.extend([counted] * len(new))

    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    for number in answers:
        earlier = messages[:number]
        write(template.parts(earlier) if number == answers[0] else template.continuation(earlier, ended=True), 0)
        write([(messages[number].text, True), *template.ending], 1)
    if answers:
        write(template.closing(ended=True), 0)
    return ids, mask
