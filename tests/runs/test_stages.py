"""Stages: kinds of collaborative models; a damaged result is made again, with a message."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_shop import make_model, make_scorer, shop

from gflowgr import files
from gflowgr.collaborative import AverageModel, CrossFitted
from gflowgr.data import LeaveOneOut
from gflowgr.evaluation import ScoringRecommender
from gflowgr.folders import write_manifest
from gflowgr.runs.cells import cells_of_run
from gflowgr.runs.config import ConfigError, RunConfig
from gflowgr.runs.sections import CollaborativeConfig, EvaluationConfig
from gflowgr.runs.stages import (
    MASKED,
    Console,
    collaborative_cpu_seconds,
    collaborative_stage,
    evaluation_stage,
    is_done,
    mark_done,
)
from gflowgr.runs.work import target_values


@pytest.mark.parametrize("name", ["ranks.npy", "items.npy", "done.json", "manifest.json"])
@pytest.mark.parametrize("how", ["empty", "half", "gone"])
def test_a_damaged_evaluation_is_done_again(name: str, how: str, tmp_path: Path) -> None:
    said: list[str] = []
    settings = EvaluationConfig(num_beams=4, max_users=20, collision="item")

    def evaluate() -> np.ndarray:
        recommender = ScoringRecommender("Random", make_scorer())
        console = Console(said.append, progress=False)
        return evaluation_stage(settings, shop(), recommender, None, tmp_path, console).ranks

    ranks = evaluate()
    assert said.pop() == "Stage: evaluation of Random"
    assert np.array_equal(evaluate(), ranks)
    assert said == []  # it was read
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(b"" if how == "empty" else content[: len(content) // 2])
    if how == "gone":
        (tmp_path / name).unlink()
    assert np.array_equal(evaluate(), ranks)
    if how == "gone" and name == "manifest.json":
        assert said == []  # as earlier versions left it
        return
    assert said[-1] == "Stage: evaluation of Random"
    if not (how == "gone" and name == "done.json"):
        assert name in said[0]
        assert said[0].endswith("this stage is done again")
    said.clear()
    assert np.array_equal(evaluate(), ranks)
    assert said == []


def test_seen_items_are_masked_in_one_evaluation_and_not_in_the_other(tmp_path: Path) -> None:
    said: list[str] = []
    settings = EvaluationConfig(num_beams=4, ks=[50, 10, 1], mask_seen="both")
    split = shop()
    found = evaluation_stage(
        settings,
        split,
        ScoringRecommender("Random", make_scorer()),
        None,
        tmp_path,
        Console(said.append, progress=False),
    )
    assert said == [
        "Stage: evaluation of Random, seen items masked",
        "Stage: evaluation of Random",
    ]
    assert found.rules["Seen items"].startswith("not masked")
    assert {"R@1", "R@10", "R@50", "N@50"} <= set(found.metrics)
    for folder, expected in ((tmp_path, True), (tmp_path / MASKED, False)):
        items = np.load(folder / "items.npy")
        past = [set(split.train_sequences.row(user)) for user in np.load(folder / "users.npy")]
        seen = any(not past[row].isdisjoint(items[row]) for row in range(len(items)))
        assert seen is expected


def test_values_of_the_targets_are_kept(tmp_path: Path) -> None:
    config = RunConfig.from_dict({"output_dir": "out", "evaluation": {"value_weighted": True}})
    values = target_values(config, shop())
    assert values is not None
    assert set(values.tolist()) == {1.0, 10.0}  # clicks and purchases
    console = Console(lambda _: None, progress=False)
    given = (config.evaluation, shop(), ScoringRecommender("Random", make_scorer()), None)
    made = evaluation_stage(*given, tmp_path, console, values)
    read = evaluation_stage(*given, tmp_path, console, values)
    for found in (made, read):
        assert found.values is not None
        assert np.array_equal(found.values, values)
        assert 0 < found.metrics["V@10"] < 1
    assert target_values(RunConfig.from_dict({"output_dir": "out"}), shop()) is None


def test_values_need_behaviours() -> None:
    config = RunConfig.from_dict({"output_dir": "out", "evaluation": {"value_weighted": True}})
    without = replace(shop().dataset, behaviours=None, behaviour_names=[])
    with pytest.raises(ConfigError, match=r"evaluation.value_weighted needs behaviours or stars"):
        target_values(config, LeaveOneOut(without))


def test_cpu_seconds_of_several_models_are_added(tmp_path: Path) -> None:
    assert collaborative_cpu_seconds(tmp_path) is None
    for fold, facts in enumerate(({"cpu_seconds": 2.5}, {"cpu_seconds": 4.0})):
        files.write_json(tmp_path / f"fold_{fold}" / "sasrec_training.json", facts)
    assert collaborative_cpu_seconds(tmp_path) == 6.5
    files.write_json(tmp_path / "fold_2" / "sasrec_training.json", {})  # of an earlier version
    assert collaborative_cpu_seconds(tmp_path) is None


def test_a_training_whose_model_was_damaged_is_not_done(tmp_path: Path) -> None:
    said: list[str] = []
    console = Console(said.append, progress=False)
    make_model().save_pretrained(tmp_path / "model")
    files.write_json(tmp_path / "log_history.json", [])
    write_manifest(tmp_path, ["log_history.json"])
    mark_done(tmp_path, {"steps": 1})
    assert is_done(tmp_path, console, "log_history.json", model=True)
    (tmp_path / "model" / "heads.safetensors").write_bytes(b"")
    assert not is_done(tmp_path, console, "log_history.json", model=True)
    assert "in model heads.safetensors has 0 bytes" in said[0]


@pytest.mark.parametrize(
    ("settings", "loader"),
    [
        ({"kind": "average", "models": 2}, AverageModel),
        ({"kind": "cross_fitted", "folds": 2}, CrossFitted),
    ],
)
def test_several_collaborative_models_are_trained_as_one_and_read_again(
    settings: dict[str, object], loader: type[AverageModel], tmp_path: Path
) -> None:
    values = {"epochs": 1, "batch_size": 64, **settings}
    config = RunConfig.from_dict({"output_dir": "x", "collaborative": values})
    assert isinstance(config.collaborative, CollaborativeConfig)
    references = [*cells_of_run(config)[0].evaluations]
    assert references == [f"SASRec {settings['kind']}".replace("_", "-"), "Popularity"]
    assert cells_of_run(config)[0].made_from()["sasrec"]["collaborative"]["kind"] == values["kind"]

    def stage() -> AverageModel:
        console = Console(lambda text: None, progress=False)
        made = collaborative_stage(config.collaborative, shop(), tmp_path, 7, console)
        assert isinstance(made, loader)
        return made

    trained = stage()
    past = torch.tensor([[3, 1, 2], [5, -1, -1]])
    one, two = (model.score(past) for model in trained.models)
    assert not torch.allclose(one, two)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    for again in (stage(), loader.load(tmp_path)):
        assert torch.equal(again.score(past), trained.score(past))
    models = {path: time for path, time in written.items() if path.parent != tmp_path}
    assert len(models) == 2
    assert all(path.stat().st_mtime_ns == time for path, time in models.items())  # none anew
    assert trained.item_embeddings.shape == (shop().num_items, 2 * 64)
