"""What the command line says of an error that is the user's, or the machine's: one line, and no traceback."""

from __future__ import annotations

import sys

OURS = (ValueError, OSError, FloatingPointError, OverflowError, EOFError, RecursionError, MemoryError)
LIBRARIES = (
    ("yaml", "YAMLError"), ("pickle", "UnpicklingError"), ("safetensors", "SafetensorError"), ("lzma", "LZMAError"),
    ("zipfile", "BadZipFile"), ("zlib", "error"), ("pyarrow", "ArrowException"), ("torch", "OutOfMemoryError"),
)  # fmt: skip
"""Module and class of what libraries raise for a damaged file or a full memory, beside ValueError and OSError."""
ALLOCATOR = "can't allocate memory"
"""Of a RuntimeError: what torch says where a CPU's memory does not suffice."""
SYMLINK_LOOP = "Symlink loop"
"""Of a RuntimeError: how pathlib begins, up to Python 3.12, of a link that leads to itself."""
ADVICE = {
    MemoryError: "out of memory; give a smaller batch, model or file",
    RecursionError: "nested too deeply to be read",
    EOFError: "a file ends too early",
}
"""What is said where the error itself says little or nothing."""


def mistakes() -> tuple[type[BaseException], ...]:
    """The classes of errors that are answered in one line. A library that was not imported has raised none."""
    loaded = [(sys.modules[module], name) for module, name in LIBRARIES if module in sys.modules]
    return (*OURS, *(vars(module)[name] for module, name in loaded if name in vars(module)))


def explain(error: Exception) -> str | None:
    """What to say of an error, in one line; None where it is a defect of the program, whose traceback is wanted."""
    if isinstance(error, RuntimeError) and str(error).startswith(SYMLINK_LOOP):
        return str(error)
    if isinstance(error, RuntimeError) and ALLOCATOR in str(error):
        return f"{ADVICE[MemoryError]} ({one_line(str(error).rpartition('DefaultCPUAllocator: ')[2])})"
    if not isinstance(error, mistakes()):
        return None
    text = one_line(str(error))
    advice = next((line for kind, line in ADVICE.items() if isinstance(error, kind)), None)
    if advice is None:
        return text or type(error).__name__
    return f"{advice} ({text})" if text else advice


def one_line(text: str) -> str:
    """The lines of a text, one after another."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
