"""What is to be said of the splits of a folder that was just prepared: equal files, cut files, uneven shares."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lrt.data.corpus import SPLIT_BY_FILE, Corpus, shortened
from lrt.data.prepared import Prepared
from lrt.data.sources import TextFile
from lrt.data.splits import SplitRule


def split_warnings(corpus: Corpus, prepared: Prepared, rule: SplitRule) -> list[str]:
    """All of it, a sentence or two each; nothing where the splits are as a reader would expect."""
    return [*equal_files(corpus, rule), *cut_files(corpus), *uneven_splits(prepared, rule)]


def equal_files(corpus: Corpus, rule: SplitRule) -> Iterator[str]:
    """What is to be said of files of the same bytes."""
    names: dict[str, list[str]] = {}
    for name, _, digest in corpus.description:
        names.setdefault(digest, []).append(name)
    groups = [" = ".join(group) for group in names.values() if len(group) > 1]
    if groups:
        splits = "fall to one split each" if rule.files == "content" else "may fall to several splits"
        yield (
            f"{len(groups)} group(s) of files hold the same bytes and {splits}, where they count as often as they are "
            f"there: {shortened(groups)}"
        )


def cut_files(corpus: Corpus) -> Iterator[str]:
    """What is to be said where there are enough files for splits by file, and yet they are cut."""
    cut = {source.name for source in corpus.sources if isinstance(source, TextFile) and source.start > 0}
    if len(cut) >= SPLIT_BY_FILE:
        yield (
            f"the sizes of the {len(cut)} text files allow no splits of whole files: each is cut into a part for "
            "train, val and test; more and smaller files are split whole"
        )


def uneven_splits(prepared: Prepared, rule: SplitRule) -> Iterator[str]:
    """What is to be said of validation and test: a share far from the nominal one, a document that is most of it."""
    entries = prepared.manifest["splits"]
    total = sum(entry["bytes"] for entry in entries.values())
    for name, nominal in (("val", rule.val), ("test", rule.test)):
        split, share = prepared.splits[name], entries[name]["bytes"] / total
        if not 0.5 * nominal <= share <= 1.5 * nominal:
            yield f"{name} is {share:.1%} of the text, nominally {nominal:.1%}; more and smaller documents come nearer"
        largest = int(np.diff(split.offsets).max()) / len(split.tokens)
        if largest > 0.5 and entries["train"]["documents"] > 1:
            yield (
                f"one of the {len(split):,} document(s) of {name} is {largest:.0%} of it, and so of its score; cut "
                "long documents, or give a larger share"
            )
