"""The command line within a test."""

from __future__ import annotations

from typing import Any

import pytest

from gflowgr.cli import main

Capture = pytest.CaptureFixture[str]


def call(capsys: Capture, *arguments: Any) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:  # argparse ends so
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def without_bars(text: str) -> str:
    """What is on standard error beside the progress bars of model files."""
    return "".join(
        f"{line}\n" for line in text.replace("\r", "\n").splitlines() if "it/s]" not in line
    ).strip()
