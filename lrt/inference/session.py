"""A session: one sequence, all that a model knows about it, and where its sampling stands, as a value.

Nothing changes a session, a frozen value of state, tokens and seed: to extend, rewind or continue it gives another one,
and both stay good. The memory history in the State is what makes going back exact: the last memory alone would not.

A draw is a function of seed and position, so that going back and on again draws the same.

On the disk a session is a folder, and reading one unpickles nothing:

    state.safetensors   keys, values, memory, tokens
    session.json        the fingerprint of the model, the seed, size and SHA-256 of the other
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lrt.inference.certificate import Certificate, PrefillReport
from lrt.inference.cost_model import Calibration
from lrt.inference.decoders import decoder
from lrt.inference.exactness import least_exact
from lrt.inference.generation import continuation
from lrt.inference.prefill import Prefilled, PrefillMode, prefill
from lrt.inference.sampling import Sampling
from lrt.model.fingerprint import fingerprint
from lrt.model.state import State
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.utils.files import read_json, recover, replace_folder, sha256, temporary_name

TURNS = "turns.json"
"""Of a conversation: where its turns began."""
FILES = ("state.safetensors", "session.json", TURNS)
"""What the folder of a session may have. What else lies there stays when it is saved again."""
FORMAT = 1
"""Of the folder."""
CHUNK = 256
"""Slots beyond the lookback where slots are reused: what is computed at once, and about how far `crop` can go back."""


@dataclass(frozen=True)
class Session:
    """One sequence with one model. Shapes: T tokens, S slots, D width."""

    model: LatentRecurrentTransformer
    tokens: tuple[int, ...]
    """All tokens so far, given and drawn, at least one."""
    state: State
    """One row that holds every one of them, or the last ones where slots are reused."""
    hidden: Tensor
    """(1, 1, D): the final hidden state of the last token, from which the next is drawn."""
    seed: int = 0
    """What is drawn at a position depends on the seed and the position alone, not on how it was reached."""
    report: PrefillReport | None = None
    """Of the last prefill, no more exact than what it went on from; None after a token was drawn."""
    certificate: Certificate | None = None
    """Of the least exact part of the text. None: exact, or loaded from a folder that does not say (of 0.1)."""

    def __repr__(self) -> str:
        return f"Session({len(self.tokens):,} tokens, seed={self.seed})"

    @classmethod
    def start(
        cls,
        model: LatentRecurrentTransformer,
        tokens: Sequence[int],
        mode: PrefillMode = "converged",
        seed: int = 0,
        calibration: Calibration | None = None,
    ) -> Session:
        """A session that begins with these tokens, prefilled by `mode` (as in `prefill.py`).

        ValueError where there are none, or more than the context holds.
        """
        # Where the context is bounded, slots are added as they are needed (`_room`).
        slots = model.config.lookback + CHUNK if model.config.unlimited_context else 1
        empty = model.empty_state(1, slots)
        return _extend(cls(model, (), empty, empty.memory.new_zeros(1, 1, 1), seed), tokens, mode, calibration)

    def extend(
        self, tokens: Sequence[int], mode: PrefillMode = "converged", calibration: Calibration | None = None
    ) -> Session:
        """This session and more given tokens, prefilled behind its own. ValueErrors as in `start`."""
        return _extend(self, tokens, mode, calibration)

    def fork(self, seed: int) -> Session:
        """The same session with another seed and tensors of its own: one of several continuations."""
        return dataclasses.replace(self, state=self.state.clone(), hidden=self.hidden.clone(), seed=seed)

    def crop(self, length: int) -> Session:
        """The session as it was when it had `length` tokens.

        The last token is computed anew: for most sources its final hidden state is not part of the State.
        Raises ValueError where slots are reused and what was then known is overwritten: no more than the State's
        slots less the lookback (longest window, delay) can be taken back.
        """
        if not 1 <= length <= len(self.tokens):
            raise ValueError(
                f"cannot crop a session of {len(self.tokens)} tokens to {length}; give 1 to {len(self.tokens)}"
            )
        if length == len(self.tokens):
            return self
        before, last = length - 1, self._row(self.tokens[length - 1 : length])
        if not bool(self.state.intact(last.new_tensor([before]), self.model.config.lookback).all()) and before != 0:
            raise ValueError(
                f"{len(self.tokens)} tokens cannot be cropped to {length}: the {self.state.slots} slots were reused, "
                f"so that at most {self.state.slots - self.model.config.lookback - 1} can be taken back"
            )
        with torch.no_grad():
            hidden, state = self.model(last, range(before, length), self.state.crop(before))
        return dataclasses.replace(self, tokens=self.tokens[:length], state=state, hidden=hidden, report=None)

    def rewind(self, count: int) -> Session:
        """The session without its last `count` tokens, of which one must stay."""
        if count < 0:
            raise ValueError(f"cannot rewind by {count} tokens; give 0 or more")
        return self.crop(len(self.tokens) - count)

    def generate(
        self,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: frozenset[int] = frozenset(),
        on_token: Callable[[int], None] | None = None,
    ) -> Session:
        """The session continued by up to `max_new_tokens` drawn tokens; it ends with the first one in `stop`.

        `on_token` is called with each token as soon as it is drawn. ValueError where the context has no room for them.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
        step = decoder(self.model, self._room(max_new_tokens))  # on a copy of the State, which it overwrites
        tokens, hidden = list(self.tokens), self.hidden.squeeze(1)
        for token in continuation(step, hidden, len(tokens), sampling or Sampling(), [self.seed], max_new_tokens):
            tokens.append(int(token))
            if on_token is not None:
                on_token(tokens[-1])
            if tokens[-1] in stop:
                break
        if len(tokens) > len(self.tokens):  # `continuation` feeds all but the last; a session has that in its State too
            hidden = step(self._row(tokens[-1:])[0], [len(tokens) - 1])
        # A fused step does not raise `written_until`. Where all was written before, it still is.
        written = len(tokens) if self.state.written_until == len(self.tokens) else self.state.written_until
        state = dataclasses.replace(step.state, write=self.state.write, written_until=written)
        hidden = hidden.unsqueeze(1).clone()  # outside inference mode: an ordinary tensor
        return dataclasses.replace(self, tokens=tuple(tokens), state=state, hidden=hidden, report=None)

    def save(self, path: str | Path, beside: Mapping[str, str] | None = None) -> None:
        """Write the session to a folder, in the place of an older session there.

        `beside`: name -> text of further files, which are the session's: they come and go with it.
        It is written beside its target and renamed when whole. Raises ValueError where the folder is something else's,
        OSError where the disk does not take it; an older session is then untouched.
        """
        path = Path(path)
        if path.exists() and not (path / "session.json").exists() and any(path.iterdir()):
            raise ValueError(f"{path} holds something that is no session; choose another folder")
        fresh = temporary_name(path)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        try:
            safetensors.torch.save_file(_tensors(self), fresh / "state.safetensors")
            (fresh / "session.json").write_text(json.dumps(_about(self, fresh), indent=2) + "\n")
            for name, text in (beside or {}).items():
                (fresh / name).write_text(text, encoding="utf-8")
            replace_folder(fresh, path, FILES)
        except BaseException as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if isinstance(error, safetensors.SafetensorError | RuntimeError):  # what its writer raises on a full disk
                raise OSError(f"cannot save to {path}: {error}; an older session there is untouched") from error
            raise

    @classmethod
    def load(cls, path: str | Path, model: LatentRecurrentTransformer) -> Session:
        """The session of a folder, for the model that it was made with.

        Raises ValueError where it belongs to another model, or where a file is missing, truncated or changed.
        """
        path = Path(path)
        recover(path)
        if not (path / "session.json").is_file():
            raise ValueError(f"{path} is no session: it has no session.json")
        about, file = read_json(path / "session.json"), path / "state.safetensors"
        if about.get("format") != FORMAT:
            raise ValueError(f"{path}: format {about.get('format')!r}; this version reads {FORMAT}")
        if about.get("model") != fingerprint(model):
            raise ValueError(
                f"{path} was made by another model (other weights, shape or number type); load the one that made it"
            )
        intact = file.is_file() and file.stat().st_size == about.get("bytes") and sha256(file) == about.get("sha256")
        if not intact:
            raise ValueError(
                f"{file} is missing, truncated or changed; restore it from a copy, or prefill the text anew"
            )
        device = str(model.embedding.weight.device)
        try:
            return _rebuild(model, safetensors.torch.load_file(file, device=device), about)
        except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} describes no session of this version ({error!r})") from error

    def _row(self, tokens: Sequence[int]) -> Tensor:
        """Tokens as a batch of one row, (1, n)."""
        return torch.tensor([list(tokens)], device=self.state.tokens.device)

    def _room(self, count: int) -> State:
        """The state with slots for `count` more tokens. ValueError where the context has no room for them."""
        if self.model.config.unlimited_context:
            return self.state
        length, context = len(self.tokens) + count, self.model.config.context
        if length > context:
            raise ValueError(
                f"{len(self.tokens)} tokens and {count} more exceed the context of {context}; shorten one of them, or "
                "use a model in which every layer has a sliding window"
            )
        return self.state.resized(max(1, length))


