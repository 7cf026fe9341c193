"""One promise: what the page says of a text is true, is the same by every way to it, and can be sent and kept."""

from __future__ import annotations

import io
import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect
from support.axe import serious_findings
from support.server import Live, live, saved

from lrt import MemoryConfig
from lrt.eval.probe import HIDDEN, LinearProbe, StateProbe, write_probe
from lrt.eval.text_states import STATE_KINDS
from lrt.model.checkpoint import load
from lrt.model.fingerprint import fingerprint

pytestmark = pytest.mark.slow
TOKEN = "0123456789abcdef-key"
SIZES = {"wide": {"width": 1440, "height": 1000}, "phone": {"width": 390, "height": 844}}


def blind_probe(folder: Path, kind: str) -> Path:
    """A probe beside a checkpoint that reads the first value of every variable, whatever the memory holds."""
    model, _ = load(folder)
    shape = (model.config.width, len(STATE_KINDS[kind].names), len(STATE_KINDS[kind].values))
    bias = torch.zeros(shape[1:])
    bias[:, 0] = 1
    source = f"memory of layer {model.config.stored_sources[0]}" if model.config.stored_sources else HIDDEN
    write_probe(folder, StateProbe(kind, source, 0.5, 0.25, fingerprint(model), LinearProbe(torch.zeros(shape), bias)))
    return folder


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("models")
    none = MemoryConfig(injection="none")
    folders = [
        saved(root / "lrt", corpus="stdlib"),
        saved(root / "transformer", seed=1, vocab_size=270, memory=none),
        blind_probe(saved(root / "repl", seed=2, corpus="repl"), "repl"),
        blind_probe(saved(root / "chess", seed=3, corpus="chess", memory=none), "chess"),
    ]
    with live(*folders, hosts=("127.0.0.1",)) as running:
        yield running
        assert running.idle()


@pytest.fixture(params=["wide light", "phone dark"])
def context(request: pytest.FixtureRequest, browser: Browser) -> Iterator[BrowserContext]:
    size, scheme = request.param.split()
    opened = browser.new_context(viewport=SIZES[size], color_scheme=scheme, accept_downloads=True)  # pyright: ignore
    yield opened
    opened.close()


@pytest.fixture
def page(context: BrowserContext, up: Live) -> Iterator[Page]:
    """The page, which at the end has made no error and asked nobody else for anything."""
    events: list[str] = []
    context.on("console", lambda message: events.append(message.text))
    context.on("weberror", lambda error: events.append(str(error.error)))
    context.on("request", lambda request: events.append(request.url) if not request.url.startswith(up.url) else None)
    opened = context.new_page()
    opened.goto(up.url)
    expect(opened.locator("#model-0 option")).to_have_count(4)
    yield opened
    assert [event for event in events if "blob:" not in event] == []


def go(page: Page, prompt: str, tokens: int = 12, **choices: str) -> None:
    """Fill the form, run it, and wait for the panes' end."""
    page.fill("#prompt", prompt)
    page.fill("#max", str(tokens))
    for field, value in choices.items():
        page.select_option(f"#{field.replace('_', '-')}", value)
    page.click("#go")
    finished(page, 2 if choices.get("model_1") else 1)


def finished(page: Page, panes: int = 1) -> None:
    expect(page.locator(".pane")).to_have_count(panes)
    for i in range(panes):
        expect(page.locator(".pane").nth(i)).to_have_attribute("aria-busy", "false", timeout=60_000)


def selected(page: Page, pane: int = 0) -> int:
    """The place of the selected token."""
    spans = page.locator(".text").nth(pane).locator("span")
    return spans.evaluate_all("spans => spans.findIndex(span => span.classList.contains('on'))")


def inspections(page: Page) -> list[dict[str, Any]]:
    """What the server answers to inspections from now on, as they come."""
    answers: list[dict[str, Any]] = []

    def keep(route: Route) -> None:
        answer = route.fetch()
        answers.append(answer.json())
        route.fulfill(response=answer)

    page.route("**/playground/inspect", keep)
    return answers


def test_the_headline_and_the_token_that_gained_most(page: Page):
    answers = inspections(page)
    go(page, "hello there, naïve café", 20)
    ((live, zero, embedding),) = [
        [answer["bits"][name] for name in ("live", "zero", "embedding")] for answer in answers
    ]
    headline = page.locator(".headline").inner_text()
    saved_bits = sum(zero) - sum(live)
    assert f"{sum(live) / len(live):.1f} instead of {sum(zero) / len(zero):.1f} bits per token" in headline
    verb = "saved" if saved_bits >= 0 else "cost"
    amount = f"{abs(saved_bits):.1f}" if abs(saved_bits) < 10 else f"{abs(saved_bits):.0f}"
    assert headline.startswith(f"The memory {verb} {amount} ")
    over = abs(sum(embedding) - sum(live))
    assert (f"{over:.1f} bits" if over < 10 else f"{over:.0f} bits") in headline
    gains = [z - x for z, x in zip(zero, live, strict=True)]
    assert selected(page) == 1 + gains.index(max(gains))
    expect(page.locator(".about")).to_contain_text(f"{max(gains):+.2f}")


