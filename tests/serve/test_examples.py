"""One promise: a server shows nothing of the text that a run was trained on, unless it is asked to."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
import pytest
import safetensors.torch
import torch
from support.runs import TINY
from support.server import EXACT, live, saved

from lrt.cli.main import main
from lrt.data.prepared import Prepared
from lrt.eval.probe import FILE
from lrt.serve.config import Settings
from lrt.serve.examples import GENERAL, HELD_OUT, written_prompts


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 100 secrets, each a document of its own, with the text in data/ beside it."""
    root = tmp_path_factory.mktemp("secret")
    lines = [f'{{"text": "secret number {n} of our house is {n * n * 7919}"}}\n' for n in range(100)]
    (root / "secrets.jsonl").write_text("".join(lines))
    main(["prepare", str(root / "data"), "--text", str(root / "secrets.jsonl"), "--vocab-size", "300"])
    main(["train", "--data", str(root / "data"), "--out", str(root / "mine"), "--device", "cpu", "d2", *TINY])
    return root / "mine"


def offered(folder: Path, settings: Settings) -> list[str]:
    with live(folder, settings=settings) as up:
        (model,) = httpx.get(f"{up.url}/playground/models").json()["models"]
    return model["examples"]


def test_nothing_of_the_text_is_shown(run: Path):
    assert offered(run, EXACT) == list(GENERAL)


@pytest.mark.parametrize("part", ["", "checkpoint"])
def test_beginnings_of_held_out_documents_where_it_is_asked_for(run: Path, part: str):
    prompts = offered(run / part, Settings(rows=2, prefill="exact", held_out_examples=True))
    data = Prepared.open(run.parent / "data")
    held_out = [data.tokenizer.decode(document.tolist()) for document in data.split("val")]
    assert 0 < len(prompts) <= HELD_OUT
    for prompt, text in zip(prompts, held_out, strict=False):
        assert text.startswith(prompt)
        assert prompt.startswith("secret number")


def test_a_text_that_is_not_there_is_named(tmp_path: Path):
    folder = saved(tmp_path / "lrt", corpus="gone")
    with (
        pytest.raises(ValueError, match="was trained on the text gone, which is not in"),
        live(folder, settings=Settings(held_out_examples=True)),
    ):
        pass


def test_prompts_go_by_words_of_the_name():
    for corpus, beginning in (("stdlib", "def "), ("tiny-stories", "Once upon"), ("random_chess", "engine ")):
        assert written_prompts({"corpus": corpus})[0].startswith(beginning)
    for corpus in ("blog", "encoder", ""):  # `log` and `code` are only parts of their names
        assert written_prompts({"corpus": corpus}) == GENERAL


def test_a_probe_whose_library_is_missing_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = saved(tmp_path / "lrt")
    main(["diagnose", str(folder), "--probe", "chess", "--at-least", "60", "--device", "cpu"])
    with live(folder) as up:
        assert up.registry.find("lrt").probe is not None
    monkeypatch.setitem(sys.modules, "chess", None)
    with live(folder) as up:
        assert up.registry.find("lrt").probe is None
    assert "latent-recurrent-transformer[state-data]" in capsys.readouterr().err


@pytest.mark.parametrize("about", [None, '"chess"', "[]", "{"])
def test_a_damaged_probe_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], about: str | None):
    folder = saved(tmp_path / "lrt")
    file = folder / FILE
    if about is None:
        file.write_bytes(b"no probe")
    else:
        safetensors.torch.save_file({"weight": torch.zeros(1), "bias": torch.zeros(1)}, file, {"about": about})
    with live(folder) as up:
        assert up.registry.find("lrt").probe is None
        assert up.client().completions.create(model="lrt", prompt="hello", max_tokens=3).choices
    printed = " ".join(capsys.readouterr().err.split())
    assert "probe.safetensors is no probe" in printed
    assert "Until then the page does not show the state" in printed
