"""``gflowgr bench``: times and memory against plain PyTorch and other projects."""

from __future__ import annotations

from gflowgr.cli._parsers import Commands, command

from .harness.command import EPILOG, SUMMARY, add_arguments

__all__ = ["add_bench"]


def add_bench(commands: Commands) -> None:
    """Declare ``gflowgr bench``."""
    add_arguments(command(commands, "bench", SUMMARY, EPILOG))
