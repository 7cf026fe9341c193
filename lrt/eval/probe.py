"""A linear probe: what can be read from the memory after every token, by one matrix and a softmax for each variable.

It is fitted on texts whose true state is known (`text_states`), and judged on others. The same fit on the token's own
embedding is the control: what it reads was not carried. (Alain and Bengio 2016, arXiv 1610.01644; for boards Toshniwal
et al. 2021, arXiv 2102.13249.)

Shapes: B texts, T positions, N tokens of all texts, D width, V variables, C values of a variable.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from lrt.data.tokenizer import Tokenizer
from lrt.eval.text_states import STATE_KINDS
from lrt.model.fingerprint import fingerprint
from lrt.model.layers import rms
from lrt.model.transformer import LatentRecurrentTransformer
from lrt.schedules.library import plain, sequential
from lrt.schedules.refinement import refine
from lrt.utils.files import replace_atomically

FILE = "probe.safetensors"
"""Beside a checkpoint's weights: the last probe that was fitted to them."""
FORMAT = 1
EMBEDDING = "token embedding"
"""The control."""
HIDDEN = "last hidden state"
PENALTY = 1e-4
"""On the squares of the weights, of standardised vectors."""
STEPS = 200
"""Of L-BFGS at most."""
UNKNOWN = -1
"""In place of a value: the true one is not known, or there is no token."""


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """Reads V variables from a vector."""

    weight: Tensor
    """(D, V, C)."""
    bias: Tensor
    """(V, C)."""

    def read(self, vectors: Tensor) -> Tensor:
        """(…, V) int64: the likeliest value of each variable, from vectors (…, D)."""
        return (torch.einsum("...d,dvc->...vc", vectors.float(), self.weight) + self.bias).argmax(-1)


