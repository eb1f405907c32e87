"""A run whose fine-tuning is a baseline instead of GFlowGR: ``flow: {objective: sdpo}``."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.tiny_run import tiny_run

from gflowgr.runs import ConfigError, RunConfig
from gflowgr.runs.run_report import run_and_report

pytestmark = pytest.mark.usefixtures("no_drawing")


def test_the_report_names_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in ("fork", "posix_spawn"):
        monkeypatch.setattr(os, function, None)  # a run starts no process
    monkeypatch.setattr(subprocess, "Popen", None)
    values = tiny_run(tmp_path / "run")
    values["collaborative"] = {"kind": "none"}
    values["flow"] = {"objective": "sdpo", "sft_weight": 0.5}
    values["continued_sft"] = False
    for stage in ("sft", "finetune"):
        values[stage] |= {"max_steps": 2, "eval_steps": 2, "save_steps": 2, "logging_steps": 1}
    values["finetune"] |= {"num_trajectories": 4, "sampler": "random"}
    values["evaluation"]["max_users"] = 20
    result = run_and_report(RunConfig.from_dict(values), say=lambda text: None, progress=False)
    assert [row.name for row in result.rows] == ["SFT", "S-DPO", "Popularity"]
    assert {"preference_margin", "reference_divergence"} <= set(result.histories["S-DPO"][0])
    report = (tmp_path / "run" / "report.md").read_text()
    wanted = "S-DPO against the model after SFT, beta 1.0, 0.5 x SFT + 1.0 x S-DPO, softmax over"
    assert wanted in report
    assert "GFlowGR-" not in report


@pytest.mark.parametrize(
    ("flow", "finetune", "message"),
    [
        ({"objective": "dpo"}, {}, "finetune: num_trajectories must be 2 for objective 'dpo'"),
        ({"objective": "grpo"}, {}, "finetune: objective 'grpo' needs trajectories of the present"),
    ],
)
def test_trajectories_are_checked_before_any_work(
    flow: dict[str, str], finetune: dict[str, object], message: str, tmp_path: Path
) -> None:
    values = {**tiny_run(tmp_path), "flow": flow, "finetune": finetune}
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(values)
