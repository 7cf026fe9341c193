"""Where engines, sessions, calibrations and decoders begin to refuse, and what they choose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.generation import CONFIGS, CONTEXT, V, configuration
from support.models import assert_same, decode, random_model

from lrt import MemoryConfig, Sampling, refine, schedules
from lrt.inference import decoders
from lrt.inference.calibrate import calibrate, sample_text
from lrt.inference.decoders import decoder, fastest
from lrt.inference.engine import CHUNK, Engine, usual_slots
from lrt.inference.row_pool import row_bytes, rows_that_fit
from lrt.inference.session import Session

MODEL = random_model(CONFIGS["both"])
GREEDY = Sampling(temperature=0)


def test_rows_fit_up_to_the_last_byte():
    size = row_bytes(MODEL, CONTEXT)
    state = MODEL.empty_state(1, CONTEXT)
    assert size == sum(x.nbytes for x in (*state.keys, *state.values, state.memory, state.tokens, state.slot_positions))
    assert [rows_that_fit(MODEL, size * n + extra, CONTEXT) for n, extra in ((1, 0), (2, 5), (3, -1))] == [1, 2, 2]
    with pytest.raises(ValueError, match="give more, or fewer slots"):
        rows_that_fit(MODEL, size - 1, CONTEXT)
    assert Engine(MODEL, rows=3, memory=3 * size).rows.free == 3
    with pytest.raises(ValueError, match=r"4 rows of .* exceed"):
        Engine(MODEL, rows=4, memory=4 * size - 1)
    for fields in ({"rows": 0}, {"prompts": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(fields))} is 0"):
            Engine(MODEL, **fields)
    assert Engine(MODEL, rows=1, prompts=1).rows.free == 1


def test_the_best_step_of_the_fastest_mode_decides(monkeypatch: pytest.MonkeyPatch):
    clock = SimpleNamespace(now=0.0)

    def mode(seconds: list[float], covered: bool = True) -> Any:
        steps = iter(seconds)

        class Fake:
            @staticmethod
            def covers(model: Any) -> bool:
                return covered

            def __init__(self, model: Any, state: Any) -> None: ...

            def __call__(self, tokens: torch.Tensor, positions: list[int]) -> torch.Tensor:
                clock.now += next(steps)
                return torch.zeros(1)

            def logits(self, hidden: torch.Tensor) -> torch.Tensor:
                return hidden

        return Fake

    modes = {"steady": mode([2.0] * 12), "uneven": mode([9.0] * 11 + [1.0]), "none": mode([0.0] * 12, covered=False)}
    monkeypatch.setattr(decoders, "MODES", modes)
    monkeypatch.setattr(decoders, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    assert fastest(MODEL, MODEL.empty_state(2, CONTEXT), tuple(modes)) == "uneven"
    assert clock.now == 24 + 100  # twelve steps each: the first may compile


def test_a_session_is_cropped_to_what_it_was():
    session = Session.start(MODEL, (1, 2, 3))
    assert (session.seed, session.tokens) == (0, (1, 2, 3))
    longer = session.generate(4, GREEDY)
    back = longer.crop(3)
    assert (back.tokens, longer.crop(7), longer.rewind(4).tokens) == ((1, 2, 3), longer, (1, 2, 3))
    assert not back.hidden.requires_grad
    assert_same(back.hidden, session.hidden)
    assert back.generate(4, GREEDY).tokens == longer.tokens
    for length in (0, 8):
        with pytest.raises(ValueError, match=f"to {length}; give 1 to 7"):
            longer.crop(length)
    with pytest.raises(ValueError, match="rewind by -1"):
        longer.rewind(-1)
    for token in (-1, V):
        with pytest.raises(ValueError, match=rf"token \[{token}\] is none of the model's"):
            Session.start(MODEL, (1, token))
    assert Session.start(MODEL, (0, V - 1)).tokens == (0, V - 1)


@pytest.mark.parametrize("first", range(6))
def test_a_typical_prompt_is_the_models_own_continuation(first: int):
    text = sample_text(MODEL, first, 9)
    generator = torch.Generator().manual_seed(0)
    expected = torch.tensor([[first]])
    with torch.no_grad():
        while expected.shape[1] < 9:
            logits = MODEL.logits(refine(MODEL, expected, schedules.sequential()).hidden[:, -1])
            drawn = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
            expected = torch.cat([expected, drawn], 1)
    assert torch.equal(text, expected)


def test_a_calibration_needs_two_classes_of_the_smallest_stride():
    text = sample_text(MODEL, 5, 8)
    assert calibrate(MODEL, text, progress=False).plans.keys() == {"converged", "fast"}
    for wrong in (text[:, :7], text[0], text.expand(2, -1)):
        with pytest.raises(ValueError, match="8"):
            calibrate(MODEL, wrong, progress=False)


@pytest.mark.parametrize("mode", ["eager", "fused"])
def test_latent_thoughts_are_decoded_raggedly(mode: str):
    model = random_model(configuration(thoughts=2, memory=MemoryConfig(injection="none")))
    tokens = torch.randint(V, (2, 5), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = decode(model, tokens, model.empty_state(2, 5))
    way = decoder(model, model.empty_state(2, 5), mode)
    assert_same(torch.stack([way(tokens[:, t], [t, t]) for t in range(5)], 1), expected)
    late = decoder(model, model.empty_state(2, 5), mode)  # row 1 begins two steps after row 0
    late(tokens[:1, 0], [0])
    late(tokens[:1, 1], [1])
    for t in range(3):
        hidden = late(torch.stack([tokens[0, t + 2], tokens[1, t]]), [t + 2, t])
        assert_same(hidden, torch.stack([expected[0, t + 2], expected[1, t]]))


def test_an_engine_says_its_mode_and_how_long_its_rows_are():
    assert [Engine(MODEL, rows=1, mode=mode).mode for mode in ("eager", "fused")] == ["eager", "fused"]
    sliding = CONFIGS["sliding"]
    assert usual_slots(CONFIGS["both"], "exact") == CONTEXT
    assert usual_slots(sliding, "exact") == sliding.lookback + 1
    assert usual_slots(sliding, "converged") == sliding.lookback + CHUNK
