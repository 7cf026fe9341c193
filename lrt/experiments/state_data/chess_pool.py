"""Pools of chess games: an engine plays once, training and tests draw from its games.

A pool is a folder. `train-00000.jsonl`, … , and likewise `val` and `test`, hold a game per line, with the engine's name
and version; `manifest.json` the settings and, of a finished pool, counts and a hash. A game is a function of (seed,
split, number) and the engine alone, so a pool that was stopped goes on, and equal settings make equal files.

    with open_engine() as engine:
        pool = make_pool(Path("runs/chess"), PoolSettings(), engine)
    rows = chess_benchmark(pool, "train").sample(64, 164, generator)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lrt.data.prepared import SPLITS
from lrt.experiments.state_data.chess_games import (
    ENGINE,
    PLIES,
    RANDOM,
    Game,
    chess_words,
    fit,
    play,
    to_rows,
    uniform,
)
from lrt.experiments.state_data.rows import Benchmark, Rows
from lrt.utils.files import read_json, replace_atomically, sha256
from lrt.utils.imports import optional_module
from lrt.utils.validation import Limits, check_fields, check_numbers

if TYPE_CHECKING:
    import chess

TRAIN, VAL, TEST = SPLITS
PART = 100
"""Games of a file: what a stopped run loses at most."""
MATE = 10_000
"""Centipawns of a mate, less one for every move to it."""
MANIFEST = "manifest.json"

POOL_LIMITS = {
    "train": Limits(1, 10**8, whole=True),
    "val": Limits(1, 10**8, whole=True),
    "test": Limits(1, 10**8, whole=True),
    "seed": Limits(0, 2**63 - 1, whole=True),
    "nodes": Limits(1, 10**9, whole=True),
    "multipv": Limits(1, 256, whole=True),
    "temperature": Limits(0, 10**6, above=True),
    "plies": Limits(1, 10**4, whole=True),
    "engine_share": Limits(0, 1, above=True),
}


@dataclass(frozen=True)
class PoolSettings:
    """What a pool's games are. ValueError for a number that makes no sense."""

    train: int = 20_000
    """Games."""
    val: int = 500
    test: int = 1_000
    seed: int = 0
    nodes: int = 300
    """Positions that the engine searches before a move."""
    multipv: int = 5
    """Moves that it scores. Now and then (a move in a hundred) the nodes do not suffice for all of them."""
    temperature: float = 50.0
    """Centipawns: a move that scores so much less is 1/e times as likely."""
    plies: int = PLIES
    engine_share: float = 0.8
    """Probability of an engine game; the others are random."""

    def __post_init__(self) -> None:
        check_numbers(self, POOL_LIMITS)


class Engine(Protocol):
    """Who plays."""

    name: str
    """Name and version."""

    def scores(self, board: chess.Board, nodes: int, multipv: int) -> dict[str, int]:
        """Centipawns, for the side to move, of at most `multipv` of the best moves."""
        ...


class MissingEngineError(ValueError):
    """There is no engine. The message says how to install one, and what goes without."""


