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
FULL = "out of memory; give a smaller batch, model or file"
ADVICE = {
    ("builtins", "MemoryError"): FULL,
    ("builtins", "RecursionError"): "nested too deeply to be read",
    ("builtins", "EOFError"): "a file ends too early",
    ("torch", "OutOfMemoryError"): "the device is out of memory; give a smaller batch or model, or --device cpu",
}
"""Module and class -> what is said where the error itself says little, or not what to do."""


def mistakes() -> tuple[type[BaseException], ...]:
    """The classes of errors that are answered in one line."""
    return (*OURS, *(kind for kind in map(loaded_class, LIBRARIES) if kind is not None))


def loaded_class(names: tuple[str, str]) -> type[BaseException] | None:
    """A class by its module and name; None where the module was not imported, and so has raised nothing."""
    module, name = names
    return vars(sys.modules[module]).get(name) if module in sys.modules else None


def explain(error: Exception) -> str | None:
    """What to say of an error, in one line; None where it is a defect of the program, whose traceback is wanted."""
    if isinstance(error, RuntimeError) and str(error).startswith(SYMLINK_LOOP):
        return str(error)
    if isinstance(error, RuntimeError) and ALLOCATOR in str(error):
        return f"{FULL} ({one_line(str(error).rpartition('DefaultCPUAllocator: ')[2])})"
    if not isinstance(error, mistakes()):
        return None
    text = one_line(str(error))
    kinds = ((loaded_class(names), line) for names, line in ADVICE.items())
    advice = next((line for kind, line in kinds if kind is not None and isinstance(error, kind)), None)
    if advice is None:
        return text or type(error).__name__
    return f"{advice} ({text})" if text else advice


def one_line(text: str) -> str:
    """The lines of a text, one after another."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
