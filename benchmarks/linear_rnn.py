"""An anchor outside on data with state: a linear RNN, DeltaNet with eigenvalues down to -1.

    pip install 'latent-recurrent-transformer[linear-rnn]'
    OMP_NUM_THREADS=1 python benchmarks/linear_rnn.py runs/linear_rnn.jsonl --seeds 0 1 2 3 4

Trained and scored as the Transformer of `lrt study state-data` is: its rows in their order, its steps, its rates and as
many parameters, on the same held-out rows. Every seed is a JSON line of OUT.jsonl; those that are there are skipped.

DeltaNet: Yang et al. 2024 (arXiv 2406.06484). Each head keeps a matrix S, and a token with key k and value v replaces
what S has for k by v, as far as β says: S <- (I - β k kᵀ) S + β k vᵀ. The matrix in brackets has the eigenvalue 1 - β:
with β in (0, 2) down to -1, which lets it track states (Grazzi et al. 2024, arXiv 2411.12537). The rule is computed by
flash-linear-attention's plain PyTorch forms (fla.ops.delta_rule.naive), which run on a CPU; its layer needs a GPU.

Shapes: B rows, T positions, D width, H heads, K head size (D / H).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from lrt.data.batch import IGNORED
from lrt.experiments.state_data import measure
from lrt.experiments.state_data.measure import TokenScores
from lrt.experiments.state_data.rows import Rows
from lrt.experiments.state_tracking.training import TrackingRun, TrainedTracker, train_on_rows
from lrt.experiments.studies import grid, state_data
from lrt.experiments.studies.benchmarks import BENCHMARKS
from lrt.experiments.studies.grid import Fields
from lrt.experiments.studies.language import BASELINE
from lrt.model.execution import EAGER
from lrt.model.layers import MLP
from lrt.model.size import count_parameters
from lrt.schedules.parse import parse
from lrt.training.matching import PAIRS
from lrt.training.optim import Optimiser, ParameterRow
from lrt.utils.imports import MissingExtraError, optional_module
from lrt.utils.progress import Advance, bar

CONVOLUTION = 4
"""Places that the short convolution sees, its own among them: fla's default."""
CHUNK = 32
"""Positions whose updates are joined to one: the default of fla's plain form."""
L2_EPS = 1e-6
"""Under the root of the length of q and k, as in fla."""
NORM_EPS = 1e-5
"""Of the RMSNorms, as in fla's layer."""
DECODED = 8
"""Rows of the longest test that are decoded token by token too."""
WARM = 2
"""Pairs of steps before those that are timed."""
ROWS = (
    # What is no matrix moves at the rate of the Transformer's gates; β's projection is a matrix, if a small one.
    ParameterRow(r"(^|\.)convolution\.weight$", "adamw", "scalar_lr"),
    ParameterRow(r"(^|[._])norm\.weight$", "adamw", "scalar_lr"),
    ParameterRow(r"\.beta\.weight$", "muon", "matrix_lr"),
)
"""How parameters are trained that `lrt.training.optim.TABLE` does not know: all others have its names."""


class Carry(NamedTuple):
    """What a mixer knows of earlier positions."""

    before: Tensor
    """(B, CONVOLUTION - 1, 3 D): the convolution's last inputs; zeros before a row begins."""
    state: Tensor
    """(B, H, K, K): S, from keys to values."""


