"""One promise: what clients of other servers send is taken where it asks for nothing, served where it can be, else
refused in words that name it."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import ValidationError
from support.server import Live, live

from lrt.serve.config import Settings
from lrt.serve.errors import REFUSED_ROUTES, validation_error
from lrt.serve.protocol import ChatBody, CompletionBody
from lrt.serve.registry import PROVIDERS
from lrt.utils.imports import DISTRIBUTION

KEYS = ("0123456789abcdef0123", "fedcba9876543210fedc")
PROMPT = "hello naïve"


def complete(up: Live, **fields: Any) -> dict[str, Any]:
    """The answer to a completion of 24 tokens."""
    body = {"model": "lrt", "prompt": PROMPT, "seed": 5, "max_tokens": 24} | fields
    answer = httpx.post(f"{up.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(up: Live, **fields: Any) -> str:
    return complete(up, **fields)["choices"][0]["text"]


def chat(up: Live, *turns: dict[str, Any], **fields: Any) -> httpx.Response:
    body = {"model": "lrt", "messages": list(turns), "seed": 3, "max_tokens": 4} | fields
    return httpx.post(f"{up.url}/v1/chat/completions", json=body, timeout=60)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


NOTHING = {
    "top_k": -1, "min_p": 0, "repetition_penalty": 1, "ignore_eos": False, "store": False, "service_tier": "default",
    "metadata": {"run": "a"}, "stop": [], "logit_bias": {}, "user": "me", "stream_options": None,
}  # fmt: skip


def test_what_asks_for_nothing_changes_nothing(up: Live):
    plain = text_of(up)
    assert text_of(up, **NOTHING) == text_of(up, top_k=0, min_p=0.0) == text_of(up, min_p=None) == plain
    turn = {"role": "user", "content": "x"}
    answers = [chat(up, turn), chat(up, turn, **NOTHING, chat_template_kwargs={}, max_completion_tokens=4)]
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1


def test_min_p_and_the_penalty_of_repetitions_are_served(up: Live):
    likeliest = text_of(up, temperature=0)
    assert text_of(up, min_p=1) == likeliest  # whatever is drawn, only the likeliest stays
    assert text_of(up, min_p=0.02) != text_of(up, min_p=1)
    words = up.registry.find("lrt").tokenizer
    letter = next(i for i in range(words.vocab_size) if words.spelling(i) == b"e")
    fields = {"temperature": 0, "logit_bias": {str(letter): 100}}
    assert text_of(up, **fields) == "e" * 24
    # Every token that there was is much less likely: greedy decoding repeats none.
    drawn = complete(up, temperature=0, repetition_penalty=100, logprobs=0)["choices"][0]["logprobs"]["tokens"]
    assert len(set(drawn)) == len(drawn)
    assert len(set(complete(up, temperature=0, logprobs=0)["choices"][0]["logprobs"]["tokens"])) < len(drawn)


def test_what_ends_a_text_can_be_ignored(up: Live):
    words = up.registry.find("lrt").tokenizer
    bias = {str(words.bos): 100}
    assert complete(up, logit_bias=bias)["choices"][0]["finish_reason"] == "stop"
    whole = complete(up, logit_bias=bias, ignore_eos=True)
    assert (whole["choices"][0]["finish_reason"], whole["usage"]["completion_tokens"]) == ("length", 24)
    end = words.inner.token_to_id("<|im_end|>")
    ended, ignored = (
        chat(up, {"role": "user", "content": "x"}, logit_bias={str(end): 100}, ignore_eos=ignore).json()
        for ignore in (False, True)
    )
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert ignored["usage"]["completion_tokens"] == 4
    assert ignored["choices"][0]["message"]["content"] == ""  # nothing of the special tokens is shown


@pytest.mark.parametrize("n", [1, 2])
def test_counts_come_with_every_event_where_they_are_asked_for(up: Live, n: int):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "lrt", "prompt": PROMPT, "seed": 5, "max_tokens": 12, "n": n, "stream": True}
    chunks = events(httpx.post(f"{up.url}/v1/completions", json=body | {"stream_options": options}, timeout=60))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == 12 * n
    assert chunks[-1]["choices"] == []
    assert all(
        c["usage"]["total_tokens"] == c["usage"]["prompt_tokens"] + k for c, k in zip(chunks, counts, strict=True)
    )
    plain = events(httpx.post(f"{up.url}/v1/completions", json=body, timeout=60))
    assert all("usage" not in chunk for chunk in plain)
    alone = events(
        httpx.post(f"{up.url}/v1/completions", json=body | {"stream_options": {"continuous_usage_stats": True}})
    )
    assert all(chunk["usage"] and chunk["choices"] for chunk in alone)


def test_turns_as_other_clients_write_them(up: Live):
    mark = {"type": "ephemeral", "ttl": "5m"}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "hello", "cache_control": mark}]},
        {"role": "assistant", "content": None, "reasoning_content": "thought about it", "tool_calls": []},
        {"role": "user", "content": "so", "cache_control": {"type": "ephemeral"}},
    ]
    plain = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ""}, turns[2] | {"name": "me"}]
    ours, theirs = chat(up, *turns).json(), chat(up, *plain).json()
    assert ours["usage"] == theirs["usage"]
    assert ours["choices"] == theirs["choices"]
    refused = chat(up, {"role": "user", "content": None})
    assert refused.status_code == 400
    assert "a turn of the user has no content; give it a text" in refused.json()["error"]["message"]


def test_two_names_of_one_limit_may_agree(up: Live):
    turn = {"role": "user", "content": "x"}
    assert chat(up, turn, max_completion_tokens=4).json()["usage"]["completion_tokens"] <= 4
    refused = chat(up, turn, max_completion_tokens=5)
    message = "max_tokens is 4 and max_completion_tokens is 5; they mean the same: give one of them"
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, message)


def test_sixteen_stops(up: Live):
    whole = text_of(up, max_tokens=60)
    stops = ["§" * (i + 1) for i in range(15)]
    assert text_of(up, max_tokens=60, stop=[*stops, whole[20:23]]) == whole[: whole.index(whole[20:23])]


def test_names_with_a_providers_prefix(up: Live):
    for name in ("lrt", "openai/lrt", "hosted_vllm/lrt", "lrt/lrt", "litellm_proxy/openai/lrt"):
        assert complete(up, model=name)["model"] == "lrt"
        assert up.client().models.retrieve(name).id == "lrt"
    for name in ("elsewhere/lrt", "openai/", "lrt/" * 40, "openai/other", "openai/elsewhere/lrt", "/lrt"):
        answer = httpx.post(f"{up.url}/v1/completions", json={"model": name, "prompt": "x"})
        assert answer.status_code == 404, name
    registry = up.registry
    registry.models["openai/lrt"] = registry.models["lrt"]  # a model that has the longer name
    try:
        assert registry.plain_name("openai/lrt") == "openai/lrt"
    finally:
        del registry.models["openai/lrt"]
    assert {"openai", "hosted_vllm", "lrt"} <= PROVIDERS


def test_health_version_and_length(up: Live):
    assert httpx.get(f"{up.url}/health").json() == httpx.get(f"{up.url}/healthz").json()
    assert httpx.head(f"{up.url}/health").status_code == 200
    assert httpx.get(f"{up.url}/version").json() == {"version": metadata.version(DISTRIBUTION)}
    (model,) = httpx.get(f"{up.url}/v1/models").json()["data"]
    assert model["max_model_len"] == 256


@pytest.mark.parametrize("route", REFUSED_ROUTES)
def test_known_addresses_that_are_not_served_say_why(up: Live, route: str):
    for address in (route, f"{route}/more"):
        answer = httpx.post(f"{up.url}{address}", json={"model": "lrt", "input": "x"})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (404, "unsupported")
        assert error["message"] == REFUSED_ROUTES[route]
    other = httpx.get(f"{up.url}{route}x").json()["error"]
    assert other["message"] == "there is nothing at this address"


def test_embeddings_are_refused_as_a_client_sees_it(up: Live):
    with pytest.raises(openai.NotFoundError, match="there are no embeddings: a model here writes text"):
        up.client().embeddings.create(model="lrt", input="x")


def test_pages_of_allowed_origins_may_ask(folder: Path):
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless"}
    with live(folder, tokens=KEYS, origins=["https://chat.example"]) as up:
        for origin, allowed in (("https://chat.example", True), ("https://evil.example", False)):
            asked = httpx.options(f"{up.url}/v1/completions", headers={"Origin": origin, **preflight})
            assert (asked.status_code == 200) == allowed
            assert (asked.headers.get("access-control-allow-origin") == origin) == allowed
            listed = httpx.get(f"{up.url}/v1/models", headers={"Origin": origin, "Authorization": f"Bearer {KEYS[0]}"})
            assert listed.status_code == 200
            assert (listed.headers.get("access-control-allow-origin") == origin) == allowed
        refused = httpx.get(f"{up.url}/v1/models", headers={"Origin": "https://chat.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://chat.example"  # so that the page can read it
    with live(folder) as up:
        answer = httpx.get(f"{up.url}/v1/models", headers={"Origin": "https://chat.example"})
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("prefill", ["exact", "converged"])
def test_a_kept_prefix_serves_its_own_key_only(folder: Path, monkeypatch: pytest.MonkeyPatch, prefill: str):
    form = {"model": "lrt", "prompt": "the end of it all, " * 8, "max_tokens": 2, "temperature": 0, "prefill": prefill}
    with live(folder, settings=Settings(rows=2, prefixes=10**8), tokens=KEYS) as up:
        reused, engine = [], up.registry.find("lrt").workers[0].engine.engine
        finish = engine._finish
        monkeypatch.setattr(engine, "_finish", lambda job, why: reused.append(job.reused) or finish(job, why))
        texts = set()
        for address in ("/v1/completions", "/playground/generate"):
            for key in (*KEYS, *KEYS):
                headers = {"Authorization": f"Bearer {key}"}
                answer = httpx.post(f"{up.url}{address}", json=form, headers=headers, timeout=60)
                assert answer.status_code == 200
                assert "cached_tokens" not in answer.text
                texts.add(answer.json()["choices"][0]["text"] if address.startswith("/v1") else "")
        assert len(texts) == 2  # with every key the same answer
        assert reused[:2] == [0, 0]
        assert all(count > 20 for count in reused[2:])
        assert {row.owner for row in engine.prefixes.kept} == {"0", "1"}


WRONG: list[dict[str, Any]] = [
    {"n": "1"}, {"n": 1.5}, {"n": 10**6000}, {"top_p": 2}, {"stop": [""]}, {"stop": ["a"] * 17}, {"model": 3},
    {"model": ""}, {"model": "a" * 300}, {"logit_bias": []}, {"logit_bias": {"3": "a"}}, {"stream": 1},
    {"stream_options": 3}, {"metadata": {"a": 3}}, {"user": 3}, {"seed": 2**70}, {"prompt": [-1]}, {"prompt": [1.5]},
    {"prompt": 3}, {"logprobs": -1}, {"messages": []}, {"messages": "x"}, {"messages": ["x"]},
    {"messages": [{"role": "tool", "content": "x"}]}, {"messages": [{"role": "user", "content": 3}]},
    {"messages": [{"role": "user", "content": []}]}, {"messages": [{"role": "user", "content": "x", "zzz": 1}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
    {"messages": [{"role": "user"}]}, {"messages": [{"role": "assistant", "content": "x", "refusal": "no"}]},
    {"messages": [{"role": "user", "content": "x", "cache_control": {"type": "x"}}]}, {"messages": None},
    {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, {"temperature": float("nan")},
]  # fmt: skip


@pytest.mark.parametrize("fields", WRONG, ids=lambda fields: repr(next(iter(fields))))
def test_no_message_is_pydantics(fields: dict[str, Any]):
    kind = ChatBody if "messages" in fields else CompletionBody
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "m", **fields})
    message = validation_error(caught.value.errors(include_url=False)).error["message"]
    assert message.startswith(next(iter(fields)))
    for word in ("Input", "should", "valid", "String", "List", "constrained", "Field"):
        assert word not in message


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "tool", "content": "x"}, "messages[0].role: choose 'system', 'developer', 'user' or 'assistant'"),
        ({"role": "user", "content": 3}, "messages[0].content: text or a list is needed"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0].type: choose 'text'"),
        ({"role": "user", "content": "x", "zzz": 1}, "messages[0].zzz: unknown; leave it out"),
        ({"content": "x"}, "messages[0].role: it is missing; give it"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls: at most 0 entries, and there are 1"),
    ],
)
def test_a_message_says_where(up: Live, turn: dict[str, Any], message: str):
    answer = chat(up, turn)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)
    assert answer.json()["error"]["param"] == "messages"