def _extend(session: Session, tokens: Sequence[int], mode: PrefillMode, calibration: Calibration | None) -> Session:
    """What `start` and `extend` share: the tokens checked, prefilled behind the session's, and appended to them."""
    if len(tokens) == 0:
        raise ValueError("the prompt is empty; give at least one token (BOS will do)")
    vocabulary = session.model.config.vocab_size
    wrong = [t for t in tokens if not 0 <= t < vocabulary]
    if wrong:
        raise ValueError(f"token {wrong[:1]} is none of the model's {vocabulary}; was it made by another tokenizer?")
    state = session._room(len(tokens))
    done: Prefilled = prefill(session.model, session._row(tokens), state, mode, calibration=calibration)
    certificate = least_exact(session.certificate, done.report.rows[0], len(session.tokens) + len(tokens))
    assert certificate is not None
    return dataclasses.replace(
        session,
        tokens=(*session.tokens, *map(int, tokens)),
        state=done.state,
        hidden=done.hidden,
        report=dataclasses.replace(done.report, rows=(certificate,)),
        certificate=certificate,
    )


def _tensors(session: Session) -> dict[str, Tensor]:
    """What state.safetensors keeps: the slots in use, or all of them where they are reused."""
    state = session.state if session.model.config.unlimited_context else session.state.resized(len(session.tokens))
    layers = range(len(state.keys))
    named = {f"keys.{i}": state.keys[i] for i in layers} | {f"values.{i}": state.values[i] for i in layers}
    # The names are those of the file (format 1), older than those of the State.
    named |= {"memory": state.memory, "known": state.tokens, "held": state.slot_positions, "hidden": session.hidden}
    named["tokens"] = torch.tensor(session.tokens)
    return {name: tensor.contiguous() for name, tensor in named.items()}


