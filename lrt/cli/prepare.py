"""`lrt prepare`: text to tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from lrt.cli.options import Paths
from lrt.data.splits import BY_CONTENT, SHARD_TOKENS, SplitRule
from lrt.utils.files import place_and_size


@dataclass(frozen=True)
class Prepare:
    """Turn text into tokens: three splits, and a byte-level BPE trained on the first. Stopped, it goes on next time."""

    out: tyro.conf.Positional[Path]
    """Folder to write."""
    text: Paths = ()
    """UTF-8 text files, or folders of files; JSON lines (.jsonl, .ndjson, also .gz, .xz, .zst); Parquet (.parquet).
    None, and no data set: the source of this Python's own standard library."""
    dataset: str | None = None
    """A Hugging Face data set: a hub name (owner/name), a local folder, fineweb-edu or climbmix. It is streamed."""
    dataset_config: str | None = None
    """The data set's configuration (subset). None: its default; sample-10BT for fineweb-edu."""
    dataset_split: str = "train"
    """Which of the data set's own splits to read."""
    dataset_revision: str | None = None
    """Branch, tag or commit of the data set. None: the newest, which the manifest then names."""
    field: str = "text"
    """The field or column that holds the text, in JSON lines, Parquet and data sets."""
    split_by: str | None = None
    """A field whose value decides the split, so that documents which share it stay together. None: the text does."""
    split_until: str | None = None
    """Only the part of that value before this string, such as / for an id that reads author/title."""
    documents: int | None = None
    """Stop after so many documents. None: take all."""
    val: float = BY_CONTENT.val
    """The share of the text to validate on, between 0 and 1. Whole text files fall to a split where their sizes come
    near its share, equal ones together; else each file is cut. Of records, each document falls to one by a hash."""
    test: float = BY_CONTENT.test
    """The share of the text to test on."""
    vocab_size: int = 2048
    """Size of the vocabulary to train."""
    tokenizer: Path | None = None
    """A tokenizer.json to use instead of training one."""
    workers: int | None = None
    """Processes that encode; the result does not depend on it. None: one per core; 0: only this one."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens of a shard."""

    def run(self) -> None:
        from lrt.data.hub import Dataset
        from lrt.data.prepare import prepare
        from lrt.data.records import Selection

        rule = SplitRule(self.val, self.test)
        dataset = None
        if self.dataset is not None:
            dataset = Dataset(self.dataset, self.dataset_config, self.dataset_split, self.dataset_revision)
        data = prepare(
            self.out,
            list(self.text) or None,
            self.vocab_size,
            self.tokenizer,
            dataset=dataset,
            selection=Selection(self.field, self.split_by, self.split_until, self.documents, rule),
            workers=self.workers,
            shard_tokens=self.shard_tokens,
        )
        print(f"vocabulary {data.vocab_size:,}")
        for name, split in data.manifest["splits"].items():
            print(
                f"  {name:5} {len(split['shards']):5,} shards {split['documents']:12,} documents "
                f"{split['tokens']:15,} tokens {split['bytes']:15,} bytes"
            )
        print(place_and_size(self.out))
