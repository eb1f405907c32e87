"""Benchmark of whole trainings: over the same examples, from the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import training
from benchmarks.__main__ import main
from benchmarks.harness.registry import build_case, read_shape

SHAPE = "training-small:8x2x50"


def bench(*arguments: Any) -> int:
    shared = ("--no-progress", "--repeats", "1", "--shapes", SHAPE)
    return main(["training", *shared, *map(str, arguments)])


def test_all_ways_of_training_minimise_the_same_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--out", tmp_path / "o") == 0
    rows = {
        r["variant"]: r for r in json.loads((tmp_path / "o" / "bench.json").read_text())["rows"]
    }
    assert {row["status"] for row in rows.values()} == {"ok"}
    for name in ("gflowgr, SFT, float32", "transformers Trainer"):
        assert rows[name]["result_error"] < 1e-6
    ours = rows["gflowgr, SFT"]
    theirs = rows["transformers Trainer"]["ms"]
    assert ours["speedup_transformers"] == pytest.approx(theirs / ours["ms"])
    assert f"gflowgr, SFT: {16 / ours['ms'] * 1e3:,.0f} examples/s" in capsys.readouterr().out
    assert ours["speedup_tb"] == pytest.approx(rows["gflowgr, TB"]["ms"] / ours["ms"])


def test_a_training_of_another_loss_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = training._Ours.loss
    monkeypatch.setattr(training._Ours, "loss", lambda *args: loss(*args) * 1.01)
    assert bench("--peers", "none") == 1
    assert "the loss is off by 0.01" in capsys.readouterr().out


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_examples_are_those_of_all_steps(seed: int) -> None:
    case = build_case("training", read_shape(SHAPE), torch.device("cpu"), torch.float32, ())
    row = case.variants[0].forward.__self__  # type: ignore[attr-defined]
    assert len(row.world.split(seed).train) == 16
