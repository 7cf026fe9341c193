"""One promise: the page works in a browser, by mouse, keyboard and finger, without an error on its console."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from playwright.sync_api import Browser, Page, expect
from support.server import Live, live, saved

from lrt import MemoryConfig
from lrt.eval.ablations import ablate
from lrt.eval.memory_stats import layer_stats, memory_by_token
from lrt.eval.scoring import score
from lrt.model.checkpoint import load
from lrt.serve.config import Limits

TOKEN = "0123456789abcdef-key"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    none = {"memory": MemoryConfig(injection="none")}
    return [saved(root / "lrt"), saved(root / "transformer", seed=1, **none)]


@pytest.fixture(scope="module")
def up(folders: list[Path]) -> Iterator[Live]:
    with live(*folders, hosts=("127.0.0.1",), limits=Limits(inspect_tokens=60)) as running:
        yield running
        assert running.idle()


@pytest.fixture
def page(browser: Browser, up: Live) -> Iterator[Page]:
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    events: list[str] = []
    opened.on("console", lambda message: events.append(message.text))
    opened.on("pageerror", lambda error: events.append(str(error)))
    opened.on("request", lambda request: events.append(request.url) if not request.url.startswith(up.url) else None)
    opened.goto(up.url)
    expect(opened.locator("#model-0 option")).to_have_count(2)
    yield opened
    opened.close()
    assert events == []  # no error, and nothing asked of anybody else


def written(page: Page, panes: int = 1) -> None:
    """Wait until the panes have their text and what is inside."""
    for i in range(panes):
        expect(page.locator(".pane").nth(i)).to_have_attribute("aria-busy", "false", timeout=60_000)


def test_type_stream_hover_and_switch(page: Page, up: Live):
    page.fill("#prompt", "hello naïve 漢字")
    page.fill("#max", "30")
    page.keyboard.press("Control+Enter")
    written(page)
    tokens = page.locator(".text span")
    prompt = len(up.registry.find("lrt").tokenizer.encode("hello naïve 漢字")) + 1
    assert page.locator(".text span.prompt").count() == prompt
    assert prompt < tokens.count() <= prompt + 30
    assert page.locator(".text").inner_text().startswith("hello")
    expect(page.locator(".pane .facts").first).to_contain_text("written in")
    tokens.nth(prompt + 2).hover()
    about = page.locator(".about")
    for text in ("with recurrence", "memory zeroed", "previous embedding", "memory gains", "layer 2", "Likeliest"):
        expect(about).to_contain_text(text)
    assert page.locator("canvas").evaluate("node => node.clientWidth") == 14 * tokens.count()
    assert "rgb" in (tokens.nth(prompt).get_attribute("style") or "")
    before = [tokens.nth(i).get_attribute("style") for i in range(tokens.count())]
    page.select_option("#by", "gate")
    assert [tokens.nth(i).get_attribute("style") for i in range(tokens.count())] != before
    expect(page.locator(".scale")).to_contain_text("open")
    page.select_option("#model-0", "transformer")
    expect(page.locator(".pane .title")).to_contain_text("no memory")
    page.click("#go")
    written(page)
    page.locator(".text span").nth(3).hover()
    expect(about).to_contain_text("surprisal")
    for wrong in ("with recurrence", "memory zeroed"):  # a transformer has neither
        expect(about).not_to_contain_text(wrong)


def test_keyboard_and_two_checkpoints_side_by_side(page: Page):
    page.fill("#max", "0")
    page.select_option("#model-1", "transformer")
    page.click("summary")
    page.select_option("#prefill", "exact")
    page.click("#go")
    written(page, 2)
    texts = [page.locator(".text").nth(i).inner_text() for i in range(2)]
    assert texts[0] == texts[1]
    for i, recurrence in ((0, True), (1, False)):  # a transformer is not said to have any
        pane = page.locator(".pane").nth(i)
        assert ("with recurrence" in pane.locator(".map").inner_text()) == recurrence
        assert ("memory gains" in pane.locator(".about").inner_text()) == recurrence
    boxes = [page.locator(".pane").nth(i).bounding_box() for i in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"]  # pyright: ignore[reportOptionalSubscript]
    page.locator(".text").first.focus()
    for key, position in (("End", None), ("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        page.keyboard.press(key)
        if position is not None:
            expect(page.locator(".about").first).to_contain_text(f"at position {position},")
    page.get_by_label("About how the prompt was computed").first.click()
    expect(page.locator(":popover-open")).to_contain_text("token by token: exact")


def test_a_stream_is_stopped_and_frees_its_row(page: Page, up: Live):
    page.fill("#prompt", "hello")
    page.fill("#max", "250")
    page.click("#go")
    expect(page.locator(".text span").nth(3)).to_be_attached()
    page.keyboard.press("Escape")
    written(page)
    assert up.idle()
    expect(page.locator("#stop")).to_be_disabled()


def test_phone_and_dark(browser: Browser, up: Live, tmp_path: Path):
    pages: dict[str, bytes] = {}
    for scheme in ("light", "dark"):
        phone = browser.new_page(viewport={"width": 380, "height": 800}, color_scheme=scheme, has_touch=True)  # pyright: ignore
        phone.goto(up.url)
        expect(phone.locator("#model-0 option")).to_have_count(2)
        phone.fill("#max", "8")
        phone.tap("#go")
        written(phone)
        phone.locator(".text span").nth(2).tap()
        expect(phone.locator(".about")).to_contain_text("at position 2")
        assert phone.locator("body").bounding_box()["width"] <= 380  # pyright: ignore[reportOptionalSubscript]
        assert phone.locator("main").evaluate("node => document.documentElement.scrollWidth") <= 380
        assert "a token. Zero" in phone.locator("footer").inner_text()  # without what is said of keys
        pages[scheme] = phone.screenshot(path=tmp_path / f"{scheme}.png")
        phone.close()
    assert pages["light"] != pages["dark"]


def test_a_key_is_asked_for(browser: Browser, folders: list[Path]):
    with live(folders[0], tokens=[TOKEN]) as guarded:
        page = browser.new_page()
        page.goto(guarded.url)
        expect(page.locator("#message")).to_contain_text("the token is missing or wrong")
        page.fill("#key", TOKEN)
        page.press("#key", "Tab")
        expect(page.locator("#model-0 option")).to_have_count(1)
        page.fill("#max", "3")
        page.click("#go")
        written(page)
        page.close()


def test_what_is_shown_is_what_is_measured(up: Live, folders: list[Path]):
    model, words = load(folders[0])
    tokens = [words.bos, *words.encode("the end of it all, naïve 漢字")]
    row = torch.tensor([tokens])
    shown = httpx.post(f"{up.url}/playground/inspect", json={"model": "lrt", "tokens": tokens}, timeout=60).json()
    variants: dict[str, Any] = {"live": model, "zero": ablate(model, "zero"), "embedding": ablate(model, "embedding")}
    assert set(shown["bits"]) == set(variants)
    for name, variant in variants.items():
        expected = score(variant, row)[0] / torch.log(torch.tensor(2.0))
        torch.testing.assert_close(torch.tensor(shown["bits"][name]), expected, atol=1e-3, rtol=1e-3)
    assert "".join(shown["texts"]) == "the end of it all, naïve 漢字"
    inside = memory_by_token(model, row[:, :-1])
    means = layer_stats(model, row[:, :-1])
    for block, layer in zip(inside["blocks"], means, strict=True):
        gates = torch.tensor(layer["gates"]).mean(-1)  # over heads: local, then by channel
        torch.testing.assert_close(torch.tensor(block["local"]).mean(), gates[0])
        torch.testing.assert_close(torch.tensor(block["memory"]).mean(1), gates[1:])
    assert inside["norm"][0][0] == 0
    assert all(abs(n - 1) < 1e-3 for n in inside["norm"][0][1:])
    for wrong, message in (([0] * 61, "has 61 tokens, 60 are looked into"), ([0, 10**6], "is not in the vocabulary")):
        answer = httpx.post(f"{up.url}/playground/inspect", json={"model": "lrt", "tokens": wrong})
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]
    bare = httpx.post(
        f"{up.url}/playground/inspect", json={"model": "transformer", "tokens": tokens}, timeout=60
    ).json()
    assert set(bare["bits"]) == {"live"}
    assert "inside" not in bare
