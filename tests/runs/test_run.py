"""Whole runs: what they leave, and that interruptions and bad disks change nothing about it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.forked import kill_when
from support.tiny_run import METHODS, results, tiny_run, write_config

from gflowgr import files
from gflowgr.cli import main
from gflowgr.files import read_json
from gflowgr.runs import ConfigError, RunConfig, run
from gflowgr.training import GFlowGRTrainer

# The report of `finished_run` has its pictures.
pytestmark = pytest.mark.usefixtures("no_drawing")

TWO_STEPS = {"max_steps": 2, "eval_steps": 2, "save_steps": 2, "logging_steps": 1}


def train(config: Path) -> int:
    return main(["train", "--config", str(config), "--no-progress"])


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """(modification time, size) of every file that training and evaluation left."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for part in ("sasrec", "sft", "sft_continued", "gflowgr", "evaluation", "data")
        for path in sorted((folder / part).rglob("*"))
        if path.is_file()
    }


# ---- a run that went through ----


def test_results_and_report(finished_run: Path) -> None:
    record = read_json(finished_run / "results.json")
    assert list(record["methods"]) == METHODS
    for name, method in record["methods"].items():
        metrics = method["metrics"]
        assert {"R@5", "R@10", "N@5", "N@10", "coverage", "entropy", "utility@10"} <= set(metrics)
        assert metrics["num_users"] == 60, name
    for name in METHODS[:3]:
        training = record["methods"][name]["training"]
        assert training["steps"] == 12
        assert training["batch_size"] == 64
        assert 0.05 < training["seconds"] < 600
    assert record["config"]["seed"] == 1
    assert record["rules"]["Seen items"].startswith("not masked")

    report = (finished_run / "report.md").read_text()
    for method in METHODS:
        assert method in report
    assert "#" in report.split("had")[-1]  # titles of items, such as "Light blue kettle #3"
    plots = {path.name for path in finished_run.glob("*.png")}
    assert {"losses.png", "metrics.png", "log_z.png", "rewards.png"} <= plots
    assert all(f"({name})" in report for name in plots)
    assert not list(finished_run.rglob("checkpoints")), "the trainings' own files are gone"


def test_fine_tuning_starts_where_sft_ended(finished_run: Path) -> None:
    """And continued SFT gets the very same budget."""
    first = {}
    for stage in ("sft_continued", "gflowgr"):
        log = read_json(finished_run / stage / "log_history.json")
        first[stage] = next(entry["loss_gr"] for entry in log if "loss" in entry)
    sft = read_json(finished_run / "sft" / "log_history.json")
    start = next(entry["loss_gr"] for entry in sft if "loss" in entry)
    assert first["sft_continued"] < 0.95 * start
    assert first["gflowgr"] == pytest.approx(first["sft_continued"], rel=0.05)
    done = [read_json(finished_run / stage / "done.json") for stage in ("sft_continued", "gflowgr")]
    for name in ("steps", "batch_size", "learning_rate"):
        assert done[0][name] == done[1][name]