class UciEngine:
    """A program that speaks UCI. `chess.engine.EngineError` where it stops or answers nonsense."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.name: str = process.id["name"]
        library = optional_module("chess.engine", "state-data", "an engine")
        self._limit, self._info = library.Limit, library.INFO_SCORE | library.INFO_PV

    def scores(self, board: chess.Board, nodes: int, multipv: int) -> dict[str, int]:
        # A new `game` is a `ucinewgame`, which empties hash and histories: scores depend on the game so far alone.
        limit = self._limit(nodes=nodes)
        lines = self.process.analyse(board, limit, multipv=multipv, game=object(), info=self._info)
        return {line["pv"][0].uci(): line["score"].relative.score(mate_score=MATE) for line in lines}


def engine_path() -> str | None:
    """Where Stockfish is: on the PATH, or in /usr/games, which Debian's PATH for root lacks."""
    return shutil.which("stockfish", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/games")))


@contextmanager
def open_engine(path: str | None = None) -> Iterator[UciEngine]:
    """A UCI engine with one thread while the block runs; Stockfish unless a path says otherwise. MissingEngineError."""
    path = path or engine_path()
    if path is None:
        raise MissingEngineError(
            "there is no stockfish; install it (apt-get install stockfish), or make random games alone with engine None"
        )
    library = optional_module("chess.engine", "state-data", "an engine")
    with library.SimpleEngine.popen_uci(path) as process:
        process.configure({"Threads": 1, "Hash": 1})
        yield UciEngine(process)


def move_weights(scores: dict[str, int], temperature: float) -> dict[str, float]:
    """softmax(score / temperature), up to a factor: the best move has 1."""
    best = max(scores.values())
    return {move: math.exp((score - best) / temperature) for move, score in scores.items()}


def pool_game(settings: PoolSettings, split: str, number: int, engine: Engine | None) -> Game:
    """Game `number` of a split; random without an engine."""
    rng = random.Random(f"{settings.seed}/{split}/{number}")
    if engine is None or rng.random() >= settings.engine_share:
        return play(RANDOM, uniform, rng, settings.plies)

    def policy(board: chess.Board) -> dict[str, float]:
        return move_weights(engine.scores(board, settings.nodes, settings.multipv), settings.temperature)

    return play(ENGINE, policy, rng, settings.plies)


@dataclass(frozen=True)
class Part:
    """A file of a pool."""

    split: str
    numbers: range

    @property
    def file(self) -> str:
        return f"{self.split}-{self.numbers.start // PART:05}.jsonl"

    def write(self, folder: Path, settings: PoolSettings, engine: Engine | None) -> None:
        games = ((n, pool_game(settings, self.split, n, engine)) for n in self.numbers)
        lines = [to_line(number, game, engine.name if engine else None) for number, game in games]
        replace_atomically(folder / self.file, "".join(lines))


def split_parts(settings: PoolSettings, split: str) -> list[Part]:
    """The files of a split, in order."""
    games = {TRAIN: settings.train, VAL: settings.val, TEST: settings.test}[split]
    return [Part(split, range(start, min(start + PART, games))) for start in range(0, games, PART)]


def all_parts(settings: PoolSettings) -> list[Part]:
    return [part for split in SPLITS for part in split_parts(settings, split)]


def to_line(number: int, game: Game, engine: str | None) -> str:
    """A game as a line of JSON. Nats have 7 digits behind the point, as many as float32 can use."""
    nats = [round(x, 7) for x in game.nats]
    fields = {"game": number, "engine": engine, "kind": game.kind, "end": game.end, "moves": game.moves, "nats": nats}
    return json.dumps(fields, separators=(",", ":")) + "\n"


def from_line(line: str) -> Game:
    fields = json.loads(line)
    return Game(fields["kind"], tuple(fields["moves"]), tuple(fields["nats"]), fields["end"])


def make_pool(
    folder: Path,
    settings: PoolSettings,
    engine: Engine | None,
    advance: Callable[[float, str], object] = lambda *_: None,
) -> Pool:
    """Make the games that are not there yet, and read the pool. Without an engine all games are random.

    `advance` is called with games. ValueError where the folder holds a pool of other settings or of another engine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begun = {"engine": engine.name if engine else None, "settings": dataclasses.asdict(settings)}
    begin_manifest(folder, begun)
    for part in all_parts(settings):
        if not (folder / part.file).exists():
            part.write(folder, settings, engine)
        advance(len(part.numbers), part.file)
    if "sha256" not in read_json(folder / MANIFEST):
        write_manifest(folder, begun | summary(folder, settings))
    return read_pool(folder)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    replace_atomically(folder / MANIFEST, json.dumps(content, indent=2) + "\n")


def begin_manifest(folder: Path, begun: dict[str, Any]) -> None:
    """Write down what a pool is to be; ValueError where it is something else already."""
    if not (folder / MANIFEST).exists():
        return write_manifest(folder, begun)
    older = pool_fields(read_json(folder / MANIFEST))
    differing = [f"{name} {older.get(name)}" for name, value in pool_fields(begun).items() if older.get(name) != value]
    if differing:
        raise ValueError(f"{folder} holds a pool of {', '.join(differing)}; make one with these, or in another folder")


def pool_fields(manifest: dict[str, Any]) -> dict[str, Any]:
    """Engine and settings of a manifest."""
    return {"engine": manifest.get("engine")} | manifest.get("settings", {})


def summary(folder: Path, settings: PoolSettings) -> dict[str, Any]:
    """What the manifest of a finished pool says besides: games of each kind and end, and the hash."""
    games = {split: read_games(folder, settings, split) for split in SPLITS}
    return {
        "kinds": {split: Counter(game.kind for game in games[split]) for split in SPLITS},
        "ends": {split: Counter(game.end for game in games[split]) for split in SPLITS},
        "dropped": {split: len(games[split]) - len(kept) for split, kept in unshared(games).items()},
        "sha256": digest(folder, settings),
    }


def digest(folder: Path, settings: PoolSettings) -> str:
    """A hash of all files of games."""
    return hashlib.sha256("".join(sha256(folder / part.file) for part in all_parts(settings)).encode()).hexdigest()


def read_games(folder: Path, settings: PoolSettings, split: str) -> list[Game]:
    """The games of a split, in order."""
    texts = ((folder / part.file).read_text(encoding="utf-8") for part in split_parts(settings, split))
    return [from_line(line) for text in texts for line in text.splitlines()]


def unshared(games: Mapping[str, Sequence[Game]]) -> dict[str, list[Game]]:
    """The games of each split whose moves no split before it has."""
    earlier: set[tuple[str, ...]] = set()
    kept = {}
    for split in SPLITS:
        kept[split] = [game for game in games[split] if game.moves not in earlier]
        earlier |= {game.moves for game in games[split]}
    return kept


@dataclass(frozen=True)
class Pool:
    """A finished pool."""

    engine: str | None
    """Name and version; None where all games are random."""
    settings: PoolSettings
    splits: dict[str, Rows]
    """By split, as long as its longest game. No game is in two splits."""
    dropped: dict[str, int]
    """By split: games that were left out, since a split before it has them too."""
    sha256: str
    """Of all games."""


def read_pool(folder: Path) -> Pool:
    """A finished pool; ValueError where it is none, unfinished or changed."""
    manifest = read_json(folder / MANIFEST)
    check_fields(PoolSettings, manifest.get("settings"), f"settings of {folder / MANIFEST}")
    settings = PoolSettings(**manifest["settings"])
    if "sha256" not in manifest:
        raise ValueError(f"the pool {folder} is unfinished; call make_pool with its settings again")
    if manifest["sha256"] != digest(folder, settings):
        raise ValueError(f"the games of {folder} are not those of its manifest; remove the folder and make it again")
    games = {split: read_games(folder, settings, split) for split in SPLITS}
    kept = unshared(games)
    for split in SPLITS:
        if not kept[split]:
            raise ValueError(
                f"the splits before {split} have all its games in {folder}; make a pool of more plies or more games"
            )
    shares = kind_shares(settings, manifest["engine"])
    splits = {split: to_rows(kept[split], shares) for split in SPLITS}
    dropped = {split: len(games[split]) - len(kept[split]) for split in SPLITS}
    return Pool(manifest["engine"], settings, splits, dropped, manifest["sha256"])


def kind_shares(settings: PoolSettings, engine: str | None) -> dict[str, float]:
    """The probability of each kind of game."""
    return {RANDOM: 1.0} if engine is None else {ENGINE: settings.engine_share, RANDOM: 1 - settings.engine_share}


def draw_numbers(games: int, rows: int, generator: torch.Generator) -> Tensor:
    """(rows,): so many games, none twice before all were drawn."""
    epochs = -(-rows // games)
    return torch.cat([torch.randperm(games, generator=generator) for _ in range(epochs)])[:rows]


def chess_benchmark(pool: Pool, split: str) -> Benchmark:
    """Rows from one of a pool's splits. A call draws no game twice before it has drawn all; the next begins anew,
    since equal generators give equal rows. Rows that end before their games do may be alike, as openings are.
    """
    if split not in pool.splits:
        raise ValueError(f"a pool has no split {split!r}; choose one of {', '.join(SPLITS)}")
    games = pool.splits[split]

    def sample(rows: int, length: int, generator: torch.Generator) -> Rows:
        return fit(games.take(draw_numbers(len(games.lengths), rows, generator)), length)

    return chess_words("chess" if pool.engine else "chess-random", sample)
