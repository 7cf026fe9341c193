"""What may be asked and what is answered, in the shapes of OpenAI's interface.

Requests are read strictly: nothing is converted or ignored, and what is not served is refused by name.

Parameters of OpenAI's that mean nothing here are accepted where they ask for nothing, and refused where they do
(`UNSUPPORTED`). `top_k`, `min_p`, `repetition_penalty`, `ignore_eos` and `chat_template_kwargs` are vLLM's; `prefill`
is ours.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from lrt.inference.sampling import REPETITION


def refuse_true(value: bool) -> bool:
    if value:
        raise PydanticCustomError("unsupported", "it must be false")
    return value


OnlyFalse = Annotated[bool, AfterValidator(refuse_true), Field(json_schema_extra={"const": False})]
"""A Literal would take 0 as well, which is equal."""
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
EmptyList = Annotated[list[Any], Field(max_length=0)]
Prefill = Literal["exact", "converged", "fast", "one_sweep"]
UNSUPPORTED = {
    "suffix": "an LRT writes forwards only; leave it out",
    "tools": "there are no tools; leave it out",
    "tool_choice": "there are no tools; leave it out",
    "functions": "there are no functions; leave it out",
    "function_call": "there are no functions; leave it out",
    "guided_json": 'vLLM has renamed it; give structured_outputs {"json": …}, or response_format',
    "guided_regex": 'vLLM has renamed it; give structured_outputs {"regex": …}',
    "guided_choice": 'vLLM has renamed it; give structured_outputs {"choice": […]}',
    "guided_grammar": 'vLLM has renamed it; give structured_outputs {"grammar": …}',
    "modalities": 'answers are text; leave it out, or give ["text"]',
    "audio": "answers are text; leave it out",
    "prediction": "leave it out",
    "moderation": "leave it out",
    "prompt_cache_options": "leave it out",
    "reasoning_effort": "leave it out",
    "verbosity": "leave it out",
    "web_search_options": "there is no web search; leave it out",
    "store": "nothing is stored; leave it out",
    "service_tier": "there is one; leave it out, or give auto or default",
}
"""Documented parameters that are refused unless they ask for nothing -> why, and what to do."""


class Strict(BaseModel):
    """Refuses what it does not know, and numbers in strings; NaN and infinity are no numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False
    """Send one more event, with the counts of tokens."""
    include_obfuscation: bool | None = None
    """Accepted; streams are not padded."""
    continuous_usage_stats: bool | None = None
    """Send the counts so far with every event (vLLM's)."""


class PlainFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    name: str = Field(min_length=1, max_length=200)
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None
    """Accepted: an answer always fits."""


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class StructuredOutputs(Strict):
    """vLLM's; one of the first five is given."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1024)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: None = None
    structural_tag: None = None


class GenerationBody(Strict):
    """What both of OpenAI's routes take."""

    model: str = Field(min_length=1, max_length=200, description="A name of /v1/models.")
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, description="-1 and 0: no cut.")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(ge=REPETITION[0], le=REPETITION[1])] | None = 1.0
    ignore_eos: bool | None = Field(False, description="Go on behind what ends a text or a turn, to `max_tokens`.")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: OnlyFalse | None = None
    service_tier: Literal["auto", "default"] | None = None
    prefill: Prefill | None = Field(None, description="How the prompt is computed; the server's way by default.")
    response_format: (
        Annotated[PlainFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None
    ) = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: None = None
    guided_regex: None = None
    guided_choice: None = None
    guided_grammar: None = None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(fail_fast=True)]
        | None
    ) = None
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: Literal[""] | None = None


class CacheControl(Strict):
    """Anthropic's mark of a prefix. Accepted without effect: `--prefixes` decides what is kept."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


class ChatTurn(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None = None
    """None: an assistant that wrote nothing."""
    name: str | None = None
    cache_control: CacheControl | None = None
    reasoning_content: str | None = None
    """Of another server's model; left out of the prompt, as that of earlier turns is there."""
    # What the clients' own answers hold beside the text, so that these can be sent back as they are.
    refusal: None = None
    annotations: EmptyList | None = None
    audio: None = None
    function_call: None = None
    tool_calls: EmptyList | None = None

    @model_validator(mode="after")
    def check_content(self) -> ChatTurn:
        """ValueError where somebody else than an assistant wrote nothing."""
        if self.content is None and self.role != "assistant":
            raise ValueError(f"messages: a turn of the {self.role} has no content; give it a text")
        return self


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatTurn], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the model's own chat template."""
    tools: EmptyList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: EmptyList | None = None
    function_call: Literal["none", "auto"] | None = None
    audio: None = None
    prediction: None = None
    moderation: None = None
    prompt_cache_options: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None


class GenerateBody(Strict):
    """POST /playground/generate."""

    model: str = Field(min_length=1, max_length=200)
    prompt: str = ""
    max_tokens: Annotated[int, Field(ge=0)] = 64
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.8
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.95
    seed: Annotated[int, Field(ge=-(2**53), le=2**53)] = 0
    prefill: Prefill = "converged"


class InspectBody(Strict):
    """POST /playground/inspect."""

    model: str = Field(min_length=1, max_length=200)
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, fail_fast=True)]


class ModelBody(Strict):
    """POST /v1/models/load and /v1/models/unload."""

    model: str = Field(min_length=1, max_length=200, description="A name of /v1/models.")


# --- answers ---------------------------------------------------------------------------------------------------
class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class Alternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class ChatAnswer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "lrt"
    max_model_len: int | None
    """Tokens of a prompt and its answer together; null: without end."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "shutting_down"]
    models: dict[str, Literal["ok", "degraded", "failed"]]
    """Of those that are loaded. degraded: some of its workers have failed."""


class Version(BaseModel):
    version: str


class LoadState(BaseModel):
    model: str
    status: Literal["loaded", "unchanged", "unloaded"]
