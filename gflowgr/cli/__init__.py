"""The ``gflowgr`` command, :func:`main`: one module per subcommand."""

from .command_line import main

__all__ = ["main"]