def test_same_command_again_redoes_nothing(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, metrics = contents(finished_run), results(finished_run)
    assert len(before) > 40
    monkeypatch.setattr(GFlowGRTrainer, "__init__", None)  # would fail if it trained again
    monkeypatch.setattr("gflowgr.runs.stages.evaluate", None)
    assert train(finished_run.parent / "run.yaml") == 0
    assert contents(finished_run) == before
    assert results(finished_run) == metrics
    printed = capsys.readouterr().out
    assert "Stage: SFT" not in printed
    assert "GFlowGR-TB" in printed


# ---- interruptions ----


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.process
def test_killed_run_ends_with_the_same_results(finished_run: Path, tmp_path: Path) -> None:
    """Killed while SASRec trains, and again while GFlowGR does; then left to finish."""
    folder = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", tiny_run(folder))

    def begin() -> None:
        train(config)

    log = tmp_path / "log"
    kill_when(lambda: any((folder / "sasrec").glob("*/checkpoint-*")), begin, log)
    assert not (folder / "sasrec" / "model.safetensors").exists()

    checkpoints = folder / "gflowgr" / "checkpoints"
    kill_when(lambda: any(checkpoints.glob("checkpoint-*/trainer_state.json")), begin, log)
    assert not (folder / "gflowgr" / "done.json").exists()
    assert not (folder / "results.json").exists()

    assert train(config) == 0
    assert results(folder) == results(finished_run)
    weights = "gflowgr/model/model.safetensors"
    assert (folder / weights).read_bytes() == (finished_run / weights).read_bytes()


def test_interrupted_between_the_last_step_and_the_end_of_a_stage(
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The stage is finished from its last checkpoint: nothing is trained twice."""
    folder = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", tiny_run(folder))
    save_model = GFlowGRTrainer.save_model

    def interrupted(self: Any, output_dir: Any = None, _internal_call: bool = False) -> None:
        if not _internal_call:  # not a checkpoint, but the stage's result
            raise KeyboardInterrupt
        save_model(self, output_dir, _internal_call)

    with monkeypatch.context() as patch:
        patch.setattr(GFlowGRTrainer, "save_model", interrupted)
        assert train(config) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert (folder / "sft" / "checkpoints" / "checkpoint-12").is_dir()
    assert not (folder / "sft" / "done.json").exists()

    with monkeypatch.context() as patch:
        patch.setattr(GFlowGRTrainer, "training_step", None)  # SFT must not train
        patch.setattr("gflowgr.runs.stages.mark_done", _stop_after_mark(folder / "sft"))
        assert train(config) == 130
    weights = "sft/model/model.safetensors"
    assert (folder / weights).read_bytes() == (finished_run / weights).read_bytes()


def _stop_after_mark(stage: Path) -> Callable[[Path, dict[str, Any]], None]:
    def mark(folder: Path, facts: dict[str, Any]) -> None:
        assert folder == stage
        assert facts["steps"] == 12
        raise KeyboardInterrupt

    return mark


# ---- disks ----


def test_full_disk_is_said_and_the_next_call_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full while SASRec trains, and again while GFlowGR does."""
    folder = tmp_path / "run"
    values = {**tiny_run(folder), "continued_sft": False}
    for section in ("sft", "finetune"):
        values[section] = {**values[section], **TWO_STEPS}
    config = write_config(tmp_path / "run.yaml", values)
    real_save = torch.save

    for stage in ("sasrec", "gflowgr"):

        def full(obj: Any, path: Any, *args: Any, place: Path = folder / stage, **kw: Any) -> None:
            if Path(path).is_relative_to(place) and Path(path).name == "optimizer.pt":
                Path(path).write_bytes(b"half of it")
                raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")
            real_save(obj, path, *args, **kw)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", full)
            assert train(config) == 2
        error = capsys.readouterr().err.splitlines()[-1]  # before it: bars of model files
        assert error.startswith("gflowgr: error: ")
        assert "cannot write the checkpoint" in error
        assert str(folder / stage) in error
        assert not list((folder / stage).rglob("checkpoint-*"))
        assert not (folder / "results.json").exists()
    assert train(config) == 0
    assert list(results(folder)) == ["SFT", "GFlowGR-TB", "SASRec", "Popularity"]


def test_read_only_output_folder_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_run(tmp_path / "run"))
    real_open = os.open

    def read_only(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_WRONLY and str(path).startswith(str(tmp_path / "run")):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real_open(path, flags, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "open", read_only)
        assert train(config) == 2
    error = capsys.readouterr().err
    assert "cannot write: the file system is read-only" in error
    assert str(tmp_path / "run") in error
    assert error.count("\n") == 1
    assert list((tmp_path / "run").iterdir()) == []


def test_output_folder_under_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("a file")
    assert train(write_config(tmp_path / "run.yaml", tiny_run(tmp_path / "taken" / "run"))) == 2
    assert "taken" in capsys.readouterr().err


# ---- configurations that do not fit ----


def test_folder_of_another_run_is_left_alone(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished_run)
    config = str(finished_run.parent / "run.yaml")
    assert main(["train", "--config", config, "--set", "seed=2", "--set", "flow.beta=0.5"]) == 2
    error = capsys.readouterr().err
    assert "holds a run of another configuration" in error
    assert "seed: 1 there, 2 here" in error
    assert "beta" in error
    assert contents(finished_run) == before


def test_fine_tuning_by_sft_alone_is_refused_before_any_work(tmp_path: Path) -> None:
    values = tiny_run(tmp_path / "run") | {"flow": {"objective": "sft"}}
    with pytest.raises(ConfigError, match="objective is 'sft': there is nothing to fine-tune"):
        run(RunConfig.from_dict(values))
    assert not (tmp_path / "run").exists()


def test_item_vectors_of_another_catalogue(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", np.ones((7, 3), np.float32))
    values = tiny_run(tmp_path / "run")
    values["collaborative"] = {"kind": "embeddings", "embeddings": str(tmp_path / "table.npy")}
    with pytest.raises(ConfigError, match=r"table\.npy has 7 rows, the data 200 items"):
        run(RunConfig.from_dict(values), say=lambda text: None, progress=False)


def test_run_with_given_item_vectors_and_another_objective(tmp_path: Path) -> None:
    """A table instead of SASRec, scalar log Z, softmax over children, identifiers by string."""
    np.save(tmp_path / "table.npy", np.random.default_rng(0).normal(size=(200, 4)))
    values = tiny_run(tmp_path / "run")
    values["collaborative"] = {"kind": "embeddings", "embeddings": str(tmp_path / "table.npy")}
    values["flow"] = {"partition": "scalar", "normalize": "children", "beta": 0.5}
    values["evaluation"] = {"collision": "string", "mask_seen": True, "max_users": 20}
    values["continued_sft"] = False
    for stage in ("sft", "finetune"):
        values[stage] = {**values[stage], **TWO_STEPS}
    lines: list[str] = []
    result = run(RunConfig.from_dict(values), say=lines.append, progress=False)
    names = [row.name for row in result.rows]
    assert names == ["SFT", "GFlowGR-TB", "Item embeddings", "Popularity"]
    for row in result.rows:
        assert row.evaluation.rules["Collisions"].startswith("string")
        assert row.evaluation.rules["Seen items"].startswith("masked")
    log = result.histories["GFlowGR-TB"]
    assert {"log_z", "difficulty/q50", "reward/r_yhat"} <= set(log[0])
    assert any("SFT" in line for line in lines)
