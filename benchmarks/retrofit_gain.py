"""What a pathway gives a pretrained decoder, against equal training without one (docs/pretrained.md).

    python benchmarks/retrofit_gain.py BOOKS results/benchmarks/pretrained.jsonl --seeds 0 1 2
    python benchmarks/retrofit_gain.py BOOKS results/benchmarks/pretrained.screen.jsonl --screen

BOOKS holds train.jsonl.xz and val.jsonl.xz, a document with `text` a line. A Llama-like decoder of 1.1 million
parameters is pretrained on 5 million tokens of books, and then on 1 million more, half of them books that it has not
seen, half Python sessions (the state data `repl`), three ways: plain; with the previous embedding alone, the control
without recurrence; and with a pathway from its last layer. The two others are trained once more for as long as the
pathway's steps take. All arms of a seed share the decoder and the order of the rows.

Scores are live: bits per byte of books by other authors, and the answers of new sessions by how many updates lie
between them and a value in plain sight. Every line is written when it is known; the same command goes on.
"""

from __future__ import annotations

import copy
import json
import lzma
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from lrt.experiments.state_data.measure import held_out_rows
from lrt.experiments.state_data.repl import REPL
from lrt.experiments.state_data.rows import NOTHING, Rows
from lrt.integrations.retrofit import retrofit
from lrt.utils import files
from lrt.utils.json_lines import read_json_lines
from lrt.utils.provenance import code_version, hardware
from lrt.utils.timing import Work, alternate

LENGTH, BATCH = 256, 16
PRETRAINING, CONTINUED = 5_000_000, 1_000_000
"""Tokens."""
WORDS = 224
"""Of a session: longer than LENGTH tokens, at which it is cut."""
SCORED = 100_000
"""Tokens of books."""
SESSIONS = 256
BOUNDS = (0, 1, 2, 3, 4)
"""Where bins of distances begin."""
SIZE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
}
VOCABULARY = 2048
RATE, AGAIN = 3e-3, 1e-3
"""Of AdamW, in pretraining and behind it; both fall to zero as a cosine."""
PAIRS = 9
"""Rounds in which steps are timed beside each other."""


@dataclass(frozen=True)
class Arm:
    """A way to train on."""

    source: tuple[int, ...] | None = None
    """What the pathway remembers; None: there is none."""
    times: float = 10.0
    """The pathway's rate over the others'."""
    schedule: str = "settled(0, 1, 1)"


RECURRENCE = "recurrence"
ARMS = {
    "plain": Arm(),
    "token shift": Arm((0,), schedule="plain()"),
    RECURRENCE: Arm((0, 4)),
}
SCREEN = {
    "plain": Arm(),
    "token shift": Arm((0,), schedule="plain()"),
    "(4)": Arm((4,)),
    "(0, 4)": Arm((0, 4)),
    "(0, 4), settled(1, 1, 2)": Arm((0, 4), schedule="settled(1, 1, 2)"),
}


