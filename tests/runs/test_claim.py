"""An output folder goes on with its own run only, and says what must go for another one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_run import tiny_run

from gflowgr.data import Dataset, Ragged, generate_builtin
from gflowgr.errors import DataError
from gflowgr.files import read_json
from gflowgr.runs import ConfigError, RunConfig, run
from gflowgr.runs.claim import claim_configuration, claim_data, digest_of


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


_STAGES = ("sasrec", "sft", "sft_continued", "gflowgr", "evaluation")


@pytest.mark.parametrize(
    ("section", "change", "first"),
    [
        ("seed", 2, "sasrec"),
        ("data", {"users": 201}, "sasrec"),
        ("collaborative", {"dropout": 0.5}, "sasrec"),
        ("model", {"d_ff": 64}, "sft"),
        ("sft", {"learning_rate": 1e-3}, "sft"),
        ("flow", {"normalize": "children"}, "sft"),
        ("finetune", {"num_trajectories": 5}, "sft_continued"),
        ("flow", {"beta": 2.0}, "gflowgr"),
        ("evaluation", {"num_beams": 11}, "evaluation"),
    ],
)
def test_a_change_makes_a_stage_and_all_after_it_stale_and_none_before_it(
    section: str, change: Any, first: str, tmp_path: Path
) -> None:
    values = tiny_run(tmp_path)
    claim_configuration(tmp_path, RunConfig.from_dict(values))
    values[section] = {**values.get(section, {}), **change} if isinstance(change, dict) else change
    other = RunConfig.from_dict(values)
    at = _STAGES.index(first)
    for stage in _STAGES[:at]:
        (tmp_path / stage).mkdir()
    before = (tmp_path / "config.json").read_bytes()
    for stage in _STAGES[at:]:
        (tmp_path / stage).mkdir()
    with pytest.raises(ConfigError) as error:
        claim_configuration(tmp_path, other)
    assert str(error.value).endswith(f"delete these in it: {', '.join(_STAGES[at:])}")
    assert (tmp_path / "config.json").read_bytes() == before, "what is there keeps its claim"
    for stage in _STAGES[at:]:
        (tmp_path / stage).rmdir()
    claim_configuration(tmp_path, other)
    assert (tmp_path / "config.json").read_bytes() != before


def _changes(dataset: Dataset) -> dict[str, Dataset]:
    """The dataset with one thing changed of all that training and evaluation read."""
    rows = dataset.sequences
    codes, truth = dataset.behaviours, dataset.truth
    assert codes is not None
    assert truth is not None
    items, ends = rows.values.copy(), rows.offsets.copy()
    items[0], items[1] = items[1], items[0]
    ends[1] -= 1
    codes, truth = codes.copy(), truth.copy()
    codes[0] = 1 - codes[0]
    truth[0, 0] += 1
    shown = dataset.side["impression"]
    fewer = np.arange(len(shown.values)) > 0
    change = dataclasses.replace
    return {
        "order of items": change(dataset, sequences=Ragged(rows.offsets, items)),
        "whose event": change(dataset, sequences=Ragged(ends, rows.values), times=None),
        "behaviours": change(dataset, behaviours=codes),
        "no behaviours": change(dataset, behaviours=None, behaviour_names=()),
        "names of behaviours": change(dataset, behaviour_names=("purchase", "click")),
        "impressions": change(dataset, side={"impression": shown.filter(fewer)}),
        "no impressions": change(dataset, side={}),
        "truth": change(dataset, truth=truth),
    }


def test_every_part_of_the_data_has_a_part_in_their_digest() -> None:
    dataset = generate_builtin(seed=0, num_users=50, num_items=200)
    assert digest_of(dataset) == digest_of(generate_builtin(seed=0, num_users=50, num_items=200))
    digests = {name: digest_of(other) for name, other in _changes(dataset).items()}
    digests["as it is"] = digest_of(dataset)
    assert len(set(digests.values())) == len(digests), digests


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
