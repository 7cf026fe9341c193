"""How long it takes to find a kept prefix, and to keep one, by how many are kept.

    python benchmarks/prefixes.py --kept 100 4000

Texts of 256 tokens, whose first 128 are the same. Milliseconds, the least of 20 calls.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import tyro

from lrt import LatentRecurrentTransformer, ModelConfig
from lrt.inference.row_pool import KeptRow, PrefixCache

VOCABULARY, SHARED, OWN, CALLS = 300, 128, 128, 20


def least_milliseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(CALLS):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return 1000 * min(times)


def main(kept: tuple[int, ...] = (100, 4000)) -> None:
    """Fill a cache with so many rows of one slot, and time it."""
    state = LatentRecurrentTransformer(ModelConfig(depth=1, width=8, heads=1, vocab_size=VOCABULARY)).empty_state(1, 1)
    draw = random.Random(0)
    beginning = tuple(draw.randrange(VOCABULARY) for _ in range(SHARED))

    def text() -> tuple[int, ...]:
        return beginning + tuple(draw.randrange(VOCABULARY) for _ in range(OWN))

    for count in kept:
        cache = PrefixCache(10**12)
        for _ in range(count):
            cache.keep(KeptRow(text(), state, None))
        wanted, further = text(), iter([KeptRow(text(), state, None) for _ in range(CALLS)])
        finding = least_milliseconds(lambda cache=cache, wanted=wanted: cache.find(wanted, 1))
        keeping = least_milliseconds(lambda cache=cache, further=further: cache.keep(next(further)))
        print(f"{count:6,} kept: find {finding:.3f} ms, keep {keeping:.3f} ms")


if __name__ == "__main__":
    tyro.cli(main)
