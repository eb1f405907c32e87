"""Trackers are checked before any work, and all stages write into one folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.tiny_run import tiny_run
from transformers.integrations import integration_utils

from gflowgr.runs import ConfigError, RunConfig
from gflowgr.training.tracking import check_trackers, tracked


def test_a_tracker_that_is_not_there_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"]
    )
    values = tiny_run(tmp_path)
    values["finetune"]["report_to"] = "wandb"
    with pytest.raises(ConfigError, match=r"finetune: .*'tensorboard'.*'wandb': pip install wandb"):
        RunConfig.from_dict(values)
    values["finetune"]["report_to"] = ["tensorboard", "tensorbored"]
    with pytest.raises(ConfigError, match=r"must be 'none', 'all' or of .*got 'tensorbored'"):
        RunConfig.from_dict(values)
    assert check_trackers(["tensorboard"]) == ["tensorboard"]
    assert check_trackers("all") == ["tensorboard"]
    assert check_trackers("none") == check_trackers(None) == check_trackers([]) == []


def test_stages_write_side_by_side_and_the_users_own_places_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setenv("WANDB_DIR", "/mine")
    finished: list[bool] = []
    wandb = SimpleNamespace(run=object(), finish=lambda: finished.append(True))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    before = dict(os.environ)
    for stage in ("sft", "gflowgr"):
        with tracked(["tensorboard", "wandb"], tmp_path / "logs", stage):
            assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "logs" / stage)
            assert os.environ["WANDB_NAME"] == stage
            assert os.environ["WANDB_DIR"] == "/mine"
        assert dict(os.environ) == before
    assert finished == [True, True]
    with tracked([], tmp_path / "none", "sft"):
        assert dict(os.environ) == before
    assert not (tmp_path / "none").exists()
