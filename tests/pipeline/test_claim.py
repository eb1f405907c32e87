"""An output folder goes on with its own run only, and says what must go for another one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tiny_run import tiny_run

from gflowgr.data import Ragged, generate_builtin
from gflowgr.errors import DataError
from gflowgr.files import read_json
from gflowgr.pipeline import ConfigError, RunConfig, run
from gflowgr.pipeline.claim import claim_configuration, claim_data, digest_of


def config(folder: Path, **changes: object) -> RunConfig:
    return RunConfig.from_dict({**tiny_run(folder), **changes})


def claimed(folder: Path, *stages: str) -> Path:
    claim_configuration(folder, config(folder))
    for stage in stages:
        (folder / stage).mkdir()
    return folder


def test_a_change_of_the_fine_tuning_keeps_what_came_before_it(tmp_path: Path) -> None:
    folder = claimed(tmp_path, "sasrec", "sft")
    claim_configuration(folder, config(folder, flow={"beta": 2.0}))
    assert read_json(folder / "config.json")["flow"]["beta"] == 2.0


def test_stages_made_from_other_values_are_named(tmp_path: Path) -> None:
    folder = claimed(tmp_path, "sasrec", "sft", "sft_continued", "gflowgr", "evaluation")
    with pytest.raises(ConfigError) as error:
        claim_configuration(folder, config(folder, flow={"beta": 2.0}))
    assert str(error.value).endswith("delete these in it: gflowgr, evaluation")
    assert "flow: " in str(error.value)
    with pytest.raises(ConfigError, match="delete these in it: sasrec, sft, sft_continued"):
        claim_configuration(folder, config(folder, seed=2))


def test_another_normalisation_is_another_supervised_model(tmp_path: Path) -> None:
    folder = claimed(tmp_path, "sft")
    with pytest.raises(ConfigError, match=r"flow\.normalize: 'vocab' there, 'children' here"):
        claim_configuration(folder, config(folder, flow={"normalize": "children"}))


def test_changed_data_are_refused(tmp_path: Path) -> None:
    dataset = generate_builtin(seed=0, num_users=50, num_items=200)
    claim_data(tmp_path, {"data": digest_of(dataset)})
    claim_data(tmp_path, {"data": digest_of(dataset)})
    values = dataset.sequences.values.copy()
    values[:2] = values[:2][::-1]
    other = dataclasses.replace(dataset, sequences=Ragged(dataset.sequences.offsets, values))
    assert not np.array_equal(values, dataset.sequences.values)
    with pytest.raises(ConfigError, match="a run on other data: the files have changed"):
        claim_data(tmp_path, {"data": digest_of(other)})


def test_the_curriculum_without_a_collaborative_model_is_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set finetune\.sampler: random"):
        config(tmp_path, collaborative={"kind": "none"})


def test_a_beta_that_no_loss_takes_is_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="beta must be finite and > 0; got 0"):
        config(tmp_path, flow={"beta": 0})


def test_a_behaviour_without_a_reward_is_found_before_any_training(tmp_path: Path) -> None:
    values = tiny_run(tmp_path / "run")
    values["finetune"]["behaviour_values"] = {"click": 1.0}
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"finetune\.behaviour_values: .*purchase"):
        run(RunConfig.from_dict(values), say=said.append, progress=False)
    assert not [line for line in said if line.startswith("Stage")]


def test_missing_identifiers_are_found_before_any_training(tmp_path: Path) -> None:
    values = tiny_run(tmp_path / "run")
    values["data"]["identifiers"] = "published"
    said: list[str] = []
    with pytest.raises(DataError, match=r"no file index\.published\.json\.gz.*hierarchy"):
        run(RunConfig.from_dict(values), say=said.append, progress=False)
    assert not [line for line in said if line.startswith("Stage")]
