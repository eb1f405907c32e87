"""A whole experiment by its command: two methods from one start, evaluated, reported, resumed."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.tiny_experiment import tiny_experiment

from gflowgr.cli import main
from gflowgr.files import read_json, write_json
from gflowgr.models import GFlowModel
from gflowgr.runs import ConfigError, ExperimentSpec, cells_of
from gflowgr.runs.stages import Console
from gflowgr.runs.work import prepare_inputs

pytestmark = pytest.mark.process

METHODS = ("sft", "sft_continued", "gflowgr_tb")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment's file."""
    path = tmp_path_factory.mktemp("experiment") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_experiment(evaluation={"summed": True})))
    return path


@pytest.fixture(scope="module")
def out(written: Path) -> Path:
    """Its folder after a run."""
    folder = written.parent / "out"
    command = ["experiment", str(written), "--out", str(folder), "--workers", "2", "--no-progress"]
    assert main(command) == 0
    return folder


def variant(out: Path) -> Path:
    return out / "shop" / "seed_1" / "default"


def test_every_row_is_evaluated_on_the_same_users(out: Path) -> None:
    folders = [variant(out) / method / "evaluation" for method in METHODS]
    folders += [out / "shop" / "seed_1" / "collaborative" / "evaluation" / "sasrec"]
    users = [np.load(folder / "users.npy") for folder in folders]
    assert all((users[0] == other).all() for other in users)
    for folder in folders:
        assert {"R@10", "N@10"} <= set(read_json(folder / "done.json")["metrics"])
        analysis = read_json(folder / "analysis.json")
        assert analysis["diversity"]["coverage"] > 0
        assert (analysis["calibration"] is None) == (folder.name == "sasrec")


def test_generators_also_answer_together_with_the_collaborative_model(out: Path) -> None:
    for method in METHODS:
        evaluation = variant(out) / method / "evaluation"
        alone, together = (
            np.load(place / "items.npy") for place in (evaluation, evaluation / "summed")
        )
        assert alone.shape == together.shape
        assert (alone != together).any()
    assert "generators together with SASRec" in (out / "report.md").read_text()


def test_methods_start_from_the_same_model_with_the_same_budget(out: Path) -> None:
    done = {method: read_json(variant(out) / method / "done.json") for method in METHODS}
    assert {facts["steps"] for facts in done.values()} == {12}
    for facts in done.values():
        assert facts["tokens"] > 0
        assert 0 < facts["train_seconds"] <= facts["seconds"]
        assert facts["peak_memory_bytes"] > 1e7
    start, *others = (
        GFlowModel.from_pretrained(variant(out) / method / "model").backbone.shared.weight
        for method in METHODS
    )
    # Twelve steps at most from where it began, and not from new weights.
    assert all(0 < torch.dist(start, other) < 0.8 * start.norm() for other in others)
    assert not list(out.rglob("checkpoints")), "the trainings' own files are gone"


def test_report_for_people_and_programs(out: Path) -> None:
    results = (out / "results.json").read_text()
    assert str(out) not in results
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} >= {"SFT", "SFT continued", "GFlowGR-TB", "SASRec"}
    found = read_json(variant(out) / "gflowgr_tb" / "evaluation" / "done.json")["metrics"]["R@10"]
    assert f"{found:.4f}" in (out / "report.md").read_text()
    assert "<html" in (out / "report.html").read_text()


def test_the_same_command_trains_nothing_again(
    out: Path, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert main(["experiment", str(written), "--out", str(out), "--no-progress"]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == models
    capsys.readouterr()
    assert main(["experiment", str(written), "--out", str(out), "--dry-run"]) == 0
    assert "4 done" in capsys.readouterr().out


def test_other_values_in_the_same_folder_are_refused(
    out: Path, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["experiment", str(written), "--out", str(out), "--set", "base.sft.max_steps=13"]
    assert main(command) == 2
    assert "sft.max_steps: 12 there, 13 here" in capsys.readouterr().err


def test_data_that_changed_since_are_refused(tmp_path: Path) -> None:
    spec = ExperimentSpec.from_dict(tiny_experiment())
    write_json(tmp_path / "shop" / "digests.json", {"data": "of what lay there before"})
    with pytest.raises(ConfigError, match="holds a run on other data"):
        prepare_inputs(cells_of(spec)[0], tmp_path, Console(lambda _: None, progress=False))


def test_shipped_experiments_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "beauty",
        "behaviours",
        "exact_flows",
        "exposure",
        "paper_ablation",
        "paper_grid",
        "paper_main",
        "quickstart",
        "small",
        "smoke",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "SPEC is missing"),
        (["smoke"], "--out is missing"),
        (["nonsense", "--out", "x"], "nonsense: No such file or directory; shipped: beauty,"),
        (["smoke", "--out", "x", "--workers", "0"], "workers must be >= 1; got 0"),
        (["smoke", "--out", "x", "--only", "moon"], "--only 'moon' matches no cell"),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["experiment", *arguments, "--no-progress"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
