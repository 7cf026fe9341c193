"""What the command line says of an error that is the user's, or the machine's: one line, and no traceback."""

from __future__ import annotations

import sys

from lrt.utils.imports import loaded_class

OURS = (ValueError, OSError, FloatingPointError, OverflowError, EOFError, RecursionError)
LIBRARIES = (
    ("yaml", "YAMLError"), ("pickle", "UnpicklingError"), ("safetensors", "SafetensorError"), ("lzma", "LZMAError"),
    ("zipfile", "BadZipFile"), ("zlib", "error"), ("pyarrow", "ArrowException"),
)  # fmt: skip
"""Module and class of what libraries raise for a damaged file, beside ValueError and OSError."""
SYMLINK_LOOP = "Symlink loop"
"""Of a RuntimeError: how pathlib begins, up to Python 3.12, of a link that leads to itself."""
FULL = "out of memory; give a smaller batch, model or file, or another --device"
ADVICE = {RecursionError: "nested too deeply to be read", EOFError: "a file ends too early"}
"""What is said where the error itself says little."""


def mistakes() -> tuple[type[BaseException], ...]:
    """The classes of errors that are answered in one line."""
    return (*OURS, *(kind for names in LIBRARIES if (kind := loaded_class(*names)) is not None))


def explain(error: Exception) -> str | None:
    """What to say of an error, in one line; None where it is a defect of the program, whose traceback is wanted."""
    text = one_line(str(error))
    if isinstance(error, RuntimeError) and text.startswith(SYMLINK_LOOP):
        return text
    if lacks_memory(error):
        return f"{FULL} ({text})" if text else FULL
    if not isinstance(error, mistakes()):
        return None
    advice = next((line for kind, line in ADVICE.items() if isinstance(error, kind)), None)
    if advice is None:
        return text or type(error).__name__
    return f"{advice} ({text})" if text else advice


def lacks_memory(error: Exception) -> bool:
    """`is_out_of_memory`, without torch where torch was not imported."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from lrt.utils.device import is_out_of_memory

    return is_out_of_memory(error)


def one_line(text: str) -> str:
    """The lines of a text, one after another."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
