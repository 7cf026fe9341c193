"""One promise: a session is a value. Forked, cropped, rewound, saved and read again, it goes on as it would have gone.

In float64 to 1e-10 and token by token; float32 is counted by lrt/experiments/bench/equality.py.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lrt import LatentRecurrentTransformer, MemoryConfig, ModelConfig
from lrt.inference.cost_model import Calibration, Plan
from lrt.inference.engine import Engine
from lrt.inference.request import Request
from lrt.inference.sampling import Sampling
from lrt.inference.session import CHUNK, Session

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
MEMORIES = {
    "final": MemoryConfig(),
    "below": MemoryConfig(source=1, initial="embedding", delay=2),
    "channels": MemoryConfig(source=(0, 1, 2), combine="channels"),
    "delays": MemoryConfig(source=(0, 0, 2, 2), combine="channels", delay=(1, 3, 1, 2)),
    "none": MemoryConfig(injection="none"),
}


def model_of(memory: MemoryConfig, seed: int = 0, **settings: Any) -> LatentRecurrentTransformer:
    """A tiny model in float64 whose parameters are all random."""
    torch.manual_seed(seed)
    config = ModelConfig(depth=2, width=16, heads=2, vocab_size=31, **{"context": 64, "memory": memory, **settings})
    model = LatentRecurrentTransformer(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.dim() < 2 else p.shape[-1] ** -0.5))
    return model


@pytest.fixture(params=MEMORIES)
def model(request: pytest.FixtureRequest) -> LatentRecurrentTransformer:
    return model_of(MEMORIES[request.param])


def same(a: Session, b: Session) -> None:
    """Equal in what counts: tokens, the hidden state, and all that goes on from there."""
    assert a.tokens == b.tokens
    torch.testing.assert_close(a.hidden, b.hidden, rtol=0, atol=1e-10)
    assert a.generate(8).tokens == b.generate(8).tokens
    further = a.extend([7, 7, 1], "exact"), b.extend([7, 7, 1], "exact")
    torch.testing.assert_close(further[0].hidden, further[1].hidden, rtol=0, atol=1e-10)


def test_split_prefill_is_the_whole(model: LatentRecurrentTransformer) -> None:
    whole = Session.start(model, PROMPT, "exact")
    for cut in (1, 5, len(PROMPT) - 1):
        same(Session.start(model, PROMPT[:cut], "exact").extend(PROMPT[cut:], "exact"), whole)
    same(Session.start(model, PROMPT[:4], "exact").extend(PROMPT[4:5], "exact").extend(PROMPT[5:], "exact"), whole)


def test_drawn_tokens_are_like_given_ones(model: LatentRecurrentTransformer) -> None:
    drawn = Session.start(model, PROMPT, "exact").generate(6)
    assert drawn.tokens[: len(PROMPT)] == tuple(PROMPT)
    same(Session.start(model, drawn.tokens, "exact"), drawn)


@pytest.mark.parametrize("length", [1, 2, 7, len(PROMPT), len(PROMPT) + 5])
def test_cropped_is_what_it_was(model: LatentRecurrentTransformer, length: int) -> None:
    drawn = Session.start(model, PROMPT, "exact").generate(6)
    same(drawn.crop(length), Session.start(model, drawn.tokens[:length], "exact"))
    same(drawn.rewind(len(drawn.tokens) - length), drawn.crop(length))


def test_rewound_and_continued_otherwise(model: LatentRecurrentTransformer) -> None:
    """What was taken back leaves no trace in another continuation, in none of its buffers."""
    other = Session.start(model, PROMPT, "exact").generate(6).rewind(9).extend([8, 8, 8, 8], "exact")
    same(other, Session.start(model, [*PROMPT[:9], 8, 8, 8, 8], "exact"))


def test_rewound_draws_the_same_again(model: LatentRecurrentTransformer) -> None:
    drawn = Session.start(model, PROMPT, "exact", seed=5).generate(6)
    assert drawn.rewind(4).generate(4).tokens == drawn.tokens


def test_the_engine_draws_the_same(model: LatentRecurrentTransformer) -> None:
    sampling = Sampling(temperature=0.9, top_k=20)
    session = Session.start(model, PROMPT, "exact", seed=5).generate(8, sampling)
    ((served,),) = Engine(model, rows=1).complete([Request(tuple(PROMPT), 8, sampling, seed=5)])
    assert (*PROMPT, *served.tokens) == session.tokens


def test_forks_are_independent(model: LatentRecurrentTransformer) -> None:
    start = Session.start(model, PROMPT, "exact")
    before = start.generate(6).tokens
    forks = [start.fork(seed).generate(6, Sampling(temperature=2.0)) for seed in range(4)]
    assert len({f.tokens for f in forks}) > 1
    for f in forks:
        same(f, Session.start(model, f.tokens, "exact", seed=f.seed))
    assert start.generate(6).tokens == before


def test_nothing_changes_a_session(model: LatentRecurrentTransformer) -> None:
    start = Session.start(model, PROMPT, "exact").generate(3)
    buffers = (
        *start.state.keys,
        *start.state.values,
        start.state.memory,
        start.state.tokens,
        start.state.slot_positions,
    )
    kept = [buffer.clone() for buffer in buffers]
    start.generate(5), start.extend([1, 2]), start.crop(4).generate(4), start.fork(9).generate(2)
    assert all(torch.equal(now, then) for now, then in zip(buffers, kept, strict=True))


def test_saved_and_read_again(model: LatentRecurrentTransformer, tmp_path: Path) -> None:
    session = Session.start(model, PROMPT, "exact", seed=11).generate(4)
    session.save(tmp_path / "s")
    again = Session.load(tmp_path / "s", model)
    assert again.seed == 11
    same(again, session)
    same(again.rewind(6), session.rewind(6))
    assert sorted(f.name for f in (tmp_path / "s").iterdir()) == ["session.json", "state.safetensors"]


def test_a_save_replaces_an_older_one(tmp_path: Path) -> None:
    model = model_of(MemoryConfig())
    short, long = Session.start(model, PROMPT[:3], "exact"), Session.start(model, PROMPT, "exact")
    long.save(tmp_path / "s")
    short.save(tmp_path / "s")
    same(Session.load(tmp_path / "s", model), short)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_saved_session_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    session = Session.start(model_of(MemoryConfig()), PROMPT, "exact")
    (tmp_path / "plain").write_text("")
    session.save(tmp_path / "s")
    (tmp_path / "s" / "notes.txt").write_text("the user's own")
    session.save(tmp_path / "s")
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "s").iterdir()}
    usual = (tmp_path / "plain").stat().st_mode
    assert modes == dict.fromkeys(["state.safetensors", "session.json", "notes.txt"], usual)


# ------------------------------------------------------------------------------------------------------ sliding windows


def sliding() -> LatentRecurrentTransformer:
    return model_of(MemoryConfig(source=1), window_pattern="S", window=4, context=16)


def test_without_end_where_every_layer_slides(tmp_path: Path) -> None:
    """Far beyond the context, on slots that are used again and again."""
    model = sliding()
    tokens = list(itertools.islice(itertools.cycle(PROMPT), 2 * CHUNK + 77))
    parts = Session.start(model, tokens[:100], "exact").extend(tokens[100:], "exact")
    assert parts.state.slots < len(tokens)
    empty = model.empty_state(1, len(tokens))
    hidden, _ = torch.zeros(0), None
    with torch.no_grad():
        state = empty.in_place()
        for t, token in enumerate(tokens):
            hidden, state = model(torch.tensor([[token]]), range(t, t + 1), state)
    torch.testing.assert_close(parts.hidden, hidden, rtol=0, atol=1e-10)
    parts.save(tmp_path / "s")
    same(Session.load(tmp_path / "s", model), parts)
    same(parts.rewind(CHUNK - 1), Session.start(model, tokens[: len(tokens) - CHUNK + 1], "exact"))


def test_what_was_overwritten_cannot_be_taken_back() -> None:
    model = sliding()
    tokens = list(itertools.islice(itertools.cycle(PROMPT), 2 * CHUNK))
    session = Session.start(model, tokens, "exact")
    session.rewind(CHUNK - 1)
    with pytest.raises(ValueError, match=f"at most {CHUNK - 1} can be taken back"):
        session.rewind(CHUNK)


# --------------------------------------------------------------------------------------------------------------- errors


def test_mistakes_are_errors_that_say_the_fix() -> None:
    model = model_of(MemoryConfig())
    with pytest.raises(ValueError, match="the prompt is empty"):
        Session.start(model, [])
    with pytest.raises(ValueError, match="exceed the context of 64"):
        Session.start(model, [1] * 65)
    session = Session.start(model, [1] * 60, "exact")
    with pytest.raises(ValueError, match="exceed the context of 64"):
        session.extend([1] * 5)
    with pytest.raises(ValueError, match="exceed the context of 64"):
        session.generate(5)
    with pytest.raises(ValueError, match="token \\[31\\] is none of the model's 31"):
        session.extend([31])
    with pytest.raises(ValueError, match="give 1 to 60"):
        session.rewind(60)


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"memory": MemoryConfig(source=1)}, {"context": 32}],
    ids=["weights", "memory", "context"],
)
def test_a_state_from_another_model(tmp_path: Path, other: dict[str, Any]) -> None:
    Session.start(model_of(MemoryConfig()), PROMPT).save(tmp_path / "s")
    with pytest.raises(ValueError, match="was made by another model"):
        Session.load(tmp_path / "s", model_of(**{"memory": MemoryConfig(), **other}))


def test_a_state_from_a_model_of_another_number_type(tmp_path: Path) -> None:
    Session.start(model_of(MemoryConfig()), PROMPT).save(tmp_path / "s")
    with pytest.raises(ValueError, match="was made by another model"):
        Session.load(tmp_path / "s", model_of(MemoryConfig()).float())


def test_a_damaged_folder(tmp_path: Path) -> None:
    model, folder = model_of(MemoryConfig()), tmp_path / "s"
    session = Session.start(model, PROMPT)
    session.save(folder)
    file = folder / "state.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"state\.safetensors is missing, truncated or changed"):
            Session.load(folder, model)
    file.unlink()
    with pytest.raises(ValueError, match=r"state\.safetensors is missing"):
        Session.load(folder, model)
    (folder / "session.json").write_text("{")
    with pytest.raises(ValueError, match=r"session\.json"):
        Session.load(folder, model)
    with pytest.raises(ValueError, match="is no session"):
        Session.load(tmp_path / "nowhere", model)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("")
    with pytest.raises(ValueError, match="holds something that is no session"):
        session.save(tmp_path / "other")


def test_an_unknown_format(tmp_path: Path) -> None:
    model, folder = model_of(MemoryConfig()), tmp_path / "s"
    Session.start(model, PROMPT).save(folder)
    about = json.loads((folder / "session.json").read_text())
    (folder / "session.json").write_text(json.dumps({**about, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        Session.load(folder, model)
    (folder / "session.json").write_text(json.dumps({k: v for k, v in about.items() if k != "seed"}))
    with pytest.raises(ValueError, match="no session of this version"):
        Session.load(folder, model)


def test_what_follows_an_inexact_beginning_is_no_more_exact(tmp_path: Path) -> None:
    quick = Calibration(1.0, {"converged": Plan(2, 1), "fast": Plan(2, 1)})
    model = model_of(MEMORIES["final"])
    swept = Session.start(model, PROMPT, "one_sweep", calibration=quick).generate(3)
    swept.save(tmp_path / "session")
    for session in (swept, swept.fork(1), swept.rewind(2), Session.load(tmp_path / "session", model)):
        further = session.extend([7, 1], "exact")
        assert further.report is not None
        assert not further.report.converged
        assert further.report.rows[0].path == "single"
    exact = Session.start(model, PROMPT, "exact").extend([7, 1], "exact")
    assert exact.report is not None
    assert exact.report.converged


def test_a_folder_that_says_nothing_of_exactness_is_read(tmp_path: Path) -> None:
    model = model_of(MEMORIES["final"])
    session = Session.start(model, PROMPT, "exact")
    session.save(tmp_path / "session")
    file = tmp_path / "session" / "session.json"
    about = json.loads(file.read_text())
    del about["certificate"]
    file.write_text(json.dumps(about))
    same(Session.load(tmp_path / "session", model), session)
