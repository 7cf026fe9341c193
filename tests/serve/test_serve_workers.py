"""One promise: models come, go and share devices while requests run, and no request fails or changes because of it."""

from __future__ import annotations

import asyncio
import gc
import itertools
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.server import EXACT, Live, live, sample, saved
from test_serve_limits import end, start

from lrt.inference.request import Request
from lrt.model import checkpoint
from lrt.serve.config import Limits, Settings
from lrt.serve.examples import example_prompts
from lrt.serve.metrics import ServerMetrics
from lrt.serve.models import ServedModel, checkpoint_version, load_served_model
from lrt.serve.registry import ModelRegistry
from lrt.serve.routing import LOOKED_AT, RECENT, RecentPrompts

TOKEN = "0123456789abcdef0123"
TWO = Settings(rows=2, prefill="exact", devices=("cpu", "cpu"))
ENDLESS: dict[str, Any] = {"model": "lrt", "prompt": "x", "max_tokens": 1900, "logit_bias": {"5": 100}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "lrt", context=2000)


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A folder with two checkpoints, a run, and what is none."""
    saved(tmp_path / "shelf" / "one")
    saved(tmp_path / "shelf" / "two" / "checkpoint", seed=1)
    (tmp_path / "shelf" / "notes").mkdir()
    (tmp_path / "shelf" / "readme.txt").write_text("hello")
    return tmp_path / "shelf"


def text_of(up: Live, key: str = "none", **fields: Any) -> str:
    body: dict[str, Any] = {"model": "lrt", "prompt": "hello", "seed": 5, "max_tokens": 24} | fields
    return up.client(key).completions.create(**body).choices[0].text


def soon(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether something holds before so many seconds have passed."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return holds()


def post(up: Live, address: str, key: str = TOKEN, **body: Any) -> httpx.Response:
    return httpx.post(f"{up.url}{address}", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60)


# --- several devices ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[Live]:
    with live(folder, settings=TWO) as running:
        yield running
        assert running.idle()


def test_requests_go_to_the_least_busy(pair: Live, folder: Path, capsys: pytest.CaptureFixture[str]):
    model = pair.registry.find("lrt")
    assert len({id(worker.engine.engine) for worker in model.workers}) == 2
    assert len({id(worker.transformer) for worker in model.workers}) == 1  # the weights are there once per device
    streams = []
    for expected in ((1, 0), (1, 1), (2, 1), (2, 2)):
        streams.append(pair.client().completions.create(**ENDLESS, stream=True))
        assert tuple(worker.engine.load for worker in model.workers) == expected
    gauges = httpx.get(f"{pair.url}/metrics").text
    for worker in (0, 1):
        assert f'lrt_rows_in_use{{model="lrt",worker="{worker}"}} 2.0' in gauges
        assert f'lrt_rows{{model="lrt",worker="{worker}"}} 2.0' in gauges
    for stream in streams:
        stream.close()
    assert pair.idle()
    expected = [sample(capsys, folder, "hello", seed, 24) for seed in range(4)]
    whole = pair.client().completions.create(model="lrt", prompt=["hello"] * 1, seed=0, max_tokens=24, n=4)
    assert [choice.text for choice in whole.choices] == expected
    several = pair.client().completions.create(model="lrt", prompt=["hello", "the end"], seed=0, max_tokens=24)
    assert [c.text for c in several.choices] == [expected[0], sample(capsys, folder, "the end", 0, 24)]


def test_both_workers_count_for_the_queue(folder: Path):
    with live(folder, settings=replace(TWO, rows=1), limits=Limits(queue=1)) as up:
        streams = [up.client().completions.create(**ENDLESS, stream=True) for _ in range(2)]
        for stream in streams:
            next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="exceed the 2 rows and 1 places in the queue"):
            up.client().completions.create(model="lrt", prompt="x", n=2)
        for stream in streams:
            stream.close()
        assert up.idle()


def test_a_prompt_goes_where_its_beginning_is_known(folder: Path):
    beginning = "the end of it all, " * 12
    with live(folder, settings=replace(TWO, prefixes=10**8)) as up:
        first, second = up.registry.find("lrt").workers
        busy = up.client().completions.create(**ENDLESS, stream=True)
        next(iter(busy))
        assert first.engine.load == 1
        text_of(up, prompt=beginning)
        busy.close()
        assert up.idle()
        assert [len(worker.engine.engine.prefixes.kept) for worker in (first, second)] == [1, 1]
        for _ in range(3):
            text_of(up, prompt=beginning + "and so on")  # not where the least is done: both are idle
        assert up.idle()
        assert [worker.engine.engine.next_request for worker in (first, second)] == [1, 4]
        text_of(up, prompt="x y")  # what they share is too little to matter
        assert up.idle()
        assert first.engine.engine.next_request == 2
        streams = [up.client().completions.create(**{**ENDLESS, "prompt": beginning}, stream=True) for _ in range(3)]
        assert (first.engine.load, second.engine.load) == (1, 2)  # its rows are full
        for stream in streams:
            stream.close()
        assert up.idle()


def test_what_workers_know_is_each_owners_and_bounded():
    recent = RecentPrompts()
    recent.add("a", (1, 2, 3, 4))
    assert [recent.shared(owner, (1, 2, 3, 9)) for owner in ("a", "b", "")] == [3, 0, 0]
    long = tuple(range(LOOKED_AT + 50))
    recent.add("b", long)
    assert recent.shared("b", long) == LOOKED_AT
    for i in range(RECENT):
        recent.add("b", (7, i))
    assert len(recent.order) == RECENT
    assert recent.shared("a", (1, 2, 3, 4)) == 0
    assert recent.shared("b", (7, 5, 1)) == 2


def test_a_worker_that_has_failed_leaves_its_work_to_the_other(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def broken() -> Any:
        raise RuntimeError

    with live(folder, settings=TWO, tokens=[TOKEN]) as up:
        first, second = up.registry.find("lrt").workers
        monkeypatch.setattr(first.engine, "make_engine", broken)
        monkeypatch.setattr(first.engine.engine, "step", broken)
        with pytest.raises(openai.InternalServerError):
            text_of(up, TOKEN)
        assert soon(lambda: first.engine.failed)
        for _ in range(3):
            assert text_of(up, TOKEN)
        answer = httpx.get(f"{up.url}/healthz")
        assert (answer.status_code, answer.json()["models"]) == (200, {"lrt": "degraded"})
        assert up.registry.find("lrt").choose(Request((1,))) is second
        monkeypatch.undo()
        assert post(up, "/v1/models/load", model="lrt").json()["status"] == "loaded"
        assert httpx.get(f"{up.url}/healthz").json()["models"] == {"lrt": "ok"}


@pytest.mark.parametrize("settings", [replace(TWO, devices=("cpu",)), TWO])
def test_requests_that_come_while_an_engine_is_made_anew_are_answered(
    folder: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings
):
    begun, go_on = threading.Event(), threading.Event()

    def broken() -> Any:
        raise RuntimeError

    def make() -> Any:
        begun.set()
        go_on.wait(20)
        raise RuntimeError

    with live(folder, settings=settings) as up, ThreadPoolExecutor() as pool:
        model = up.registry.find("lrt")
        engine = model.workers[0].engine
        monkeypatch.setattr(engine, "make_engine", make)
        monkeypatch.setattr(engine.engine, "step", broken)
        with pytest.raises(openai.InternalServerError, match="the server failed to answer"):
            text_of(up)
        assert begun.wait(10)
        asked = pool.submit(text_of, up)
        if len(model.workers) == 2:
            assert asked.result(10)  # by the other one
            go_on.set()
        else:
            assert soon(lambda: engine.load == 1)
            go_on.set()
            with pytest.raises(openai.InternalServerError, match="the server failed to answer"):
                asked.result(10)
            assert soon(lambda: model.failed)
            with pytest.raises(openai.InternalServerError, match="the model has failed") as caught:
                text_of(up)
            assert "or gets SIGHUP" in caught.value.message
            assert "Retry-After" not in caught.value.response.headers
        assert soon(lambda: engine.load == 0)


# --- a folder of models ------------------------------------------------------------------------------------------


def test_models_of_a_folder_are_loaded_when_they_are_asked_for(shelf: Path, folder: Path, tmp_path: Path):
    with live(folder, models_dir=shelf) as up:
        listed = httpx.get(f"{up.url}/v1/models").json()["data"]
        assert [(model["id"], model["max_model_len"]) for model in listed] == [
            ("lrt", 2000),
            ("one", 256),
            ("two", 256),
        ]
        assert all(model["created"] > 1.7e9 for model in listed)
        shown = httpx.get(f"{up.url}/playground/models").json()["models"]
        assert [model["id"] for model in shown] == ["lrt", "one", "two"]
        assert list(up.registry.models) == ["lrt"]
        threads = [threading.Thread(target=text_of, args=(up,), kwargs={"model": "two"}) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert list(up.registry.models) == ["lrt", "two"]
        for name in ("../models/lrt", "notes", "readme.txt", ".", "two/checkpoint"):
            with pytest.raises(openai.NotFoundError, match="choose one of lrt, one, two"):
                text_of(up, model=name)
        saved(shelf / "three", seed=2)  # meanwhile
        assert text_of(up, model="three")
        (shelf / "one" / "config.json").write_text("{}")
        with pytest.raises(
            openai.InternalServerError, match="the checkpoint of one cannot be loaded; the server's log"
        ):
            text_of(up, model="one")
        assert text_of(up, model="two")


def test_of_folders_with_one_name_none_is_served(shelf: Path, caplog: pytest.LogCaptureFixture):
    saved(shelf / "a b")
    saved(shelf / "a-b", seed=1)
    with live(models_dir=shelf) as up:
        for _ in range(2):
            assert [model.id for model in up.client().models.list()] == ["one", "two"]
        with pytest.raises(openai.NotFoundError, match="choose one of one, two"):
            text_of(up, model="a-b")
        (message,) = [record.getMessage() for record in caplog.records if "called a-b" in record.getMessage()]
        assert message.startswith("a b and a-b in ")
        shutil.rmtree(shelf / "a b")
        assert text_of(up, model="a-b")


@pytest.mark.parametrize("own", [True, False])
def test_a_folder_may_hold_only_what_is_named_or_nothing_yet(folder: Path, tmp_path: Path, own: bool):
    models_dir = folder.parent if own else tmp_path
    with live(folder, models_dir=models_dir) as up:
        assert [model.id for model in up.client().models.list()] == ["lrt"]
        assert text_of(up)
        saved(tmp_path / "later")
        expected = ["lrt"] if own else ["later", "lrt"]
        assert sorted(model.id for model in up.client().models.list()) == expected


def test_a_folder_that_vanishes_meanwhile_is_not_listed(shelf: Path, monkeypatch: pytest.MonkeyPatch):
    def vanishing(path: Path, folder: Path, held_out: bool) -> tuple[str, ...]:
        if path.name == "one":
            shutil.rmtree(path)
        return example_prompts(path, folder, held_out)

    monkeypatch.setattr("lrt.serve.registry.example_prompts", vanishing)
    with live(models_dir=shelf) as up:
        assert [model.id for model in up.client().models.list()] == ["two"]
        assert text_of(up, model="two")
        shutil.rmtree(shelf)
        assert [model.id for model in up.client().models.list()] == ["two"]
        with pytest.raises(openai.NotFoundError):
            text_of(up, model="one")
        asyncio.run(up.registry.reload())  # what is loaded goes on
        assert text_of(up, model="two")


def test_no_more_models_are_loaded_than_fit(shelf: Path):
    with live(models_dir=shelf, limits=Limits(models=1), tokens=[TOKEN]) as up:
        assert httpx.get(f"{up.url}/healthz").json() == {"status": "ok", "models": {}}
        assert text_of(up, TOKEN, model="one")
        with pytest.raises(
            openai.InternalServerError, match="1 models are loaded, as many as this server holds"
        ) as caught:
            text_of(up, TOKEN, model="two")
        assert caught.value.status_code == 503
        assert "use one, or POST one to /v1/models/unload" in caught.value.message
        assert "Retry-After" not in caught.value.response.headers
        assert post(up, "/v1/models/unload", model="one").json() == {"model": "one", "status": "unloaded"}
        assert text_of(up, TOKEN, model="two")
        assert 'lrt_rows{model="one"' not in up.registry.metrics.text().decode()
        assert 'lrt_rows{model="two"' in up.registry.metrics.text().decode()


def test_a_loaded_model_whose_folder_is_gone_is_listed_and_can_be_unloaded(shelf: Path):
    with live(models_dir=shelf, tokens=[TOKEN]) as up:
        assert text_of(up, TOKEN, model="one")
        shutil.rmtree(shelf / "one")
        assert text_of(up, TOKEN, model="one")
        assert sorted(model.id for model in up.client(TOKEN).models.list()) == ["one", "two"]
        assert post(up, "/v1/models/unload", model="one").json() == {"model": "one", "status": "unloaded"}
        assert [model.id for model in up.client(TOKEN).models.list()] == ["two"]
        assert post(up, "/v1/models/unload", model="one").status_code == 404


def test_nobody_is_sent_where_a_token_is_missing(shelf: Path):
    with live(models_dir=shelf, limits=Limits(models=1)) as up:
        assert text_of(up, model="one")
        with pytest.raises(openai.InternalServerError, match="use one, or have the server's limit raised") as caught:
            text_of(up, model="two")
        assert "/v1/models/unload" not in caught.value.message


def test_loading_needs_the_token(shelf: Path):
    with live(models_dir=shelf, tokens=[TOKEN]) as up:
        for action in ("load", "unload"):
            assert post(up, f"/v1/models/{action}", key="wrong", model="one").status_code == 401
            assert post(up, f"/v1/models/{action}", model="nobody").status_code == 404
        assert post(up, "/v1/models/load", model="openai/one").json() == {"model": "one", "status": "loaded"}
        assert post(up, "/v1/models/load", model="one").json() == {"model": "one", "status": "unchanged"}
        assert post(up, "/v1/models/unload", model="two").json() == {"model": "two", "status": "unloaded"}  # it was not
    with live(models_dir=shelf) as up:
        for action in ("load", "unload"):
            answer = post(up, f"/v1/models/{action}", model="one")
            assert answer.status_code == 403
            assert "start the server with --token-file or --api-key" in answer.json()["error"]["message"]
        assert up.registry.models == {}


def test_a_model_that_cannot_be_loaded_leaves_no_gauges(shelf: Path):
    with live(models_dir=shelf, settings=replace(EXACT, held_out_examples=True)) as up:  # its text is not there
        with pytest.raises(openai.InternalServerError, match="the checkpoint of one cannot be loaded"):
            text_of(up, model="one")
        assert 'model="one"' not in up.registry.metrics.text().decode()


def test_a_load_goes_on_without_the_request_that_began_it(shelf: Path):
    begun, go_on, count = threading.Event(), threading.Event(), itertools.count()

    def slow(path: Path, device: str) -> Any:
        next(count)
        begun.set()
        go_on.wait(20)
        return checkpoint.read(path, device)

    async def use(registry: ModelRegistry) -> ServedModel:
        async with registry.use("one") as model:
            return model

    async def run() -> None:
        registry = ModelRegistry({}, EXACT, Limits(), ServerMetrics(), shelf, slow)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await use(registry)
        assert begun.is_set()
        others = [asyncio.create_task(use(registry)) for _ in range(3)]
        await asyncio.sleep(0.2)
        go_on.set()
        assert {id(await other) for other in others} == {id(registry.find("one"))}
        assert next(count) == 1
        await registry.stop()

    asyncio.run(run())


def test_what_is_unloaded_ends_its_answers_and_is_gone(folder: Path):
    with live(folder, settings=EXACT, tokens=[TOKEN]) as up:
        stream = up.client(TOKEN).completions.create(**{**ENDLESS, "max_tokens": 300}, stream=True)
        next(iter(stream))
        model = up.registry.find("lrt")
        gone = [weakref.ref(part) for part in (model, model.workers[0].transformer, model.workers[0].engine.engine)]
        thread = model.workers[0].engine._thread
        gc.freeze()  # as the command does
        del model
        assert post(up, "/v1/models/unload", model="lrt").status_code == 200
        assert list(up.registry.models) == []
        assert [m.id for m in up.client(TOKEN).models.list()] == ["lrt"]
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        thread.join(20)
        patience = time.monotonic() + 20
        while any(part() is not None for part in gone) and time.monotonic() < patience:
            time.sleep(0.05)  # by the server itself
        gc.unfreeze()
        assert [part() for part in gone] == [None] * 3
        assert text_of(up, TOKEN)  # it is loaded again
        assert list(up.registry.models) == ["lrt"]


# --- reloading ---------------------------------------------------------------------------------------------------


def test_a_changed_checkpoint_is_loaded_anew_and_no_request_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = saved(tmp_path / "lrt", context=2000)
    before = sample(capsys, path, "hello", 5, 24)
    with live(path, settings=replace(EXACT, rows=12), tokens=[TOKEN]) as up:
        old = up.registry.find("lrt")
        stop, texts, failures = threading.Event(), set(), []

        def ask() -> None:
            while not stop.is_set():
                try:
                    texts.add(text_of(up, TOKEN))
                except openai.OpenAIError as error:
                    failures.append(error)

        stream = up.client(TOKEN).completions.create(**{**ENDLESS, "max_tokens": 600}, stream=True)
        begun = next(iter(stream))
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert post(up, "/v1/models/load", model="lrt").json()["status"] == "unchanged"
        assert up.registry.find("lrt") is old
        saved(path, seed=1, context=2000)
        assert post(up, "/v1/models/load", model="lrt").json()["status"] == "loaded"
        now = text_of(up, TOKEN)
        stop.set()
        for thread in threads:
            thread.join()
        chunks = list(stream)
        assert {chunk.system_fingerprint for chunk in chunks} == {begun.system_fingerprint}  # to its end on the old one
        assert chunks[-1].choices[0].finish_reason == "length"
        assert failures == []
        after = sample(capsys, path, "hello", 5, 24)
        assert now == after != before
        assert texts <= {before, after}
        weights = path / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-10])  # a copy that was cut off
        (path / "manifest.json").touch()
        answer = post(up, "/v1/models/load", model="lrt")
        assert answer.status_code == 500
        assert str(tmp_path) not in answer.text
        assert text_of(up, TOKEN) == after
        assert up.idle()


def test_what_belongs_to_a_model_beside_its_checkpoint_is_watched(folder: Path, tmp_path: Path):
    (tmp_path / "weights").write_text("a")
    version = checkpoint_version(folder, [tmp_path])
    assert version == checkpoint_version(folder, [tmp_path]) != checkpoint_version(folder)
    (tmp_path / "weights").write_text("other")
    assert checkpoint_version(folder, [tmp_path]) != version


def test_a_server_that_runs_leaves_a_save_at_work_alone(tmp_path: Path):
    path = saved(tmp_path / "lrt")
    previous = path.with_name(".lrt.previous")
    path.rename(previous)  # as it is between the two renames of a save
    with pytest.raises(ValueError, match="is not a checkpoint"):
        load_served_model(path, "lrt", EXACT, Limits(), ServerMetrics())
    assert previous.is_dir()
    assert not path.exists()
    with live(path) as up:  # a server that begins undoes a save that was cut off there
        assert text_of(up)


@pytest.mark.parametrize(
    "name", ["probe.safetensors", "calibration.json", "chat_template.jinja", "tokenizer_config.json"]
)
def test_what_a_server_reads_beside_the_weights_is_watched(tmp_path: Path, name: str):
    run = saved(tmp_path / "run" / "checkpoint").parent
    versions = [checkpoint_version(run)]
    for content in ("{}", "{ }"):
        (run / "checkpoint" / name).write_text(content)
        versions.append(checkpoint_version(run))
    (run / "checkpoint" / "notes.txt").write_text("hello")
    assert checkpoint_version(run) == versions[-1]
    assert len(set(versions)) == 3


def test_a_chat_template_that_is_put_in_is_loaded(tmp_path: Path):
    path = saved(tmp_path / "lrt")
    with live(path, tokens=[TOKEN]) as up:
        chat: Any = {"model": "lrt", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        with pytest.raises(openai.BadRequestError):
            up.client(TOKEN).chat.completions.create(**chat)
        (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
        assert post(up, "/v1/models/load", model="lrt").json()["status"] == "loaded"
        assert up.client(TOKEN).chat.completions.create(**chat).choices


@pytest.mark.slow
def test_sighup_reloads(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = saved(tmp_path / "lrt")
    process, url = start(path)
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        old = client.completions.create(model="lrt", prompt="hello").system_fingerprint
        process.send_signal(signal.SIGHUP)
        time.sleep(1)
        assert client.completions.create(model="lrt", prompt="hello").system_fingerprint == old
        saved(path, seed=1)
        process.send_signal(signal.SIGHUP)
        patience = time.monotonic() + 30
        while client.completions.create(model="lrt", prompt="hello").system_fingerprint == old:
            assert time.monotonic() < patience
            time.sleep(0.1)
        output = end(process)
    finally:
        process.kill()
    assert "lrt: unchanged" in output
    assert "lrt: loaded" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_the_command_serves_a_folder_on_two_devices(folder: Path, shelf: Path):
    process, url = start(folder, "--models-dir", str(shelf), "--device", "auto", "--devices", "cpu", "cpu")
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        assert [model.id for model in client.models.list()] == ["lrt", "one", "two"]
        assert client.completions.create(model="two", prompt="hello").choices[0].text
        gauges = httpx.get(f"{url}/metrics").text
        assert 'lrt_rows{model="two",worker="1"} 16.0' in gauges
        output = end(process)
    finally:
        process.kill()
    assert "one: " in output
    assert "loaded when it is first asked for" in output
