"""A plugin's source in an exported folder keeps every line of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrt.integrations.hf.plugin_code import import_from_modules
from lrt.utils.plugins import Plugin


def exported(folder: Path, source: str) -> str:
    return import_from_modules(source, Plugin("mine", folder / "mine.py", None))


def test_imports_of_public_names_become_imports_from_modules(tmp_path: Path) -> None:
    source = "x = 1\nif x:\n    from lrt import MemoryConfig, State as S  # both\ny = 2\n"
    assert exported(tmp_path, source) == (
        "x = 1\nif x:\n    from lrt.model.memory_config import MemoryConfig as MemoryConfig\n"
        "    from lrt.model.state import State as S\ny = 2\n"
    )


@pytest.mark.parametrize("line", ["import lrt; x = 1", "if True: from lrt import State", "é = 1; import lrt"])
def test_code_on_the_line_of_an_import_is_not_lost(tmp_path: Path, line: str) -> None:
    with pytest.raises(ValueError, match="line 2: other code shares the line of an import from lrt; give it its own"):
        exported(tmp_path, f"\n{line}\n")
