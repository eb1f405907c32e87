"""A whole run, small enough for a test: 200 users, 200 items, 12 steps per stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gflowgr.files import read_json

METHODS = ["SFT", "SFT continued", "GFlowGR-TB", "SASRec", "Popularity"]

_STAGE = {
    "per_device_train_batch_size": 64,
    "max_steps": 12,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_steps": 4,
    "logging_steps": 3,
    "eval_beams": 10,
    "eval_max_users": 40,
}


def tiny_run(output_dir: Path | str) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "seed": 1,
        "data": {"users": 200, "items": 200, "max_history": 8},
        "collaborative": {"epochs": 4, "batch_size": 16, "patience": 4},
        "model": {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1},
        "sft": {**_STAGE, "learning_rate": 1e-2},
        "finetune": {**_STAGE, "learning_rate": 1e-2},
        "evaluation": {"num_beams": 10, "max_users": 60, "examples": 1},
    }


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def results(folder: Path) -> dict[str, dict[str, float]]:
    """The metrics of each method."""
    methods = read_json(folder / "results.json")["methods"]
    return {name: values["metrics"] for name, values in methods.items()}