class DeltaNet(nn.Module):
    """The mixer, as in fla's layer of that name with `allow_neg_eigval=True` and its other defaults."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.beta = nn.Linear(width, heads, bias=False)
        # One for each channel of q, k and v. Inputs before it are put in front by hand: a row's begin, or its carry.
        self.convolution = nn.Conv1d(3 * width, 3 * width, CONVOLUTION, groups=3 * width, bias=False)
        self.output_norm = nn.RMSNorm(width // heads, eps=NORM_EPS)
        self.out = nn.Linear(width, width, bias=False)

    def empty_carry(self, x: Tensor) -> Carry:
        """That of a row's first position; x (B, …, D)."""
        rows, width = x.shape[0], x.shape[-1]
        head = width // self.heads
        return Carry(x.new_zeros(rows, CONVOLUTION - 1, 3 * width), x.new_zeros(rows, self.heads, head, head))

    def forward(self, x: Tensor) -> Tensor:
        """Rows x (B, T, D) from their beginning, in chunks: the parallel form."""
        q, k, v, beta, _ = self.inputs(x, self.empty_carry(x).before)
        length = x.shape[1]
        more = -length % CHUNK  # whole chunks; what is behind the rows' end changes nothing before it
        q, k, v = (F.pad(each, (0, 0, 0, more)) for each in (q, k, v))
        mixed, _ = delta_rule().delta_rule_chunkwise(q, k, v, F.pad(beta, (0, more)), CHUNK)
        return self.output(mixed[:, :, :length])

    def go_on(self, x: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """x (B, T, D) behind what is carried, one position after the other: the definition, in float32."""
        q, k, v, beta, before = self.inputs(x, carry.before)
        mixed, state = delta_rule().delta_rule_recurrence(q, k, v, beta, carry.state)
        return self.output(mixed), Carry(before, state)

    def inputs(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v (B, H, T, K), β (B, H, T), and what the convolution is to see before the next position."""
        seen = torch.cat((before, torch.cat((self.query(x), self.key(x), self.value(x)), -1)), 1)
        convolved = F.silu(self.convolution(seen.mT).mT)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in convolved.chunk(3, -1))
        beta = 2 * self.beta(x).sigmoid().mT
        return unit_length(q), unit_length(k), v, beta, seen[:, 1 - CONVOLUTION :]

    def output(self, mixed: Tensor) -> Tensor:
        """(B, T, D) of what the heads read (B, H, T, K)."""
        return self.out(self.output_norm(mixed.transpose(1, 2)).flatten(2))


def unit_length(x: Tensor) -> Tensor:
    """Vectors along the last dimension at length 1, or just below: so 1 - β is an eigenvalue."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def delta_rule() -> Any:
    """fla's plain forms of the rule. MissingExtraError where they are not installed."""
    return optional_module("fla.ops.delta_rule.naive", "linear-rnn", "a linear RNN")


class Block(nn.Module):
    """Mixer and MLP, each behind an RMSNorm and added to the stream, as in fla's models.

    The MLP is the Transformer's (squared ReLU), where fla's models have SwiGLU: only the mixer is to differ.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.mixer = DeltaNet(width, heads)
        self.mlp_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, hidden)

    def add(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The stream x (B, T, D) with the mixer's output and the MLP's."""
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x))


