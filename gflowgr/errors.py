"""The package's own exceptions; each is also a built-in kind, so plain ``except`` clauses work."""

from __future__ import annotations


class GFlowGRError(Exception):
    """Base class of every error that the package defines."""


class DataError(GFlowGRError, ValueError):
    """An input file or data set is not what it should be; the message names place and value."""


class OutputError(GFlowGRError, OSError):
    """A file or folder cannot be written (read-only, no space, ...); the message names it."""
