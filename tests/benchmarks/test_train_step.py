"""Benchmark of a training step: the steps compared are the trainer's, and of the same loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import train_step
from benchmarks.__main__ import main
from benchmarks.harness import report
from benchmarks.harness.bars import judge_bars
from benchmarks.harness.registry import build_case
from benchmarks.train_step import OURS, SEPARATE, SFT, SeparateForwards, StepShape

Capture = pytest.CaptureFixture[str]
SMALL = StepShape("t5", 2, 8, 3, 50)


def bench(*arguments: Any) -> int:
    shared = ("--no-progress", "--no-memory", "--repeats", "1")
    return main(["train_step", *shared, *map(str, arguments)])


@pytest.mark.parametrize("model", ["t5", "qwen3"])
def test_packed_and_separate_steps_are_right(model: str, tmp_path: Path, capsys: Capture) -> None:
    shape = f"train_step-{model}:2x8x3x50"
    assert bench("--shapes", shape, "--out", tmp_path / "o") == 0
    found = json.loads((tmp_path / "o" / "bench.json").read_text())
    rows = {row["variant"]: row for row in found["rows"]}
    assert set(rows) == {OURS, SFT, SEPARATE}
    for row in rows.values():
        assert row["status"] == "ok", row
        assert row["result_error"] < 2e-5
        assert row["gradient_error"] < 1e-6  # in float64, but for T5's norms
    assert rows[OURS]["speedup_sft"] == pytest.approx(rows[SFT]["ms"] / rows[OURS]["ms"])
    assert rows[OURS]["speedup_separate"] > 0
    floors = found["cases"][0]["floors"]
    assert floors[SFT]["flops"] < floors[OURS]["flops"] < floors[SEPARATE]["flops"]
    parts = ("scores", "sampling", "rewards", "forward", "forward, backward", "optimiser")
    assert set(found["cases"][0]["bare"]) == {
        *(f"{OURS}: {part}" for part in parts),
        *(f"{SFT}: {part}" for part in parts[3:]),
    }
    for name, part in found["cases"][0]["bare"].items():
        whole = rows[name.partition(":")[0]]["ms"]
        assert part["share"] == pytest.approx(part["ms"] / whole)
    assert "% of it" in capsys.readouterr().out


def test_a_step_of_another_loss_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    """The separate forwards mix the trajectories up: packed and reference no longer agree."""
    states = SeparateForwards._states

    def mixed(self: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        hidden, pooled = states(self, *arguments)
        return hidden.roll(1, 1), pooled

    monkeypatch.setattr(SeparateForwards, "_states", mixed)
    assert bench("--shapes", SMALL.text, "--peers", "none") == 1
    assert "relative error over 2e-05: loss" in capsys.readouterr().out


def test_a_step_is_the_trainers_and_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are clipped and AdamW counts a step; at a rate of 0 all weights stay."""
    seen: list[str] = []
    compute = train_step.GFlowGRTrainer.compute_loss

    def counted(self: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(model.settings.objective)
        return compute(self, model, *arguments, **options)

    monkeypatch.setattr(train_step.GFlowGRTrainer, "compute_loss", counted)
    case = build_case("train_step", SMALL, torch.device("cpu"), torch.float32, ())
    seen.clear()
    inputs = case.make_inputs(3)
    assert inputs["input_ids"].shape == (2, 8 + 1)  # two items of four tokens, and eos
    ours = case.variants[0]
    first, second = (ours.run(inputs)() for _ in range(2))
    assert seen == ["tb", "tb"]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    other = ours.run(case.make_inputs(5))()  # other prompts: 4 draws the same two
    assert not torch.equal(first[0], other[0])


def test_the_bar_is_for_the_published_sizes() -> None:
    def row(shape: str, speedup: float) -> report.BenchRow:
        named = ("train_step", shape, shape, "float32", "cpu", OURS, "", "", "ok", "")
        ratios = {"sft": report.Ratio(SFT, speedup, None)}
        return report.BenchRow(*named, None, None, ms=10.0, ratios=ratios)

    rows = [
        row("train_step-t5:128x80x4x12101", 0.9),
        row("train_step-qwen3:32x256x4x12101", 0.8),
        row("train_step-t5:2x80x4x12101", 0.1),
    ]
    assert [bar.text for bar in judge_bars(rows)] == [
        "met: train_step, train_step-t5:128x80x4x12101: time, sft 1.11, at most 1.15",
        "MISSED: train_step, train_step-qwen3:32x256x4x12101: time, sft 1.25, at most 1.15",
    ]
