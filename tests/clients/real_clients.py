"""One promise: each client that installs here works against `lrt serve`, and sends what is recorded of it.

`make clients` runs it, in an environment of the clients' own; the server runs in .venv. `make clients ARGS=--record`
writes the recordings anew, into ../serve/clients, where a fast test replays them.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from recorder import Recorder, recording

ROOT = Path(__file__).resolve().parents[2]
SERVER = ROOT / ".venv" / "bin" / "python"
RECORDINGS = ROOT / "tests" / "serve" / "clients"
PROGRAMS = Path(sys.executable).parent
SAY_HELLO: Any = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello there"}]
TOOL = {
    "type": "function",
    "function": {"name": "now", "description": "the time", "parameters": {"type": "object", "properties": {}}},
}


class Person(BaseModel):
    colour: bool
    age: bool


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    command = [SERVER, Path(__file__).with_name("make_model.py"), folder]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
    return folder


@pytest.fixture(scope="session")
def port(folder: Path) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    path = os.environ.get("SERVER_PYTHONPATH", str(ROOT))
    command = [SERVER, "-m", "lrt", "serve", folder / "lrt", "--port", str(number), "--device", "cpu"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{number}/healthz")
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        yield number
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def sent(port: int, request: pytest.FixtureRequest) -> Iterator[tuple[Recorder, str]]:
    """The recorder and its address; afterwards what was sent is recorded, or held against what is."""
    with recording(port) as (recorder, url):
        yield recorder, url
    name = re.sub(r"\W+", "_", request.node.name.removeprefix("test_")).strip("_")
    file = RECORDINGS / f"{name}.json"
    if request.config.getoption("--record"):
        file.parent.mkdir(exist_ok=True)
        requests = [{k: v for k, v in each.items() if k != "status"} for each in distinct(recorder.requests)]
        file.write_text(json.dumps(requests, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    recorded = json.loads(file.read_text(encoding="utf-8"))
    assert set(map(shape, recorder.requests)) == set(map(shape, recorded)), "record anew: make clients ARGS=--record"


def shape(request: dict[str, Any]) -> str:
    """A request without the values of its parameters."""
    return f"{request['method']} {request['path']} {sorted(request.get('body', {}))}"


def distinct(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One request of each shape."""
    return list({shape(request): request for request in reversed(requests)}.values())[::-1]


def all_served(recorder: Recorder) -> None:
    wrong = [request for request in recorder.requests if request["status"] != 200]
    assert recorder.requests
    assert not wrong, wrong


