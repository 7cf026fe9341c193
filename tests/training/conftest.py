"""What the tests of training share."""

from __future__ import annotations

import pytest

from lrt.data.prepare import prepare
from lrt.data.prepared import Prepared


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Four hundred lines of squares, prepared; nobody changes it."""
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.txt"
    text.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(400)))
    return prepare(folder / "prepared", [text], vocab_size=300, progress=False)
