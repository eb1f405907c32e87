"""The package's own exceptions; each is also a built-in kind, so plain ``except`` clauses work."""

from __future__ import annotations

import reprlib

__all__ = [
    "DataError",
    "GFlowGRError",
    "MissingExtraError",
    "OutputError",
    "missing_extra",
    "shown",
]

_EXTRAS = {
    **dict.fromkeys(
        (
            *("transformers", "accelerate", "tqdm", "matplotlib", "markdown_it", "yaml"),
            *("polars", "pyarrow", "sklearn"),
        ),
        "train",
    ),
    "peft": "lora",
    "sentence_transformers": "text",
    "ray": "ray",
}
"""Which extra of the package brings a module, see pyproject.toml."""


class GFlowGRError(Exception):
    """Base class of every error that the package defines."""


class DataError(GFlowGRError, ValueError):
    """An input file or data set is invalid; the message names place and value."""


class OutputError(GFlowGRError, OSError):
    """A file or folder cannot be written (read-only, no space, ...); the message names it."""


class MissingExtraError(GFlowGRError, ImportError):
    """An optional dependency is not installed; the message says which extra brings it."""


def missing_extra(error: ImportError) -> MissingExtraError | None:
    """What to raise for a failed import of an optional dependency; None if it is no such one."""
    module = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or module not in _EXTRAS:
        return None
    return MissingExtraError(
        f'this needs pip install "gflowgr[{_EXTRAS[module]}]" ({module} is not installed)',
        name=module,
    )


class _Shown(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Decimal digits of a huge integer take quadratic time, and Python refuses past 4,300.
        return f"an integer of {x.bit_length():,} bits" if x.bit_length() > 128 else repr(x)


def shown(value: object, width: int = 80) -> str:
    """``value`` as an error message quotes it: bounded however large or nested it is."""
    short = _Shown()
    short.maxstring = short.maxother = short.maxlong = width
    text = short.repr(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."
