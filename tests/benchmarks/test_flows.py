"""Benchmarks of exact flows and flow KL: every variant is right, and a wrong one is not timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gflowgr
from benchmarks.__main__ import main
from benchmarks.harness.registry import read_tables

Capture = pytest.CaptureFixture[str]
SIZES = ("2x2x4x8x1027", "item_flows:3x300")


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Random identifiers, on every machine."""
    monkeypatch.setenv("GFLOWGR_DATA", str(tmp_path))


def bench(*arguments: Any) -> int:
    return main(["--no-progress", "--no-memory", "--repeats", "1", *map(str, arguments)])


def test_every_variant_is_right(tmp_path: Path) -> None:
    ops, out = ("flow_kl", "item_flows"), tmp_path / "results"
    assert bench(*ops, "--shapes", *SIZES, "--out", out) == 0
    rows = json.loads((out / "bench.json").read_text())["rows"]
    assert {row["op"] for row in rows} == {table.name for table in read_tables(ops)}
    for row in rows:
        assert row["status"] == "ok", row
    variants = {row["variant"] for row in rows if row["op"] == "flow_kl"}
    assert variants >= {
        "gflowgr/torch",
        "gflowgr/torch, flows too",
        "fused TB, children",
        "plain torch",
        "plain torch, flows too",
    }
    assert all(
        row["speedup_tb"] > 0 for row in rows if row["op"] == "flow_kl" and not row["family"]
    )


def test_steps_on_sequences_are_those_on_their_prompts(tmp_path: Path) -> None:
    assert bench("sequences", "--shapes", "sequences:3x4x50", "--out", tmp_path / "o") == 0
    rows = json.loads((tmp_path / "o" / "bench.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert rows[0]["speedup_sft"] > 0
    assert rows[0]["speedup_prompts"] > 0


def test_wrong_flows_are_neither_timed_nor_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    make = gflowgr.item_flows
    monkeypatch.setattr(gflowgr, "item_flows", lambda tree, r, **o: make(tree, 1.001 * r, **o))
    assert bench("item_flows", "--shapes", SIZES[1]) == 1
    assert "relative error over 1e-06" in capsys.readouterr().out