def run(*command: Any, **environment: str) -> str:
    done = subprocess.run(
        [str(PROGRAMS / str(command[0])), *map(str, command[1:])],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_openai(sent: tuple[Recorder, str]):
    import openai

    recorder, url = sent
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["lrt"]
    assert client.completions.create(model="lrt", prompt="hello", max_tokens=4).choices[0].finish_reason == "length"
    chunks = list(client.completions.create(model="lrt", prompt="hello", max_tokens=4, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"
    done = client.chat.completions.create(model="lrt", messages=SAY_HELLO, max_completion_tokens=4)
    assert done.choices[0].message.role == "assistant"
    pieces = client.chat.completions.create(model="lrt", messages=SAY_HELLO, max_completion_tokens=4, stream=True)
    assert [piece.choices[0].finish_reason for piece in pieces][-1] == "length"
    parsed = client.chat.completions.parse(model="lrt", messages=SAY_HELLO, response_format=Person, max_tokens=200)
    assert isinstance(parsed.choices[0].message.parsed, Person)
    all_served(recorder)


def test_openai_refused(sent: tuple[Recorder, str]):
    """What an LRT has not got is refused by name."""
    import openai

    _, url = sent
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    refused: list[Callable[[], Any]] = [
        lambda: client.chat.completions.create(model="lrt", messages=SAY_HELLO, tools=[TOOL]),  # pyright: ignore
        lambda: client.embeddings.create(model="lrt", input="hello"),
        lambda: client.responses.create(model="lrt", input="hello"),
    ]
    for call in refused:
        with pytest.raises(openai.APIStatusError) as caught:
            call()
        assert 400 <= caught.value.status_code < 500


def test_llm(sent: tuple[Recorder, str], tmp_path: Path):
    recorder, url = sent
    common = f"model_name: lrt\n  api_base: {url}/v1\n  api_key_name: none"
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: chat\n  {common}\n  supports_schema: true\n- model_id: text\n  {common}\n  completion: true\n"
    )
    user = {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    run("llm", "-m", "chat", "-s", "be kind", "hello there", "-o", "max_tokens", "4", **user)
    run("llm", "-m", "chat", "--no-stream", "hello", "-o", "temperature", "0.5", "-o", "max_tokens", "4", **user)
    run("llm", "-m", "text", "hello", "-o", "max_tokens", "4", **user)
    shaped = run("llm", "-m", "chat", "--schema", "colour bool, age bool", "hello", "-o", "max_tokens", "60", **user)
    assert re.match(r'\{"colour": ?(true|false), ?"age": ?(true|false)', shaped)  # more properties may follow
    all_served(recorder)


def test_litellm(sent: tuple[Recorder, str]):
    import litellm

    recorder, url = sent
    where: Any = {"api_base": f"{url}/v1", "api_key": "none", "max_tokens": 4}
    done: Any = litellm.completion(model="openai/lrt", messages=SAY_HELLO, temperature=0.5, **where)
    assert done.choices[0].message.content is not None
    done = litellm.completion(model="hosted_vllm/lrt", messages=SAY_HELLO, top_k=5, **where)
    assert done.usage.completion_tokens == 4
    stream: Any = litellm.completion(
        model="openai/lrt", messages=SAY_HELLO, stream=True, stream_options={"include_usage": True}, **where
    )
    assert [chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1] == "length"
    text: Any = litellm.text_completion(model="text-completion-openai/lrt", prompt="hello", **where)
    assert text.choices[0].finish_reason == "length"
    shaped: Any = litellm.completion(
        model="openai/lrt", messages=SAY_HELLO, response_format=Person, **where | {"max_tokens": 200}
    )
    assert Person.model_validate_json(shaped.choices[0].message.content)
    all_served(recorder)


def test_langchain_openai(sent: tuple[Recorder, str]):
    from langchain_openai import ChatOpenAI, OpenAI

    recorder, url = sent
    where: Any = {"base_url": f"{url}/v1", "api_key": "none", "model": "lrt", "max_retries": 0}
    chat = ChatOpenAI(**where, max_tokens=4)
    assert chat.invoke([("system", "be kind"), ("human", "hello there")]).response_metadata["finish_reason"]
    assert list(chat.stream("hello"))
    assert len(chat.batch(["hello", "there"])) == 2
    person = ChatOpenAI(**where, max_tokens=200).with_structured_output(Person, method="json_schema").invoke("hello")
    assert isinstance(person, Person)
    text = OpenAI(**where, max_tokens=4)
    assert isinstance(text.invoke("hello"), str)
    assert list(text.stream("hello"))
    all_served(recorder)


QUESTIONS = [{"question": f"What is {n}?", "choices": ["hello", "there", "the end"], "gold": n} for n in range(3)]
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_choice: choices\nmetric_list: [{metric: acc}]",
    "writing": "output_type: generate_until\ngeneration_kwargs: {until: [zzz, yyy], max_gen_toks: 4}\n"
    "metric_list: [{metric: exact_match}]",
}


def lm_eval(kind: str, task: str, url: str, folder: Path, tmp_path: Path, *more: str) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / f"{task}.yaml").write_text(
        f"task: {task}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        f'doc_to_text: "{{{{question}}}}"\ndoc_to_target: gold\n{TASKS[task]}\n'
    )
    arguments = f"model=lrt,base_url={url},max_length=512,num_concurrent=2,{','.join(more)}"
    offline = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    chat = ["--apply_chat_template"] if "chat" in kind else []
    run("lm_eval", "--model", kind, "--model_args", arguments, "--tasks", task, "--include_path", tmp_path, *chat,
        **offline)  # fmt: skip


def test_lm_eval(sent: tuple[Recorder, str], folder: Path, tmp_path: Path):
    recorder, url = sent
    own = ("tokenizer_backend=huggingface", f"tokenizer={folder / 'tokenizer'}")
    lm_eval("local-completions", "choice", f"{url}/v1/completions", folder, tmp_path, *own)
    lm_eval("local-completions", "writing", f"{url}/v1/completions", folder, tmp_path, *own)
    lm_eval("local-chat-completions", "writing", f"{url}/v1/chat/completions", folder, tmp_path)
    all_served(recorder)


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_guidellm(sent: tuple[Recorder, str], folder: Path, tmp_path: Path, route: str):
    recorder, url = sent
    backend = {"kind": "openai_http", "target": url, "model": "lrt", "request_format": f"/v1/{route}"}
    run(
        "guidellm", "run",
        "--backend", json.dumps(backend),
        "--profile", "kind=concurrent,streams=2",
        "--constraint", "kind=max_requests,count=4",
        "--tokenizer", f"kind=huggingface_auto,model={folder / 'tokenizer'}",
        "--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=4",
        "--output", f"kind=json,path={tmp_path / 'report.json'}",
        "--disable-console",
    )  # fmt: skip
    assert re.search(r'"completion_tokens"|output_tokens', (tmp_path / "report.json").read_text())
    all_served(recorder)
