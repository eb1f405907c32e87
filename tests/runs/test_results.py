"""Reading an experiment's folder: complete, partial and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.experiment_folder import BASELINE, FULL, METHODS, USERS, write_experiment

from gflowgr.errors import DataError
from gflowgr.runs.results import read_results
from gflowgr.runs.stages import MASKED, SUMMED
from gflowgr.runs.summary import summarise

CELL = Path("Shop/seed_42/tiger/s-dpo")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return write_experiment(tmp_path / "out", seeds=(42, 43))


def test_every_cell_is_read(out: Path) -> None:
    results = read_results(out)
    assert (results.name, results.baseline, results.seeds) == ("made_up", BASELINE, [42, 43])
    assert results.missing == []
    # Reference rows, the start, the methods.
    assert len(results.cells) == 2 * (2 + 1 + len(METHODS))
    cell = results.seeds_of("Shop", "tiger", FULL)[43]
    assert (cell.identifiers, cell.method.group, cell.memory_kind) == ("tiger", "main", "resident")
    assert cell.users.shape == cell.ranks.shape == (USERS,)
    assert set(cell.also) == {MASKED, SUMMED}
    assert cell.also[MASKED].metrics["R@10"] > cell.metrics["R@10"]
    assert (cell.training["steps"], cell.logs[0]["step"]) == (200, 10)
    assert cell.analysis.diversity["code_entropy/2"] == 2.0
    assert [part.name for part in next(iter(cell.analysis.breakdown.values()))] == ["tail", "head"]
    assert len(cell.analysis.log_p) == 300
    reference = results.seeds_of("Shop", "tiger", "SASRec")[42]
    assert reference.identifiers is None
    assert (reference.training, reference.analysis.pearson) == ({"cpu_seconds": 9.0}, None)


def test_what_is_not_complete_is_missing(out: Path) -> None:
    (out / CELL / "evaluation" / "analysis.json").unlink()
    (out / "Shop/seed_43/collaborative/evaluation/sasrec/analysis.json").unlink()
    results = read_results(out)
    expected = ["Shop, seed 43, SASRec", "Shop, tiger, seed 42, S-DPO"]
    assert sorted(map(str, results.missing)) == expected
    assert list(results.seeds_of("Shop", "tiger", "S-DPO")) == [43]


def test_a_seed_that_one_method_lacks_is_left_out_of_both(out: Path) -> None:
    (out / "Shop/seed_43/tiger/sft_continued/evaluation/analysis.json").unlink()
    results = read_results(out)
    (setting,) = summarise(results)
    row = next(row for row in setting.rows if row.method == FULL)
    assert row.seeds == [42, 43]
    assert row.to_baseline is not None
    assert row.to_baseline.seeds == [42]
    ours, other = (results.seeds_of("Shop", "tiger", name)[42] for name in (FULL, BASELINE))
    expected = ours.metrics["N@10"] - other.metrics["N@10"]
    assert row.to_baseline.metrics["N@10"].mean == pytest.approx(expected)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (CELL / "done.json", "{", "not valid JSON"),
        (CELL / "log_history.json", '{"a": 1}', "must be an array"),
        (CELL / "evaluation/ranks.npy", "no array", "damaged"),
        (CELL / "evaluation/done.json", '{"metrics": {}, "rules": {}}', "must have R@10 and N@10"),
        (CELL / "evaluation/analysis.json", '{"breakdown": {"x": [{}]}}', "not an analysis"),
        (Path("experiment.json"), '{"name": "x"}', "not an experiment"),
    ],
)
def test_damaged_files_are_named(out: Path, file: Path, content: str, message: str) -> None:
    (out / file).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        read_results(out)
    assert str(out / file) in str(error.value)


def test_a_complete_cell_without_its_arrays_is_damaged(out: Path) -> None:
    (out / CELL / "evaluation" / "ranks.npy").unlink()
    with pytest.raises(DataError, match=r"ranks\.npy: missing, though the cell is marked"):
        read_results(out)


def test_metrics_must_be_those_of_the_ranks(out: Path) -> None:
    path = out / CELL / "evaluation" / "ranks.npy"
    np.save(path, np.full(USERS, -1))
    with pytest.raises(DataError, match=r"R@5 is 0\.\d+, but ranks\.npy says 0\.000000"):
        read_results(out)
    np.save(path, np.full(USERS, 10))
    with pytest.raises(DataError, match="10 is no place of 10, nor -1"):
        read_results(out)


def test_methods_must_have_the_same_users_and_rules(out: Path) -> None:
    path = out / CELL / "evaluation" / "done.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"rules": facts["rules"] | {"Seen items": "masked"}}))
    with pytest.raises(DataError, match=r"S-DPO.*differ from.*Seen items"):
        summarise(read_results(out))
    path.write_text(json.dumps(facts))
    np.save(out / CELL / "evaluation" / "users.npy", np.arange(1, USERS + 1))
    with pytest.raises(DataError, match=r"users\.npy of .*S-DPO"):
        summarise(read_results(out))


def test_no_experiment(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"experiment\.json: missing"):
        read_results(tmp_path)