def fit_probe(vectors: Tensor, values: Tensor, count: int) -> LinearProbe:
    """Fit to vectors (N, D) and values (N, V) below `count`: multinomial logistic regression, by L-BFGS.

    All variables at once: the loss is their mean, and each has weights of its own.
    """
    vectors = vectors.float()
    mean, deviation = vectors.mean(0), vectors.std(0, correction=0).clamp(min=1e-6)
    inputs, variables = (vectors - mean) / deviation, values.shape[1]
    weight = torch.zeros(vectors.shape[1], variables * count, requires_grad=True)
    bias = torch.zeros(variables * count, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        logits = torch.addmm(bias, inputs, weight).view(-1, count)
        total = F.cross_entropy(logits, values.flatten()) + PENALTY * weight.square().sum() / variables
        total.backward()
        return total

    search.step(loss)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        scaled = weight / deviation[:, None]  # so that it reads vectors as they are
        return LinearProbe(scaled.view(-1, variables, count), (bias - mean @ scaled).view(variables, count))


@dataclass(frozen=True)
class Traces:
    """Texts as a model reads them, with the true state after every token."""

    tokens: Tensor
    """(B, T) int64: BOS and the text, padded with BOS."""
    values: Tensor
    """(B, T, V) int64: UNKNOWN at padding, and where the truth is not known."""

    @property
    def known(self) -> Tensor:
        """(B, T) bool."""
        return self.values[:, :, 0] != UNKNOWN


def trace_texts(texts: Sequence[str], kind: str, tokenizer: Tokenizer, longest: int) -> Traces:
    """Texts of a kind of `text_states`, each cut after `longest` tokens. A token's state is the one at its end."""
    rows = [[tokenizer.bos, *tokenizer.encode(text)][:longest] for text in texts]
    variables, width = len(STATE_KINDS[kind].names), max(map(len, rows))
    tokens = torch.full((len(rows), width), tokenizer.bos)
    values = torch.full((len(rows), width, variables), UNKNOWN)
    for n, row in enumerate(rows):
        tokens[n, : len(row)] = torch.tensor(row)
        for t, state in enumerate(true_states(kind, token_texts(row, tokenizer))):
            if state is not None:
                values[n, t] = torch.tensor(state)
    return Traces(tokens, values)


def token_texts(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """What each token adds to the text."""
    decoder = tokenizer.decoder()
    return [decoder.push(token) for token in tokens]


def true_states(kind: str, pieces: Sequence[str]) -> list[tuple[int, ...] | None]:
    """The state after each piece of a text; None where it is not known."""
    ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0).tolist()
    return STATE_KINDS[kind].after("".join(pieces), ends)


@torch.no_grad()
def readable_vectors(model: LatentRecurrentTransformer, tokens: Tensor) -> dict[str, Tensor]:
    """What a probe may read after each of tokens (B, T), decoded live: (B, T, D) by name.

    The token's embedding; the memory that the token writes, of each layer that is remembered; and the last hidden
    state, where that is not among them.
    """
    config = model.config
    state = model.empty_state(len(tokens), tokens.shape[1], tokens=tokens).in_place()
    out = refine(model, tokens, sequential() if config.is_recurrent else plain(), state=state)
    vectors = {EMBEDDING: rms(model.embedding(tokens))}
    for number, layer in enumerate(config.stored_sources):
        # Of several positions per token the last: its thoughts come after it.
        vectors[f"memory of layer {layer}"] = out.state.memory[
            :, config.positions_per_token - 1 :: config.positions_per_token, number
        ][:, : tokens.shape[1]]
    if config.depth not in config.stored_sources:
        vectors[HIDDEN] = out.hidden
    return vectors


def known_vectors(model: LatentRecurrentTransformer, traces: Traces, batch: int) -> tuple[dict[str, Tensor], Tensor]:
    """`readable_vectors` (N, D) of the tokens whose state is known, on the CPU, and the state's values (N, V)."""
    parts: dict[str, list[Tensor]] = {}
    for tokens, known in zip(traces.tokens.split(batch), traces.known.split(batch), strict=True):
        for name, vectors in readable_vectors(model, tokens.to(model.embedding.weight.device)).items():
            parts.setdefault(name, []).append(vectors.cpu()[known].float())
    return {name: torch.cat(part) for name, part in parts.items()}, traces.values[traces.known]


def majority_share(train: Tensor, held_out: Tensor, count: int) -> Tensor:
    """(V,): how often the most frequent value of values train (N, V) is that of held_out (M, V)."""
    commonest = F.one_hot(train, count).sum(0).argmax(-1)
    return (held_out == commonest).float().mean(0)


@dataclass(frozen=True, eq=False)
class StateProbe:
    """A probe that was fitted to a checkpoint, as it is kept beside it."""

    kind: str
    """Of `text_states`."""
    source: str
    """What it reads: a name of `readable_vectors`."""
    accuracy: float
    """On held-out texts, over all variables."""
    chance: float
    """Likewise, of the most frequent values."""
    model: str
    """Fingerprint of the weights."""
    linear: LinearProbe

    def inspect(self, model: LatentRecurrentTransformer, tokens: Tensor, pieces: Sequence[str]) -> dict[str, Any]:
        """What is read after each of tokens (1, T) whose texts are `pieces`, beside what is true: plain data."""
        kind = STATE_KINDS[self.kind]
        read = self.linear.read(readable_vectors(model, tokens)[self.source][0].cpu())
        return {
            "kind": self.kind,
            "layout": kind.layout,
            "names": kind.names,
            "values": kind.values,
            "source": self.source,
            "accuracy": self.accuracy,
            "chance": self.chance,
            "read": read.tolist(),
            "truth": true_states(self.kind, pieces[: tokens.shape[1]]),
        }


def measure_probe(
    model: LatentRecurrentTransformer, kind: str, train: Traces, held_out: Traces, batch: int
) -> tuple[dict[str, Any], StateProbe]:
    """Fit a probe to each of `readable_vectors`: (accuracies on held-out texts as plain data, the best of them)."""
    vectors, values = known_vectors(model, train, batch)
    others, truth = known_vectors(model, held_out, batch)
    names, count = STATE_KINDS[kind].names, len(STATE_KINDS[kind].values)
    probes = {source: fit_probe(rows, values, count) for source, rows in vectors.items()}
    right = {source: probe.read(others[source]) == truth for source, probe in probes.items()}
    chance = majority_share(values, truth, count)
    best = max((source for source in probes if source != EMBEDDING), key=lambda source: right[source].float().mean())
    measured = {
        "state": kind,
        "tokens": {"fitted": len(values), "held_out": len(truth)},
        "source": best,
        "chance": float(chance.mean()),
        "accuracy": {source: float(hits.float().mean()) for source, hits in right.items()},
        "whole": {source: float(hits.all(1).float().mean()) for source, hits in right.items()},
        "variables": {
            name: {
                "chance": float(chance[v]),
                "accuracy": {source: float(hits[:, v].float().mean()) for source, hits in right.items()},
            }
            for v, name in enumerate(names)
        },
    }
    accuracy = measured["accuracy"][best]
    return measured, StateProbe(kind, best, accuracy, measured["chance"], fingerprint(model), probes[best])


def write_probe(folder: Path, probe: StateProbe) -> Path:
    """Keep a probe beside a checkpoint's weights, in an older one's place. Returns its file."""
    about = {name: value for name, value in vars(probe).items() if name != "linear"} | {"format": FORMAT}
    content = safetensors.torch.save(
        {name: value.contiguous() for name, value in vars(probe.linear).items()}, {"about": json.dumps(about)}
    )
    replace_atomically(folder / FILE, content)
    return folder / FILE


def read_probe(folder: Path, model: LatentRecurrentTransformer) -> StateProbe | None:
    """The probe beside a checkpoint, if it was fitted to these weights. ValueError where the file is damaged."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        with safetensors.safe_open(file, "pt") as opened:
            about = json.loads(opened.metadata()["about"])
            linear = LinearProbe(opened.get_tensor("weight"), opened.get_tensor("bias"))
        if about.pop("format") != FORMAT:
            raise ValueError("it is of another version")
        probe = StateProbe(**about, linear=linear)
        check_shape(probe, model.config.width)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no probe ({error!r}); delete it, and run `lrt diagnose --probe` again") from error
    return probe if probe.model == fingerprint(model) else None


def check_shape(probe: StateProbe, width: int) -> None:
    """ValueError where a probe does not fit its kind of state."""
    kind = STATE_KINDS[probe.kind]
    expected = (width, len(kind.names), len(kind.values))
    if probe.linear.weight.shape != expected or probe.linear.bias.shape != expected[1:]:
        raise ValueError(f"its weights are {tuple(probe.linear.weight.shape)}, a probe of {probe.kind} has {expected}")
