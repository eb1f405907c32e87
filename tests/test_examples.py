"""The examples do what their comments say, and the package reads what they write."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gflowgr import backends
from gflowgr.cli import command_line as cli
from gflowgr.runs import RunConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGURATIONS = sorted(EXAMPLES.glob("*.yaml"))


def commands(path: Path) -> list[list[str]]:
    """Words of the ``gflowgr`` commands in a file, after the program's name."""
    text = re.sub(r"\\\n[# ]*", " ", path.read_text())
    start = r"^[# ]*(?:\w+=\S+ +)*(?:exec \S+/bin/)?"
    lines = re.findall(start + r"gflowgr\"? +(.*)$", text, flags=re.MULTILINE)
    return [shlex.split(line.replace('"$@"', "")) for line in lines]


def test_the_losses_in_a_loop_of_ones_own_reach_the_rewards(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The script itself, with fewer users and items, so that a few seconds are enough."""
    script = runpy.run_path(str(EXAMPLES / "custom_trainer.py"))
    script["main"].__globals__.update(USERS=2, ITEMS=32)
    script["main"](steps=400)
    printed = capsys.readouterr().out
    steps = re.findall(r"^step +(\d+)  loss +(\S+)  distance (\S+)$", printed, re.MULTILINE)
    assert [int(step) for step, _, _ in steps] == [100, 200, 300, 400]
    losses, left = ([float(row[column]) for row in steps] for column in (1, 2))
    assert losses[-1] < losses[0] / 10
    assert all(later < earlier for earlier, later in pairwise(left))
    assert left[-1] < 0.25


def run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """What the script prints. In this process, whose imports are paid for."""
    path = EXAMPLES / name
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out


def test_the_losses_in_a_plain_trainer_fall(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("hf_trainer.py", monkeypatch, capsys)
    losses = [float(loss) for loss in out.rpartition("losses")[2].split()]
    assert len(losses) == 3
    assert losses[-1] < 0.1 * losses[0]


def test_search_generate_and_exact_scores_agree_and_nothing_barred_comes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("constrained_generation.py", monkeypatch, capsys)
    found = {line[:15].strip(): ast.literal_eval(line[15:].strip()) for line in out.splitlines()}
    best, rest, later = (found[name] for name in ("best items", "without these", "after removal"))
    assert found["by generate"] == best
    assert found["the best, exact"] == [row[0] for row in best]
    sold_out = best[0][2]
    for before, after in zip(best, rest, strict=True):
        assert not {*before[:2], sold_out} & {*after}
    removed = {row[0] for row in best}
    assert not removed & {item for row in later for item in row}


def test_the_method_in_python_trains_and_evaluates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("train_and_evaluate.py", monkeypatch, capsys, "1", "4")
    rows = re.findall(r"^(SFT|GFlowGR-TB) .*R@10 ([0-9.]+).*num_users 100", out, re.MULTILINE)
    assert [name for name, _ in rows] == ["SFT", "GFlowGR-TB"]


def test_an_op_is_timed_on_each_backend_after_it_was_found_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("time_an_op.py", monkeypatch, capsys, "2", "64")
    assert [line.split()[0] for line in out.splitlines()] == list(backends.BACKENDS)
    assert re.search(r"^torch +[0-9.]+ ms   relative error", out, re.MULTILINE)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.name)
def test_a_configuration_is_read_as_it_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GFLOWGR_DATA", "GFLOWGR_MODEL"):
        monkeypatch.setenv(name, f"/the/{name}")
    written = yaml.safe_load(re.sub(r"\$\{(\w+)\}", r"/the/\1", path.read_text()))
    config = RunConfig.load(path)
    assert path.stem in config.output_dir  # two examples never share a folder

    def compare(given: Mapping[str, Any], read: Mapping[str, Any], where: str) -> None:
        for key, value in given.items():
            if isinstance(value, Mapping):
                compare(value, read[key], f"{where}.{key}")
            else:
                assert read[key] == value, f"{where}.{key}"

    compare(written, config.to_dict(), path.name)


@pytest.mark.parametrize(
    "path", [*CONFIGURATIONS, EXAMPLES / "quickstart.sh"], ids=lambda path: path.name
)
def test_the_commands_that_an_example_gives_are_understood(path: Path) -> None:
    found = commands(path)
    assert found  # every example says how it is run
    for words in found:
        args = cli._parser().parse_args(words)
        if path.suffix == ".yaml":
            assert Path(args.config).name == path.name


def test_optuna_chooses_by_validation_and_trains_what_is_shared_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna", reason="needs optuna, which no extra of the package installs")
    from support.tiny_run import tiny_run, write_config

    values = tiny_run("unused")
    values["collaborative"]["epochs"] = 1
    for stage in ("sft", "finetune"):
        values[stage] |= {"max_steps": 2, "eval_steps": 2, "save_steps": 2}
    config = write_config(tmp_path / "run.yaml", values)
    script = runpy.run_path(str(EXAMPLES / "tune_with_optuna.py"))
    study = script["main"](["--config", str(config), "--out", str(tmp_path / "o"), "--trials", "2"])
    done = [tmp_path / "o" / f"trial_{n}" / "sft" / "done.json" for n in range(2)]
    assert done[0].read_bytes() == done[1].read_bytes()  # with its seconds: copied, not repeated
    assert len(study.trials) == 2
    assert study.best_value == max(trial.value for trial in study.trials)
    assert "valid N@10" in capsys.readouterr().out