class LinearRNN(nn.Module):
    """A language model whose only mixing of positions is DeltaNet's. No positions are encoded, as in fla's model."""

    def __init__(self, vocab_size: int, width: int, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """The Transformer's initial values, as the rates are for them: unit embeddings, uniform inputs, zero outputs, a
        small head. The convolution's are PyTorch's, as in fla."""
        bound = math.sqrt(3 / self.embedding.embedding_dim)
        nn.init.normal_(self.embedding.weight)
        nn.init.normal_(self.head.weight, std=0.001)
        for block in self.blocks:
            mixer = block.mixer
            for linear in (mixer.query, mixer.key, mixer.value, mixer.beta, block.mlp.up):
                nn.init.uniform_(linear.weight, -bound, bound)
            for linear in (mixer.out, block.mlp.down):
                nn.init.zeros_(linear.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits (B, T, V) of rows from their beginning, tokens (B, T)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block.add(x, block.mixer(block.mixer_norm(x)))
        return self.head(self.norm(x))

    def empty_carries(self, tokens: Tensor) -> list[Carry]:
        """Those of the first position, by block."""
        return [block.mixer.empty_carry(self.embedding(tokens)) for block in self.blocks]

    def go_on(self, tokens: Tensor, carries: Sequence[Carry]) -> tuple[Tensor, list[Carry]]:
        """Logits (B, T, V) of tokens (B, T) behind what is carried, and what is carried then."""
        x, later = self.embedding(tokens), []
        for block, carry in zip(self.blocks, carries, strict=True):
            mixed, carry = block.mixer.go_on(block.mixer_norm(x), carry)
            x = block.add(x, mixed)
            later.append(carry)
        return self.head(self.norm(x)), later


def build_model(run: TrackingRun) -> LinearRNN:
    """Depth, width and heads of the run's Transformer, and the MLP's width that comes nearest to its parameters."""
    config, wanted = run.model, count_parameters(run.model)[0]

    def of_width(hidden: int) -> LinearRNN:
        return LinearRNN(config.vocab_size, config.width, config.depth, config.heads, hidden)

    with torch.device("meta"):
        least, more = (count(of_width(hidden)) for hidden in (1, 2))
    hidden = max(1, 1 + round((wanted - least) / (more - least)))
    torch.manual_seed(run.seed)
    return of_width(hidden)


def count(model: nn.Module) -> int:
    """Its parameters."""
    return sum(p.numel() for p in model.parameters())


def make_optimiser(model: LinearRNN, run: TrackingRun) -> Optimiser:
    """The study's, at its rates."""
    return Optimiser(model, run.model.width, run.optim.reference_batch, run.steps, run.optim, rows_of_model=ROWS)


def mean_nats(model: LinearRNN, tokens: Tensor, classes: Tensor) -> Tensor:
    """Per asked position of tokens, classes (B, T)."""
    return F.cross_entropy(model(tokens).flatten(0, 1), classes.flatten(), ignore_index=IGNORED)


def train(run: TrackingRun, advance: Callable[[float, str], object] = lambda *_: None) -> TrainedTracker[LinearRNN]:
    """On the run's rows, from nothing. Raises FloatingPointError where a loss or gradient is not finite."""
    model = build_model(run).train()

    def loss_of(step: int, tokens: Tensor, classes: Tensor) -> tuple[Tensor, float]:
        loss = mean_nats(model, tokens, classes)
        return loss, float(loss.detach())

    return train_on_rows(run, model, make_optimiser(model, run), loss_of, advance)


@torch.no_grad()
def score_rows(model: LinearRNN, rows: Rows, batch: int = measure.BATCH) -> TokenScores:
    """What rows cost, by the parallel form: `decoding_difference` says how far decoding is from it."""
    nats, right = torch.zeros(rows.tokens.shape), torch.zeros(rows.tokens.shape, dtype=torch.bool)
    targets = measure.next_tokens(rows)
    for first in range(0, len(targets), batch):
        at = slice(first, first + batch)
        logits, following = model(rows.tokens[at]), targets[at]
        nats[at, 1:] = F.cross_entropy(logits.mT, following, ignore_index=IGNORED, reduction="none")[:, :-1]
        right[at, 1:] = (logits.argmax(-1) == following)[:, :-1]
    return TokenScores(rows, nats, right & rows.counted)


@torch.no_grad()
def decoding_difference(model: LinearRNN, scores: TokenScores) -> float:
    """The largest difference of a token's nats, decoded token by token with a carried state, from those of `scores`."""
    tokens, targets = scores.rows.tokens, measure.next_tokens(scores.rows)
    carries, largest = model.empty_carries(tokens), 0.0
    for place in range(tokens.shape[1] - 1):
        logits, carries = model.go_on(tokens[:, place : place + 1], carries)
        nats = F.cross_entropy(logits[:, 0], targets[:, place], ignore_index=IGNORED, reduction="none")
        largest = max(largest, float((nats - scores.nats[:, place + 1]).abs().max()))
    return largest


def score(model: LinearRNN, fields: Fields, advance: Advance) -> dict[str, Any]:
    """The study's measures, on its held-out rows."""
    opened, seed, lengths = BENCHMARKS[fields["benchmark"]], fields["seed"], fields["tests"]
    bounds, share = opened("test").bounds, (1 - state_data.TRAINING) / (len(lengths) + 1)

    def scores_of(purpose: str, length: int, count: int) -> TokenScores:
        return score_rows(model, measure.held_out_rows(opened(purpose), purpose, count, length, seed))

    val = scores_of("val", lengths[0], fields.get("sequences", state_data.SEQUENCES))
    by_length = {}
    for length in lengths:
        by_length[length] = scores_of("test", length, state_data.count_test_rows(fields, length))
        advance(share, f"length {length}")
    difference = decoding_difference(model, by_length[max(lengths)].first(DECODED))
    advance(share, "scored")
    return {
        "val_excess": state_data.summarise(val, bounds)["all"]["excess"],
        "tests": {str(length): state_data.summarise(scores, bounds) for length, scores in by_length.items()},
        "decoding_difference": difference,
    }


def step_ratio(run: TrackingRun) -> float:
    """Processor time of a training step over the Transformer's: the median of alternated pairs."""
    model = build_model(run).train()
    optimiser = make_optimiser(model, run)
    examples = run.source.sample(run.rows, run.lengths()[-1], torch.Generator().manual_seed(0))

    def step() -> None:
        mean_nats(model, examples.tokens, examples.classes).backward()
        optimiser.step(0)

    beside = state_data.steps(run, parse(run.schedule), "cpu", EAGER)
    return statistics.median([processor_time(step) / processor_time(beside) for _ in range(WARM + PAIRS)][WARM:])


def processor_time(work: Callable[[], object]) -> float:
    """Seconds that all threads of this process compute: a busy machine does not count."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


@dataclass(frozen=True)
class Arguments:
    out: tyro.conf.Positional[Path]
    """JSON lines, one per finished seed."""
    seeds: tuple[int, ...] = (0,)
    """One run each."""
    steps: int | None = None
    """Of training; None: the edition's. Rates fall over the last of them."""
    benchmark: str | None = None
    """A name in lrt.experiments.studies.benchmarks.BENCHMARKS; None: the edition's first."""
    edition: str = "tiny"
    """Of the study state-data, whose Transformer this one is trained like."""


def fields_of(arguments: Arguments, seed: int) -> Fields:
    """Those of the edition's Transformer, for this seed."""
    cells = grid.read_study("state-data", arguments.edition).cells
    fields = next(cell.fields for cell in cells if cell.fields["family"] == BASELINE)
    changed = {"benchmark": arguments.benchmark, "steps": arguments.steps}
    return {**fields, "seed": seed, **{name: value for name, value in changed.items() if value is not None}}


def run_seed(fields: Fields, ratio: float, advance: Advance) -> dict[str, Any]:
    """The line of one seed."""
    run, opened = state_data.build_run(fields), BENCHMARKS[fields["benchmark"]]
    line: dict[str, Any] = {
        "fields": fields,
        "model": "DeltaNet, β in (0, 2)",
        "versions": {name: importlib.metadata.version(name) for name in ("fla-core", "torch")},
        "step_ratio": ratio,
        "data": state_data.fingerprint(opened("train")),
        "origin": dict(opened("test").origin()),
    }
    try:
        trained = train(run, lambda n, text: advance(state_data.TRAINING * n / run.steps, text))
    except FloatingPointError as error:
        return {**line, "diverged": str(error)}
    line |= {
        "parameters": count(trained.model),
        "mlp_width": trained.model.blocks[0].mlp.up.out_features,
        "beside": count_parameters(run.model)[0],
        "tokens": trained.tokens,
        "train_seconds": round(trained.seconds, 1),
        "loss": statistics.fmean(trained.losses[-max(1, run.steps // 20) :]),
    }
    return line | score(trained.model, fields, advance)


def main(arguments: Arguments) -> None:
    known = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    done = [json.loads(line)["fields"] for line in known]
    left = [fields for seed in arguments.seeds if (fields := fields_of(arguments, seed)) not in done]
    if not left:
        return
    delta_rule()  # where it is not installed, that is said before anything else
    ratio = step_ratio(state_data.build_run(left[0]))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for fields in left:
        with bar(f"{fields['benchmark']}, seed {fields['seed']}", 1, True) as advance:
            line = run_seed(fields, ratio, advance)
        with arguments.out.open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        scores = {length: round(one["all"]["excess"], 4) for length, one in line.get("tests", {}).items()}
        print(f"seed {fields['seed']}  step ratio {ratio:.2f}  {line.get('diverged', scores)}", flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except MissingExtraError as error:
        sys.exit(f"error: {error}")
