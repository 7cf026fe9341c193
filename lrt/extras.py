"""What optional extras install: imported where it is used, and named where it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """A block that imports what an optional extra installs; ValueError that names it where it is not there."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{what} needs the package {error.name}; install it with pip install 'latent-recurrent-transformer[{name}]'"
        ) from error
