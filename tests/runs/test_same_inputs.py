"""An output folder is resumed by its own run only; the error lists what to delete for another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_run import tiny_run

from gflowgr.data import Dataset, Ragged, generate_builtin
from gflowgr.errors import DataError
from gflowgr.runs import ConfigError, RunConfig, run
from gflowgr.runs.cells import cells_of_run, folders_of
from gflowgr.runs.same_inputs import (
    check_same_data,
    check_same_inputs,
    digest_of,
    record_inputs,
)


def config(folder: Path, **changes: object) -> RunConfig:
    return RunConfig.from_dict({**tiny_run(folder), **changes})


def begun(config: RunConfig, *folders: str) -> None:
    """Begin stages: what they are made from is recorded in these folders of the output folder."""
    made_from = folders_of(cells_of_run(config))
    for folder in folders:
        record_inputs(Path(config.output_dir) / folder, made_from[folder])


def check(config: RunConfig) -> None:
    check_same_inputs(Path(config.output_dir), folders_of(cells_of_run(config)))


def test_a_change_of_the_fine_tuning_keeps_what_came_before_it(tmp_path: Path) -> None:
    begun(config(tmp_path), "data", "sasrec", "sft", "sft_continued", "evaluation/sft")
    check(config(tmp_path, flow={"beta": 2.0}))
    check(config(tmp_path, evaluation={**tiny_run("")["evaluation"], "examples": 2}))


def test_stages_made_from_other_values_are_named(tmp_path: Path) -> None:
    begun(config(tmp_path), *_STAGES)
    with pytest.raises(ConfigError) as error:
        check(config(tmp_path, flow={"beta": 2.0}))
    assert str(error.value).endswith("delete these in it: gflowgr, evaluation/gflowgr-tb")
    assert "flow.beta: 1.0 there, 2.0 here" in str(error.value)
    with pytest.raises(
        ConfigError, match="delete these in it: data, sasrec, evaluation/sasrec, sft, "
    ):
        check(config(tmp_path, seed=2))


def test_another_normalisation_is_another_supervised_model(tmp_path: Path) -> None:
    begun(config(tmp_path), "sft")
    with pytest.raises(ConfigError, match=r"flow\.normalize: 'vocab' there, 'children' here"):
        check(config(tmp_path, flow={"normalize": "children"}))


def test_a_method_that_trains_new_weights_is_not_the_one_that_goes_on_from_sft(
    tmp_path: Path,
) -> None:
    begun(config(tmp_path), "sft", "gflowgr")
    wanted = r"start: 'sft' there, 'scratch' here.*delete these in it: gflowgr$"
    with pytest.raises(ConfigError, match=wanted):
        check(config(tmp_path, start="scratch"))


def test_a_folder_within_a_stale_one_is_not_named_too(tmp_path: Path) -> None:
    made_from = {name: {"seed": 1} for name in ("sft", "sft/evaluation", "sft_continued")}
    for folder, values in made_from.items():
        record_inputs(tmp_path / folder, values)
    with pytest.raises(ConfigError, match=r"delete these in it: sft, sft_continued$"):
        check_same_inputs(tmp_path, {name: {"seed": 2} for name in made_from})


def test_a_setting_that_came_later_and_is_not_used_changes_nothing(tmp_path: Path) -> None:
    record_inputs(tmp_path / "sasrec", {"collaborative": {"epochs": 3}})
    unused = {"epochs": 3, "folds": None, "switch": False}
    check_same_inputs(tmp_path, {"sasrec": {"collaborative": unused}})
    with pytest.raises(ConfigError, match=r"collaborative\.folds: None there, 2 here"):
        check_same_inputs(tmp_path, {"sasrec": {"collaborative": {"epochs": 3, "folds": 2}}})


def test_only_the_first_record_of_a_folder_counts(tmp_path: Path) -> None:
    record_inputs(tmp_path, {"seed": 1})
    record_inputs(tmp_path, {"seed": 2})
    check_same_inputs(tmp_path.parent, {tmp_path.name: {"seed": 1}})


_EVALUATIONS = tuple(
    f"evaluation/{name}" for name in ("sasrec", "sft", "sft_continued", "gflowgr-tb")
)
_STAGES = ("data", "sasrec", "sft", "sft_continued", "gflowgr", *_EVALUATIONS)


@pytest.mark.parametrize(
    ("section", "change", "valid"),
    [
        ("seed", 2, ()),
        ("data", {"users": 201}, ()),
        ("data", {"max_history": 9}, ("data",)),
        ("data", {"identifiers": "kmeans"}, ("data", "sasrec")),
        ("collaborative", {"dropout": 0.5}, ("data",)),
        ("model", {"d_ff": 64}, ("data", "sasrec", "evaluation/sasrec")),
        ("sft", {"learning_rate": 1e-3}, ("data", "sasrec", "evaluation/sasrec")),
        ("flow", {"normalize": "children"}, ("data", "sasrec", "evaluation/sasrec")),
        (
            "finetune",
            {"num_trajectories": 5},
            ("data", "sasrec", "sft", "evaluation/sasrec", "evaluation/sft"),
        ),
        (
            "flow",
            {"beta": 2.0},
            tuple(name for name in _STAGES if name not in ("gflowgr", "evaluation/gflowgr-tb")),
        ),
        ("evaluation", {"num_beams": 11}, _STAGES[:5]),
    ],
)
def test_a_change_makes_a_stage_and_all_after_it_stale_and_none_before_it(
    section: str, change: Any, valid: tuple[str, ...], tmp_path: Path
) -> None:
    values = tiny_run(tmp_path)
    before = RunConfig.from_dict(values)
    values[section] = {**values.get(section, {}), **change} if isinstance(change, dict) else change
    after = RunConfig.from_dict(values)
    begun(before, *valid)
    check(after)
    begun(before, *_STAGES)
    with pytest.raises(ConfigError) as error:
        check(after)
    stale = [name for name in folders_of(cells_of_run(before)) if name in {*_STAGES} - {*valid}]
    assert str(error.value).endswith(f"delete these in it: {', '.join(stale)}")


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
    check_same_data(tmp_path, {"data": digest_of(dataset)})
    check_same_data(tmp_path, {"data": digest_of(dataset)})
    values = dataset.sequences.values.copy()
    values[:2] = values[:2][::-1]
    other = dataclasses.replace(dataset, sequences=Ragged(dataset.sequences.offsets, values))
    assert not np.array_equal(values, dataset.sequences.values)
    with pytest.raises(ConfigError, match="a run on other data: the files have changed"):
        check_same_data(tmp_path, {"data": digest_of(other)})


def test_the_curriculum_without_a_collaborative_model_is_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set finetune\.sampler: random"):
        config(tmp_path, collaborative={"kind": "none"})


def test_a_beta_that_no_loss_takes_is_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="beta must be finite and > 0; got 0"):
        config(tmp_path, flow={"beta": 0})


def test_a_behaviour_without_a_reward_is_found_before_any_training(tmp_path: Path) -> None:
    values = tiny_run(tmp_path / "run")
    values["finetune"]["behaviour_values"] = {"wink": 1.0}
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"finetune\.behaviour_values must be .*purchase"):
        run(RunConfig.from_dict(values), say=said.append, progress=False)
    assert not [line for line in said if line.startswith("Stage")]


def test_a_wrong_signal_is_said_to_be_of_its_setting(tmp_path: Path) -> None:
    values = tiny_run(tmp_path / "run")
    values["flow"] = {"signals": ["r_a", "nowhere:Fresh"]}
    with pytest.raises(ConfigError, match=r"^flow\.signals: cannot make 'nowhere:Fresh'"):
        run(RunConfig.from_dict(values), say=lambda text: None, progress=False)


def test_missing_identifiers_are_found_before_any_training(tmp_path: Path) -> None:
    values = tiny_run(tmp_path / "run")
    values["data"]["identifiers"] = "published"
    said: list[str] = []
    with pytest.raises(DataError, match=r"no file index\.published\.json\.gz.*hierarchy"):
        run(RunConfig.from_dict(values), say=said.append, progress=False)
    assert not [line for line in said if line.startswith("Stage")]


def test_a_default_that_is_given_outright_changes_nothing(tmp_path: Path) -> None:
    begun(config(tmp_path), "gflowgr")
    check(config(tmp_path, flow={**tiny_run(tmp_path).get("flow", {}), "reduction": "prompt"}))
