"""What reports say of the machine and of the command."""

from __future__ import annotations

import platform

import pytest

from gflowgr.report.machine import command_as_typed, machine_summary


def test_machine_summary_names_no_machine() -> None:
    summary = machine_summary()
    assert {"processor", "accelerator", "system", "torch"} <= set(summary)
    assert platform.node() not in " ".join(summary.values()) or not platform.node()


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (
            ["/usr/bin/gflowgr", "train", "--config", "/home/me/run.yaml"],
            "gflowgr train --config run.yaml",
        ),
        (["/x/gflowgr/__main__.py", "train", "--set", "a=b c"], "gflowgr train --set 'a=b c'"),
    ],
)
def test_the_command_is_recorded_without_places(
    typed: list[str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", typed)
    assert command_as_typed() == shown