def test_a_headline_does_not_count_what_is_nothing(page: Page):
    gains: list[float] = []  # of one token, over the embedding

    def with_gain(route: Route) -> None:
        answer = route.fetch()
        content = answer.json()
        count = len(content["bits"]["live"])
        content["bits"] = {
            "live": [1.0] * count,
            "zero": [2.0] * count,
            "embedding": [1.0 + gains[-1]] + [1.0] * (count - 1),
        }
        route.fulfill(response=answer, body=json.dumps(content))

    page.route("**/playground/inspect", with_gain)
    headline = page.locator(".headline")
    for gain, words in (
        (0.01, "embedding, nothing."),
        (3.0, "embedding, 3.0 bits."),
        (-3.0, "would save 3.0 bits more."),
    ):
        gains.append(gain)
        go(page, "hello there", 0)
        expect(headline).to_contain_text("1.0 instead of 2.0 bits per token")
        expect(headline).to_contain_text(words)


def test_the_selected_token_of_a_long_text_is_in_view(page: Page):
    go(page, "hello there, naïve café\n" * 16, 0)
    text = page.locator(".text")
    assert text.evaluate("node => node.scrollHeight > node.clientHeight")
    for key in ("End", "Home", "End"):
        text.press(key)
        box, token = text.bounding_box(), page.locator(".text span.on").bounding_box()
        assert box is not None
        assert token is not None
        assert box["y"] <= token["y"]
        assert token["y"] + token["height"] <= box["y"] + box["height"]


def test_a_legend_is_true_while_the_text_is_looked_into_and_of_each_pane(page: Page):
    legends = page.locator(".meaning")
    held: list[Route] = []
    page.route("**/playground/inspect", lambda route: held.append(route))
    page.select_option("#model-1", "transformer")
    page.fill("#max", "4")
    page.click("#go")
    expect(page.locator(".text").nth(1).locator("span").nth(3)).to_be_attached()
    for _ in range(100):
        if len(held) == 2:
            break
        page.wait_for_timeout(50)
    expect(legends.first).to_contain_text("Colour: surprisal")
    expect(legends.first).to_contain_text("comes when the text is done")
    for route in held:
        route.continue_()
    finished(page, 2)
    expect(legends.first).to_contain_text("Colour: what the memory gains")
    expect(page.locator(".scale").first).to_contain_text("helps")
    expect(legends.nth(1)).to_contain_text("Colour: surprisal")
    expect(page.locator(".scale").nth(1)).to_contain_text("surprised")


def test_what_would_saturate_is_on_a_logarithmic_scale(page: Page):
    factor = 1.0

    def scaled(route: Route) -> None:
        answer = route.fetch()
        content = answer.json()
        for name, low in (("live", 1.0), ("zero", 2.0), ("embedding", 1.5)):
            content["bits"][name] = [low * factor] * len(content["bits"][name])
        route.fulfill(response=answer, body=json.dumps(content))

    page.route("**/playground/inspect", scaled)
    go(page, "hello", 0)
    expect(page.locator(".meaning")).not_to_contain_text("logarithmic")
    expect(page.locator(".ticks")).to_contain_text("+4 bits")
    mild = page.locator(".text span").nth(2).get_attribute("style")
    factor = 50.0
    go(page, "hello", 0)
    expect(page.locator(".meaning")).to_contain_text("on a logarithmic scale")
    expect(page.locator(".ticks")).to_contain_text("+63 bits")  # of gains up to 50
    expect(page.locator(".map ol")).to_contain_text("surprisal, 0 to 127 bits, log")
    assert page.locator(".text span").nth(2).get_attribute("style") != mild


