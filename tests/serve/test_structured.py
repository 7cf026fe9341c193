"""Answers in the shape that is asked for, on both routes, streamed and not; and a model's own chat template."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field
from support.server import CHATML, Live, live, saved

from lrt.inference.jinja_template import JinjaTemplate

TURNS: Any = [{"role": "user", "content": "hello there"}]
OWN_TEMPLATE = """{%- if messages[0].role == 'system' %}{{ raise_exception('no system turn, please') }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ ': ' ~ m.content ~ '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant: ' ~ mood | default('') }}{% endif %}"""


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("models")
    folders = [saved(root / "lrt", *CHATML), saved(root / "own", *CHATML), saved(root / "bare")]
    (folders[1] / "chat_template.jinja").write_text(OWN_TEMPLATE)
    with live(*folders) as running:
        yield running
        assert running.idle()


def test_the_official_client_gets_objects(up: Live):
    done = up.client().chat.completions.parse(
        model="lrt", messages=TURNS, response_format=Person, n=4, seed=1, max_tokens=150
    )
    people = [choice.message.parsed for choice in done.choices]
    assert all(isinstance(person, Person) for person in people)
    assert {choice.finish_reason for choice in done.choices} == {"stop"}
    whole = [choice.message.content for choice in done.choices]
    texts = [""] * 4
    schema: Any = {"type": "json_schema", "json_schema": {"name": "p", "schema": Person.model_json_schema()}}
    for chunk in up.client().chat.completions.create(
        model="lrt", messages=TURNS, response_format=schema, n=4, seed=1, max_tokens=150, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert len(set(texts)) == 4
    assert [Person.model_validate_json(text) for text in texts] == people
    assert [json.loads(text or "") for text in whole] == [json.loads(text) for text in texts]


def test_any_object_is_json(up: Live):
    asked = {"response_format": {"type": "json_object"}, "logit_bias": {"93": 5}}  # "}", so that it ends
    body = {"model": "lrt", "prompt": "x", "max_tokens": 200, "n": 8, "seed": 0} | asked
    choices = httpx.post(f"{up.url}/v1/completions", json=body, timeout=60).json()["choices"]
    ended = [choice["text"] for choice in choices if choice["finish_reason"] == "stop"]
    assert ended
    assert all(isinstance(json.loads(text), dict) for text in ended)


@pytest.mark.parametrize(
    ("shape", "pattern"),
    [
        ({"regex": "[a-c]{3}-[0-9]+x"}, "[a-c]{3}-[0-9]+x"),
        ({"choice": ["yes", "no", "don't\nknow"]}, "yes|no|don't\nknow"),
        ({"grammar": 'start: ("ab" | "c")+ "."'}, r"(ab|c)+\."),
        ({"json": {"enum": [1, "two"]}}, '1|"two"'),
        ({"json": '{"const": true}', "whitespace_pattern": None}, "true"),
    ],
)
def test_vllms_parameters_shape_completions_and_chats(up: Live, shape: dict[str, Any], pattern: str):
    for model in ("lrt", "own"):
        extra = {"structured_outputs": shape}
        client = up.client()
        fields: dict[str, Any] = {"model": model, "n": 3, "max_tokens": 100, "seed": 4, "extra_body": extra}
        plain = client.completions.create(prompt="x", **fields).choices
        chat = client.chat.completions.create(messages=TURNS, **fields).choices
        texts = [choice.text for choice in plain if choice.finish_reason == "stop"]
        texts += [choice.message.content or "" for choice in chat if choice.finish_reason == "stop"]
        assert len(texts) > 3
        assert all(re.fullmatch(pattern, text) for text in texts), texts


WRONG = [
    ({"structured_outputs": {"regex": "("}}, "structured_outputs: the regex cannot be followed"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "the answer can have one shape"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "one shape"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}},
     "response_format: the json cannot be followed: Invalid type: no"),
    ({"response_format": {"type": "xml"}}, "response_format: "),
    ({"structured_outputs": {"regex": "(a{1000}){1000}"}, "max_tokens": 40}, "too large to follow; ask for a simpler"),
    ({"structured_outputs": {"regex": "x" * 70_000}}, "has 70,000 characters, 65,536 are taken"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs"),
    ({"structured_outputs": {}}, "asks for no shape; give one of json, regex, choice, grammar, json_object"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name: it is miss"),
    ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x: unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_a_shape_that_cannot_be_followed_is_a_400(up: Live, fields: dict[str, Any], message: str):
    answer = httpx.post(f"{up.url}/v1/completions", json={"model": "lrt", "prompt": "x"} | fields, timeout=60)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert up.idle()


def test_no_shape_and_an_empty_one(up: Live):
    create = up.client().completions.create
    fields: dict[str, Any] = {"model": "lrt", "prompt": "x", "max_tokens": 3}
    free = create(**fields, extra_body={"structured_outputs": {"json_object": False}, "ignore_eos": True})
    assert free.choices[0].finish_reason == "length"
    empty = create(**fields, extra_body={"structured_outputs": {"regex": ""}, "ignore_eos": True})
    assert (empty.choices[0].text, empty.choices[0].finish_reason) == ("", "stop")


def test_what_all_shapes_share_is_made_before_the_first_request(up: Live):
    assert "_vocabulary" in vars(up.registry.find("bare").grammars)


def test_a_shape_is_compiled_beside_the_event_loop(up: Live, monkeypatch: pytest.MonkeyPatch):
    compiler = up.registry.find("lrt").grammars
    compile_grammar, entered, release = compiler.compile, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        entered.set()
        assert release.wait(30)
        return compile_grammar(*arguments)

    monkeypatch.setattr(compiler, "compile", slow)
    body = {"model": "lrt", "prompt": "x", "structured_outputs": {"choice": ["yes"]}}
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{up.url}/v1/completions", json=body)))
    asking.start()
    assert entered.wait(30)
    begin = time.monotonic()
    assert httpx.get(f"{up.url}/healthz", timeout=20).status_code == 200
    release.set()
    asking.join()
    assert time.monotonic() - begin < 20
    assert answers[0].json()["choices"][0]["text"] == "yes"


def prompt_tokens(up: Live, **fields: Any) -> int:
    done = up.client().chat.completions.create(**{"model": "own", "messages": TURNS, "max_tokens": 1} | fields)
    assert done.usage is not None
    return done.usage.prompt_tokens


def test_a_models_own_template_writes_its_chats(up: Live):
    words = up.registry.find("own").tokenizer
    text = "<|im_start|>user: hello there<|im_end|><|im_start|>assistant: "
    names = {name: i for i, name in enumerate(CHATML)}
    pieces = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    expected = 1 + sum(1 if piece in names else len(words.encode(piece)) for piece in pieces)
    assert prompt_tokens(up) == expected
    longer = prompt_tokens(up, extra_body={"chat_template_kwargs": {"mood": "hello"}})
    assert longer > expected
    spelled: Any = [{"role": "user", "content": "<|im_end|>"}]
    assert prompt_tokens(up, messages=spelled) > 1 + 4 + len(words.encode("user: assistant: "))


def test_a_models_own_template_is_written_beside_the_event_loop(up: Live, monkeypatch: pytest.MonkeyPatch):
    parts, within_loop = JinjaTemplate.parts, []

    def noted(*arguments: Any) -> Any:
        try:
            within_loop.append(bool(asyncio.get_running_loop()))
        except RuntimeError:
            within_loop.append(False)
        return parts(*arguments)

    monkeypatch.setattr(JinjaTemplate, "parts", noted)
    assert prompt_tokens(up) > 0
    assert within_loop == [False]


def test_a_template_that_refuses_is_a_400_in_its_words(up: Live):
    system: Any = [{"role": "system", "content": "x"}, *TURNS]
    with pytest.raises(
        openai.BadRequestError, match="the chat template refuses these messages: no system turn, please"
    ):
        prompt_tokens(up, messages=system)
    with pytest.raises(openai.BadRequestError, match="cannot be given 'messages'; leave it out") as own:
        prompt_tokens(up, extra_body={"chat_template_kwargs": {"messages": []}})
    with pytest.raises(openai.BadRequestError, match="this chat template has no options such as 'mood'") as none:
        prompt_tokens(up, model="lrt", extra_body={"chat_template_kwargs": {"mood": "x"}})
    assert own.value.param == none.value.param == "chat_template_kwargs"


def test_a_wrong_template_is_named_when_the_server_starts(tmp_path: Path):
    folder = saved(tmp_path / "lrt", *CHATML)
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: the chat template is no Jinja"), live(folder):
        pass
