"""What optional extras install: imported where it is used, so that `import lrt` needs none of it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DISTRIBUTION = "latent-recurrent-transformer"
"""What pip calls the library: the name to install it, and to ask for its version."""


class MissingExtraError(ValueError):
    """A package of an optional extra cannot be imported. The message names both, and the command that installs it."""


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """A block that imports what the extra `name` installs and `what` needs; MissingExtraError where it is not there."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs the package {error.name}, which cannot be imported ({error}); install it with "
            f"pip install '{DISTRIBUTION}[{name}]'"
        ) from error


def optional_module(module: str, name: str, what: str) -> Any:
    """The module, which comes with the extra `name` and which `what` needs; MissingExtraError as `extra` raises it."""
    with extra(name, what):
        return importlib.import_module(module)


def loaded_class(module: str, name: str) -> type[BaseException] | None:
    """A library's class of errors; None where the library was not imported, and so has raised none."""
    return vars(sys.modules[module]).get(name) if module in sys.modules else None
