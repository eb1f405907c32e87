"""A rehearsal does all of an experiment's cells in seconds, or says which would fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.forked_cells import forked_cells  # noqa: F401  # a fixture
from support.tiny_experiment import tiny_experiment

from gflowgr.cli import main
from gflowgr.data import generate_builtin, save_dataset
from gflowgr.files import read_json
from gflowgr.runs import ExperimentSpec, cells_of, rehearsal_of, shipped_specs

pytestmark = pytest.mark.process


def rehearse(values: dict[str, Any], folder: Path) -> int:
    """Exit status of the rehearsal, by its command, with results in folder/out/rehearsal."""
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(values))
    command = ["experiment", str(path), "--out", str(folder / "out"), "--rehearse"]
    return main([*command, "--workers", "2", "--no-progress"])


@pytest.fixture
def rated(tmp_path: Path) -> Path:
    """A shop whose users gave stars; it has no behaviours."""
    data = generate_builtin(seed=0, num_users=120, num_items=200)
    stars = np.random.default_rng(0).integers(1, 6, len(data.sequences.values))
    stars = stars.astype(np.float32)
    data = replace(data, behaviours=None, behaviour_names=(), ratings=stars)
    save_dataset(data, tmp_path / "rated")
    return tmp_path / "rated"


@pytest.mark.parametrize("name", shipped_specs())
def test_every_cell_is_four_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFLOWGR_DATA", "/data")
    spec = ExperimentSpec.load(name)
    small = rehearsal_of(spec)
    assert len(cells_of(small)) * len(spec.seeds) == len(cells_of(spec))
    for variant in small.variants:
        for method in (None, *small.methods):
            config = small.config(variant, method)
            assert config.sft["max_steps"] == config.finetune["max_steps"] == 4
            assert config.collaborative.epochs == 1
            assert config.evaluation.max_users == 4


@pytest.mark.usefixtures("forked_cells")
def test_stars_are_rewards_in_every_cell(rated: Path, tmp_path: Path) -> None:
    values = tiny_experiment()
    del values["base"]["data"]["users"], values["base"]["data"]["items"]
    values["datasets"] = {
        "Rated": {"data": {"path": str(rated)}, "finetune": {"sampler_options": {"window": 3}}}
    }
    values["methods"] = {
        "SFT continued": {"flow": {"objective": "sft"}, "finetune": {"sampler_options": None}},
        "from the logs": {"finetune": {"sampler": "logs"}},
    }
    assert rehearse(values, tmp_path) == 0
    out = tmp_path / "out" / "rehearsal"
    for method in ("sft", "sft_continued", "from_the_logs"):
        folder = out / "Rated" / "seed_1" / "default" / method
        assert read_json(folder / "done.json")["steps"] == 4
        assert read_json(folder / "evaluation" / "analysis.json")["calibration"]["pearson"] != 0
    assert "A rehearsal of four steps" in (out / "report.md").read_text()


@pytest.mark.usefixtures("forked_cells")
def test_what_fails_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = tiny_experiment()
    values["methods"] = {"SFT continued": {"flow": {"signals": ["no_such_module:Signal"]}}}
    assert rehearse(values, tmp_path) == 1
    assert "shop/seed_1/default/sft_continued" in capsys.readouterr().err
