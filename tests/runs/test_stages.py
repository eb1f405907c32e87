"""A stage's result that was damaged after its end is made again, and that is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.tiny_shop import make_model, make_scorer, shop

from gflowgr import files
from gflowgr.evaluation import ScoringRecommender
from gflowgr.folders import write_manifest
from gflowgr.runs.config import EvaluationConfig
from gflowgr.runs.stages import Console, evaluation_stage, is_done, mark_done


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