def _about(session: Session, folder: Path) -> dict[str, Any]:
    """What session.json says, of a folder that has state.safetensors already."""
    file = folder / "state.safetensors"
    return {
        "format": FORMAT,
        "model": fingerprint(session.model),
        "seed": session.seed,
        "certificate": None if session.certificate is None else session.certificate.to_dict(),
        "bytes": file.stat().st_size,
        "sha256": sha256(file),
    }


def _rebuild(model: LatentRecurrentTransformer, tensors: dict[str, Tensor], about: dict[str, Any]) -> Session:
    """The session of `_tensors` and `_about`. KeyError or ValueError where something is lacking or unknown."""
    layers, slots = model.config.kv_layers, tensors["held"].shape[1]
    state = dataclasses.replace(
        model.empty_state(1, slots),
        keys=tuple(tensors[f"keys.{i}"] for i in range(layers)),
        values=tuple(tensors[f"values.{i}"] for i in range(layers)),
        memory=tensors["memory"],
        tokens=tensors["known"],
        slot_positions=tensors["held"],
        written_until=tensors["tokens"].shape[0],
    )
    kept = about.get("certificate")
    certificate = None if kept is None else Certificate(**kept)
    tokens = tuple(tensors["tokens"].tolist())
    return Session(model, tokens, state, tensors["hidden"], int(about["seed"]), certificate=certificate)