class Books:
    """Documents of a split, in their order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def texts(self, split: str) -> Iterator[str]:
        with lzma.open(self.folder / f"{split}.jsonl.xz", "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]

    def held_out(self, part: str) -> Iterator[str]:
        """Of the authors that are held out: val to choose on, test to report."""
        for number, text in enumerate(self.texts("val")):
            if (number % 2 == 0) == (part == "val"):
                yield text


def make_tokenizer(books: Books) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the first 20 MB; digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(first_bytes(books.texts("train"), 20_000_000), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def first_bytes(texts: Iterator[str], count: int) -> Iterator[str]:
    for text in texts:
        yield text
        count -= len(text.encode())
        if count <= 0:
            return


def blocks(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str], tokens: int) -> torch.Tensor:
    """(B, LENGTH): the texts one behind another, cut."""
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text)["input_ids"]
        if len(stream) >= tokens:
            break
    rows = len(stream) // LENGTH
    return torch.tensor(stream[: rows * LENGTH]).view(rows, LENGTH)[: math.ceil(tokens / LENGTH)]


def session_texts(rows: Rows) -> list[str]:
    return [REPL.text(tokens) for tokens in rows.tokens]


def sessions(tokenizer: PreTrainedTokenizerFast, rows: Rows) -> torch.Tensor:
    """(B, LENGTH): a session each, cut."""
    encoded = tokenizer(session_texts(rows), truncation=True, max_length=LENGTH)["input_ids"]
    assert all(len(ids) == LENGTH for ids in encoded), "sessions of WORDS words are longer than LENGTH tokens"
    return torch.tensor(encoded)


class TokenRows(Dataset[dict[str, torch.Tensor]]):
    """What Trainer takes."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def continued_rows(tokenizer: PreTrainedTokenizerFast, fresh: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """(count, LENGTH): books and sessions by turns. A longer one begins as a shorter one does."""
    order = torch.randperm(len(fresh), generator=torch.Generator().manual_seed(seed))
    programs = REPL.sample(count - count // 2, WORDS, torch.Generator().manual_seed(10_000 + seed))
    text, state = fresh[order[: count // 2]], sessions(tokenizer, programs)
    assert len(text) == count // 2, "there are too few blocks of books"
    rows = torch.empty(count, LENGTH, dtype=torch.long)
    rows[1::2], rows[::2] = text, state
    return rows


def make_optimiser(model: Any, rate: float, times: float) -> torch.optim.Optimizer:
    """AdamW; the pathway has a rate of its own, and what has two dimensions decays."""
    groups: dict[tuple[bool, bool], list[Any]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((name.startswith("latent."), parameter.dim() > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate * (times if latent else 1), "weight_decay": 0.1 if matrix else 0.0}
            for (latent, matrix), parameters in groups.items()
        ],
        betas=(0.9, 0.95),
    )


def train(model: Any, rows: torch.Tensor, rate: float, times: float, work: Path) -> float:
    """Train once over the rows, in their order. Returns seconds."""
    steps = len(rows) // BATCH
    optimiser = make_optimiser(model, rate, times)
    arguments = TrainingArguments(
        str(work),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        logging_steps=50,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    schedule = get_cosine_schedule_with_warmup(optimiser, max(1, steps // 20), steps)
    trainer = Trainer(
        model=model.train(), args=arguments, train_dataset=TokenRows(rows), optimizers=(optimiser, schedule)
    )
    begun = time.perf_counter()
    trainer.train()
    return time.perf_counter() - begun


def pretrained(work: Path, tokenizer: PreTrainedTokenizerFast, rows: torch.Tensor, seed: int) -> Any:
    """The decoder of a seed, trained where it is not there."""
    folder = work / f"decoder-{seed}"
    if not folder.exists():
        set_seed(seed)
        config = LlamaConfig(**SIZE, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=0)
        model = LlamaForCausalLM(config)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        train(model, rows[order], RATE, 1, work / "trainer")
        fresh = files.temporary_name(folder)
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        files.replace_folder(fresh, folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def with_pathway(model: Any, arm: Arm) -> Any:
    return model if arm.source is None else retrofit(model, source=arm.source, schedule=arm.schedule, prefill="exact")


@torch.no_grad()
def score_books(model: Any, rows: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> float:
    """Bits per byte, live: the model reads token by token in `eval()`."""
    nats, count = 0.0, 0
    for part in rows.split(32):
        logits = model(input_ids=part).logits[:, :-1]
        nats += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
        count += sum(len(text.encode()) for text in tokenizer.batch_decode(part[:, 1:], skip_special_tokens=True))
    return nats / math.log(2) / count


@torch.no_grad()
def score_sessions(model: Any, rows: Rows, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
    """Least distance of a bin -> [right answers, all answers], live."""
    tokens = sessions(tokenizer, rows)
    guesses = torch.cat([model(input_ids=part).logits.argmax(-1) for part in tokens.split(32)])
    bins = {low: [0, 0] for low in BOUNDS}
    for row, text in enumerate(session_texts(rows)):
        starts = tokenizer(text, truncation=True, max_length=LENGTH, return_offsets_mapping=True)["offset_mapping"]
        places = {start: place for place, (start, stop) in enumerate(starts) if stop > start}
        begin = 0
        for token, distance in zip(rows.tokens[row].tolist(), rows.asked[row].tolist(), strict=True):
            if distance != NOTHING and begin in places:
                place = places[begin]
                one = bins[max(low for low in BOUNDS if low <= distance)]
                one[0] += int(guesses[row, place - 1] == tokens[row, place])
                one[1] += 1
            begin += len(REPL.words[token])
    return {str(low): one for low, one in bins.items()}


def step_ratio(model: Any, arm: Arm, rows: torch.Tensor) -> float:
    """The time of the arm's step over a plain one's."""

    def step(one: Any) -> Work:
        optimiser = make_optimiser(one, 0.0, 1)

        def work() -> None:
            one(input_ids=rows[:BATCH], labels=rows[:BATCH]).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

        return work

    plain = copy.deepcopy(model).train()
    works = {"plain": step(plain), "arm": step(with_pathway(copy.deepcopy(model), arm).train())}
    times = alternate(works, PAIRS, warmup=1, progress=False)
    return times["arm"].ratio(times["plain"])[0]


def kept_ratio(file: Path, model: Any, arm: Arm, rows: torch.Tensor) -> float:
    """`step_ratio`, measured once: what goes on later has the same budget."""
    if not file.exists():
        files.replace_atomically(file, json.dumps({"ratio": step_ratio(model, arm, rows)}))
    return files.read_json(file)["ratio"]


def main(
    books: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    seeds: tuple[int, ...] = (0, 1, 2),
    work: Path = Path("runs/pretrained"),
    screen: bool = False,
) -> None:
    """Pretrain, train on in every arm, and append a JSON line for each to OUT.

    Args:
        books: Folder of train.jsonl.xz and val.jsonl.xz.
        out: File of JSON lines; what it has is not run again.
        seeds: Of decoder, rows and order.
        work: Folder for tokenizer, tokens and decoders, which are made once: another for other books or sizes.
        screen: Arms to choose among, with the first seed, scored on val.
    """
    work.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {(line["arm"], line["equal"], line["seed"]) for line in read_json_lines(out)}
    text = Books(books)
    if not (work / "tokenizer").exists():
        make_tokenizer(text).save_pretrained(work / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    if not (work / "books.pt").exists():
        # Enough of what was not pretrained on for arms that see three times as much.
        torch.save(blocks(tokenizer, text.texts("train"), PRETRAINING + 2 * CONTINUED), work / "books.pt")
    train_rows = torch.load(work / "books.pt")
    count = math.ceil(PRETRAINING / LENGTH)
    part = "val" if screen else "test"
    held_out = blocks(tokenizer, text.held_out(part), SCORED)
    asked = held_out_rows(REPL, f"retrofit {part}", SESSIONS, WORDS, 0)
    for seed in seeds[:1] if screen else seeds:
        decoder = pretrained(work, tokenizer, train_rows[:count], seed)
        before = score_books(decoder.eval(), held_out, tokenizer)
        arms = SCREEN if screen else ARMS
        ratio = 1.0 if screen else kept_ratio(work / f"ratio-{seed}.json", decoder, arms[RECURRENCE], train_rows)
        kinds = [("tokens", name) for name in arms]
        if not screen:
            kinds += [("wall_clock", name) for name in arms if name != RECURRENCE]
        for equal, name in kinds:
            if (name, equal, seed) in done:
                continue
            arm = arms[name]
            own = step_ratio(decoder, arm, train_rows) if arm.source is not None else 1.0
            tokens = CONTINUED * (ratio / own if equal == "wall_clock" else 1)
            rows = continued_rows(tokenizer, train_rows[count:], round(tokens / LENGTH), seed)
            torch.manual_seed(seed)
            model = with_pathway(copy.deepcopy(decoder), arm)
            seconds = train(model, rows, AGAIN, arm.times, work / "trainer")
            model.eval()
            line = {
                "arm": name,
                "equal": equal,
                "seed": seed,
                "source": arm.source,
                "schedule": arm.schedule if arm.source else None,
                "times": arm.times if arm.source else None,
                "tokens": rows.numel(),
                "step_ratio": round(own, 3),
                "seconds": round(seconds, 1),
                "before": round(before, 5),
                "live_bpb": round(score_books(model, held_out, tokenizer), 5),
                "right": score_sessions(model, asked, tokenizer),
                "code": code_version(),
                "hardware": json.loads(json.dumps(hardware("cpu"), default=str)),
            }
            files.append_durably(out, json.dumps(line) + "\n")
            print({key: line[key] for key in ("arm", "equal", "seed", "step_ratio", "seconds", "live_bpb", "right")})


if __name__ == "__main__":
    tyro.cli(main)
