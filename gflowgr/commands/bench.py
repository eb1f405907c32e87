"""``gflowgr bench``: times and memory against plain PyTorch and other projects."""

from __future__ import annotations

from ..benchmarking.command import EPILOG, SUMMARY, add_arguments
from ._parsers import Commands, command

__all__ = ["add_bench"]


def add_bench(commands: Commands) -> None:
    """Declare ``gflowgr bench``."""
    add_arguments(command(commands, "bench", SUMMARY, EPILOG))
