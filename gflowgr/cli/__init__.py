"""The ``gflowgr`` command: one module per subcommand."""

from __future__ import annotations

from .main import main

__all__ = ["main"]
