"""The experiment of ``gflowgr quickstart``, so small that it takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gflowgr.runs import quickstart, shipped_specs
from gflowgr.runs.spec import merge
from support.tiny_run import write_config

_STAGE = {
    "max_steps": 2,
    "warmup_steps": 1,
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "eval_beams": 4,
    "eval_max_users": 20,
}
_SHRUNK: dict[str, Any] = {
    "data": {"max_history": 8},
    "collaborative": {"epochs": 1, "batch_size": 16},
    "model": {"d_model": 16, "d_ff": 32, "num_layers": 1},
    "sft": _STAGE,
    "finetune": _STAGE,
    "evaluation": {"num_beams": 10, "max_users": 20},
}


def make_quickstart_tiny(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Put a shrunken copy of the shipped file in its place."""
    values = yaml.safe_load(shipped_specs()["quickstart"].read_text())
    values["base"] = merge(values["base"], _SHRUNK)
    values["datasets"]["shop"]["data"] |= {"users": 60, "items": 200}
    place = write_config(folder / "quickstart.yaml", values)
    monkeypatch.setattr(quickstart, "shipped_specs", lambda: {"quickstart": place})
