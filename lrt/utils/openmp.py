"""How long an OpenMP thread spins at a barrier before it sleeps.

torch's threads meet at a barrier several times per operation. GNU's OpenMP, which torch brings on Linux, spins there
for about 3 ms. On a busy machine the thread that is waited for is often not running. The spinning keeps the core from
it, and training falls to a fraction of its speed (docs/log.md). A spin of about 80 µs costs nothing where the cores
are free. No number depends on it: the count of threads, which orders sums, stays what it was.
"""

from __future__ import annotations

from collections.abc import MutableMapping

SPINS = "8000"
"""Turns of GNU's waiting loop, 10 ns each: longer than a barrier of running threads, shorter than a time slice."""
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Variables by which a user says how threads wait."""


def spin_briefly(environment: MutableMapping[str, str]) -> None:
    """Have GNU's OpenMP spin briefly, unless the user has said how threads wait.

    Before torch is imported: the variable is read once, when the library is loaded.
    """
    if not any(name in environment for name in WAITING):
        environment["GOMP_SPINCOUNT"] = SPINS