def test_one_text_by_two_models_whose_tokens_are_others(page: Page):
    answers = inspections(page)
    go(page, "hello there, naïve café 漢字かな", 16, model_1="transformer")
    texts = page.locator(".text")
    assert texts.nth(0).inner_text().replace("·", "") == texts.nth(1).inner_text().replace("·", "")
    counts = [texts.nth(i).locator("span").count() for i in range(2)]
    assert counts[0] != counts[1]
    totals = [sum(answer["bits"]["live"]) for answer in answers]
    few, many = sorted(totals)
    expect(page.locator("#comparison")).to_contain_text("The same text costs lrt")
    expect(page.locator("#comparison")).to_contain_text(f"needs {many - few:.0f}" if many - few >= 10 else "needs")
    starts = [
        texts.nth(i)
        .locator("span")
        .evaluate_all(
            "spans => spans.map(span => span.textContent).reduce(([ends, at], text) => [[...ends, at + text.length],"
            " at + text.length], [[], 0])[0]"
        )
        for i in range(2)
    ]
    for t in (3, 8, counts[0] - 1):
        texts.nth(0).locator("span").nth(t).click()
        start = starts[0][t - 1]
        there = next(i for i, end in enumerate(starts[1]) if end > start)
        assert (selected(page, 0), selected(page, 1)) == (t, there)
    texts.nth(1).focus()
    page.keyboard.press("Home")
    assert (selected(page, 0), selected(page, 1)) == (0, 0)
    page.select_option("#reads", "own")
    go(page, "hello there", 16, model_1="transformer")
    assert texts.nth(0).inner_text() != texts.nth(1).inner_text()
    expect(page.locator("#comparison")).to_be_empty()


def test_a_link_fills_the_form_and_runs(page: Page, context: BrowserContext, up: Live):
    page.click("summary")
    page.fill("#seed", "7")
    page.fill("#top-p", "0.9")
    page.locator("#key").evaluate("node => { node.value = 'a-secret-of-mine-1234' }")
    go(page, "hello & there? #1 naïve", 10, model_1="transformer", by="live")
    page.click("#share")
    expect(page.locator("#shared")).to_contain_text("The link is")
    link = page.url
    assert "a-secret" not in link
    assert urllib.parse.parse_qs(link.partition("#")[2])["prompt"] == ["hello & there? #1 naïve"]
    other = context.new_page()
    other.goto(link)
    finished(other, 2)
    for field in ("prompt", "max", "temperature", "top-p", "seed", "prefill", "model-0", "model-1", "reads", "by"):
        assert other.input_value(f"#{field}") == page.input_value(f"#{field}")
    assert other.locator(".text").first.inner_text() == page.locator(".text").first.inner_text()
    assert other.locator("#more").get_attribute("open") is not None
    filled = context.new_page()  # without `run` it only fills the form
    filled.goto(f"{up.url}#prompt=only+this&tokens=3")
    expect(filled.locator("#prompt")).to_have_value("only this")
    expect(filled.locator(".text span")).to_have_count(0)
    filled.evaluate("location.hash = '#model=gone&prompt=more'")
    expect(filled.locator("#message")).to_contain_text("This link asks for Checkpoint “gone”")


def test_a_picture_of_the_text(page: Page):
    go(page, "hello there, naïve café 漢字かな\nand a second line", 20)
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Save picture").click()
    assert waiting.value.suggested_filename == "lrt.png"
    image = Image.open(io.BytesIO(Path(waiting.value.path()).read_bytes())).convert("RGB")
    assert image.width == 1920
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    corner = image.getpixel((2, 2))
    assert isinstance(corner, tuple)
    assert (sum(corner) < 200) == dark
    assert len(image.getcolors(2**24) or []) > 200


def test_examples_fit_the_checkpoint(page: Page):
    chips = page.locator(".chip")
    expect(chips.first).to_contain_text("def __init__")
    page.select_option("#model-0", "chess")
    expect(chips.first).to_contain_text("engine e2 e4")
    chips.nth(1).press("Enter")
    expect(page.locator("#prompt")).to_have_value("engine d2 d4 g8 f6 ")


def test_messages_are_in_the_labels_words(page: Page):
    message = page.locator("#message")
    for field, value, text in (
        ("max", "-1", "Tokens must be at least 0"),
        ("max", "", "Tokens must be a number"),
        ("max", "1.5", "Tokens must be a whole number"),
        ("temperature", "3", "Temperature must be at most 2"),
    ):
        before = page.input_value(f"#{field}")
        page.fill(f"#{field}", value)
        page.keyboard.press("Control+Enter")
        expect(message).to_have_text(text)
        expect(page.locator(f"#{field}")).to_be_focused()
        expect(page.locator(f"#{field}")).to_have_attribute("aria-invalid", "true")
        page.fill(f"#{field}", before)
    page.locator("#top-p").evaluate("node => { node.value = 2 }")
    page.keyboard.press("Control+Enter")
    expect(message).to_have_text("Top p must be at most 1")
    expect(page.locator("#top-p")).to_be_visible()  # it was behind More
    page.fill("#top-p", "0.9")
    go(page, "hello", 4)
    expect(message).to_be_empty()


