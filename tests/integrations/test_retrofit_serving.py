"""lrt serve of a retrofitted folder: transformers' own server, whose answers are the model's own."""

import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("transformers")
from support.retrofits import awaken, plain
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lrt.cli.loading import RETROFITTED
from lrt.cli.main import main
from lrt.integrations.retrofit import RetrofitForCausalLM, retrofit
from lrt.integrations.retrofit.configuration import MODEL_TYPE
from lrt.integrations.retrofit.serving import ROUTES, transformers_app
from lrt.serve.config import Limits
from lrt.serve.metrics import ServerMetrics
from lrt.serve.middleware import RequestGuard

PROMPT = "w5 w6 w7"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A retrofitted Llama that is awake, with a chat template that writes what was said."""
    out = tmp_path_factory.mktemp("served") / "mine"
    awaken(retrofit(plain("llama").float(), source=3), std=0.3).float().save_pretrained(out)
    names = ["<pad>", "<unk>", "<eos>", *(f"w{i}" for i in range(3, 60))]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }} {% endfor %}"
    tokenizer.save_pretrained(out)
    return out


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_answers_are_the_models_own(folder):
    openai, httpx = pytest.importorskip("openai"), pytest.importorskip("httpx")
    tokenizer, model = PreTrainedTokenizerFast.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    wanted = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, 3:])
    other = model.detach().generate(ids, max_new_tokens=12, do_sample=False)[0, 3:]
    assert tokenizer.decode(other) != wanted  # the memory matters
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "lrt", "serve", str(folder), "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(command)
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        deadline = time.monotonic() + 120
        while True:
            try:
                (served,) = client.models.list().data
                break
            except openai.APIConnectionError:
                assert time.monotonic() < deadline
                assert server.poll() is None
                time.sleep(0.5)
        assert served.id == str(folder)
        asked = {"model": served.id, "max_tokens": 12, "temperature": 0}
        answer = client.chat.completions.create(messages=[{"role": "user", "content": PROMPT}], **asked)
        assert answer.choices[0].message.content.strip() == wanted.strip()
        pieces = client.chat.completions.create(messages=[{"role": "user", "content": PROMPT}], stream=True, **asked)
        streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert streamed.strip() == wanted.strip()
        assert client.completions.create(prompt=PROMPT, **asked).choices[0].text.strip() == wanted.strip()
        # What would load another model, or unload this one, is not there; other names and other hosts are refused.
        for path in ("/load_model", "/reset", "/v1/responses"):
            assert httpx.post(f"{url}{path}", json={"model": "another"}).status_code == 404, path
        with pytest.raises(openai.BadRequestError):
            client.completions.create(prompt=PROMPT, **{**asked, "model": "another"})
        assert httpx.get(f"{url}/v1/models", headers={"Host": "elsewhere.example"}).status_code == 403
    finally:
        server.terminate()
        assert server.wait(30) in (0, -signal.SIGTERM)  # uvicorn ends in order, and then as the signal would have


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "4"], "takes no --rows"),
        (["--template", "chatml", "--prefixes", "3"], "takes no --prefixes, no --template"),
        (["other", "--rows", "4"], "takes no --rows, no other models beside it"),
        (["--host", "0.0.0.0"], "give --token-file FILE or --api-key KEY, or --open"),
        (["--port", "70000"], "port is 70000"),
    ],
)
def test_what_its_server_does_not_take_is_refused(folder, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", str(folder), *options])
    error = capsys.readouterr().err
    assert (stopped.value.code, message in error) == (2, True), error


def test_without_the_token_nothing_is_answered(folder, tmp_path):
    """The guard of runs stands before a retrofitted folder too."""
    testclient = pytest.importorskip("starlette.testclient")
    guarded = RequestGuard(
        transformers_app(folder, "cpu"), Limits(), ServerMetrics(), ["a-token-of-length-20"], None, ROUTES
    )
    client = testclient.TestClient(guarded)
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer a-token-of-length-20"}).status_code == 200


def test_a_port_that_is_taken_is_said(folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit) as stopped:
            main(["serve", str(folder), "--port", str(taken.getsockname()[1]), "--device", "cpu"])
    assert stopped.value.code == 2
    assert "choose another with --port" in capsys.readouterr().err


def test_a_class_that_is_named_loads_in_the_dtype_of_the_weights(folder):
    """What transformers' server does: the class of config.json, and dtype "auto"."""
    model = RetrofitForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.float32
    assert RetrofitForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_command_line_knows_the_folders_by_their_model_type():
    assert RETROFITTED == MODEL_TYPE
