"""What shape an answer is asked to have: `response_format` as OpenAI has it, `structured_outputs` as vLLM does."""

from __future__ import annotations

from typing import Any

from lrt.inference.grammar import KINDS, Grammar
from lrt.serve.errors import ApiError
from lrt.serve.models import ServedModel
from lrt.serve.protocol import GenerationBody, JsonObjectFormat, JsonSchemaFormat

ANY_OBJECT = {"type": "object"}


def asked_shapes(body: GenerationBody) -> list[tuple[str, str, Any]]:
    """(parameter, kind of grammar, its source) of all that a body asks for. ApiError 400 for shapes without one."""
    shapes: list[tuple[str, str, Any]] = []
    match body.response_format:
        case JsonObjectFormat():
            shapes.append(("response_format", "json", ANY_OBJECT))
        case JsonSchemaFormat(json_schema=schema):
            shapes.append(("response_format", "json", schema.schema_ if schema.schema_ is not None else ANY_OBJECT))
    if (outputs := body.structured_outputs) is not None:
        fields = {"json": outputs.json_, **{kind: vars(outputs)[kind] for kind in KINDS if kind != "json"}}
        fields["json_object"] = ANY_OBJECT if outputs.json_object else None
        asked = {name: source for name, source in fields.items() if source is not None}
        if not asked and outputs.json_object is None:
            raise ApiError(
                400, f"structured_outputs asks for no shape; give one of {', '.join(fields)}, or leave it out",
                param="structured_outputs",
            )  # fmt: skip
        for name, source in asked.items():
            shapes.append(("structured_outputs", "json" if name == "json_object" else name, source))
    return shapes


def answer_grammar(body: GenerationBody, model: ServedModel) -> Grammar | None:
    """What an answer may be; None where it may be anything. ApiError 400 where that cannot be followed."""
    shapes = asked_shapes(body)
    if not shapes:
        return None
    if len(shapes) > 1:
        raise ApiError(400, "the answer can have one shape; ask for one format, schema, regex, choice or grammar",
                       param=shapes[1][0])  # fmt: skip
    ((param, kind, source),) = shapes
    try:
        return model.grammars.compile(kind, source)
    except ValueError as error:
        raise ApiError(400, f"{param}: {error}", param=param) from error