def test_what_the_server_refuses_is_in_the_labels_words(context: BrowserContext, up: Live):
    page = context.new_page()  # a refused request stands on the console
    page.goto(up.url)
    expect(page.locator("#model-0 option")).to_have_count(4)
    go(page, "hello", 999)
    alarm = page.locator(".pane [role=alert]")
    expect(alarm).to_contain_text("Tokens is 999: together more than the context")
    expect(alarm).not_to_contain_text("max_tokens")


def test_the_heat_map_by_keyboard(page: Page):
    answers = inspections(page)
    go(page, "hello there", 6)
    grid = page.get_by_role("grid")
    grid.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert selected(page) == 2
    cell = page.locator(f"#{grid.get_attribute('aria-activedescendant')}")
    value = answers[0]["bits"]["zero"][1]
    expect(cell).to_have_attribute("aria-label", f'surprisal, memory zeroed: {value:.2f} bits at "llo", position 2')
    expect(page.locator(".readout")).to_contain_text(f"{value:.2f} bits")
    page.keyboard.press("End")
    page.keyboard.press("ArrowDown")
    assert selected(page) == page.locator(".text span").count() - 1
    expect(page.locator(".readout")).to_contain_text("surprisal, previous embedding")
    rows = int(grid.get_attribute("aria-rowcount") or 0)
    for _ in range(rows + 3):
        page.keyboard.press("ArrowDown")
    expect(page.locator(".readout")).to_contain_text("memory ÷ own values, layer 2")
    canvas = page.locator("canvas")
    canvas.hover(position={"x": 14 * 1 + 5, "y": 25})  # by mouse: the first row, token 1
    assert selected(page) == 1
    expect(page.locator(".readout")).to_contain_text("surprisal, with recurrence")


def test_programs_and_boards_beside_what_is_read(page: Page):
    go(page, "b = 3\na = b\nc += b\n", 0, model_0="repl")
    page.locator(".text").focus()
    page.keyboard.press("Home")
    state = page.locator(".state")
    expect(state).to_contain_text("2 of 9 right after this token")  # a and m[0] are 0 at first
    expect(state.locator("li").nth(0)).to_have_text("a = 0 ✓")
    expect(state.locator("li").nth(1)).to_have_text("b = 0 ✗ is 1")
    page.keyboard.press("End")
    expect(state.locator("li").nth(0)).to_have_text("a = 0 ✗ is 3")
    expect(state.locator("li").nth(2)).to_have_text("c = 0 ✗ is 5")
    expect(page.locator(".map ol")).to_contain_text("read right")
    state.get_by_role("button").click()
    expect(page.locator(":popover-open")).to_contain_text("right 50 % of the time")
    page.keyboard.press("Escape")
    go(page, "this is no program\n", 0)
    page.locator(".text").press("End")
    expect(state).to_contain_text("the text has left the rules of repl")
    go(page, "engine e2 e4", 0, model_0="chess")
    page.locator(".text").press("End")
    expect(state).to_contain_text("32 of 64 right")
    board = state.get_by_role("img")
    assert "e4 reads empty and is P" in (board.get_attribute("aria-label") or "")
    assert "e2 reads" not in (board.get_attribute("aria-label") or "")
    assert board.locator(".wrong").count() == 32
    go(page, "hello", 0, model_0="lrt")
    expect(state).to_be_hidden()  # it has no probe


@pytest.mark.parametrize("context", ["wide light", "wide dark", "phone light", "phone dark"], indirect=True)
def test_nothing_serious_for_axe_and_nothing_too_wide(page: Page):
    assert serious_findings(page) == []
    go(page, "b = 3\na = b\n" * 6, 8, model_0="repl", model_1="transformer")
    page.click("summary")
    assert serious_findings(page) == []
    page.select_option("#model-1", "")
    go(page, "engine e2 e4 e7 e5", 8, model_0="chess", by="zero")
    page.get_by_label("About this checkpoint").click()
    assert serious_findings(page) == []
    width = page.viewport_size["width"]  # pyright: ignore[reportOptionalSubscript]
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_stranger_gets_the_page_and_no_data(tmp_path: Path, browser: Browser):
    with live(saved(tmp_path / "lrt"), tokens=[TOKEN]) as guarded:
        page = browser.new_page()
        statuses: dict[str, int] = {}
        page.on("response", lambda answer: statuses.update({answer.url.removeprefix(guarded.url): answer.status}))
        page.goto(guarded.url)
        expect(page.locator("#message")).to_contain_text("the token is missing or wrong")
        assert statuses.pop("/playground/models") == 401
        assert len(statuses) > 5
        assert set(statuses.values()) == {200}
        page.close()
