"""Cells are done once each, in order, by several processes, and a failure stops only what needs it.

A small program stands in for the cells' own; :mod:`test_experiment_run` runs those.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.tiny_experiment import tiny_experiment

from gflowgr.runs import (
    ConfigError,
    ExperimentSpec,
    Outcome,
    Resources,
    cell_states,
    cells_of,
    run_experiment,
    runner,
    select_cells,
)
from gflowgr.runs.cells import alone, locked

pytestmark = pytest.mark.process

_STAND_IN = """
import fcntl, json, os, sys, time
from pathlib import Path

job = json.load(sys.stdin)
out, cell = Path(job["out"]), job["cell"]["id"]
lock = open(out / ".locks" / cell.replace("/", "__"), "a")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(75)
part = "evaluation/popularity" if cell.endswith("collaborative") else "evaluation"
last = out / cell / part / "analysis.json"
if last.is_file():
    sys.exit(0)
with open(out / "order.txt", "a") as file:
    file.write(f"{cell} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')} {job['threads']}\\n")
if cell in os.environ.get("FAILING", "").split():
    raise ArithmeticError("the loss is nan")
if cell in os.environ.get("DYING", "").split():
    os.kill(os.getpid(), 9)
time.sleep(0.05)
last.parent.mkdir(parents=True)
last.write_text("{}")
"""


@pytest.fixture(autouse=True)
def _stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "stand_in.py"
    program.write_text(_STAND_IN)
    monkeypatch.setattr(runner, "_WORK", (sys.executable, str(program)))
    monkeypatch.setattr(runner, "_POLL_SECONDS", 0.01)


def two_seeds() -> ExperimentSpec:
    return ExperimentSpec.from_dict(tiny_experiment() | {"seeds": [1, 2]})


def carry_out(out: Path, workers: int = 2, **options: Any) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    resources = options.pop("resources", Resources(workers, threads=1))
    outcome = run_experiment(
        two_seeds(), out, resources, say=said.append, progress=False, **options
    )
    return outcome, said


def order(out: Path) -> list[str]:
    return [line.split()[0] for line in (out / "order.txt").read_text().splitlines()]


@pytest.mark.parametrize("workers", [1, 3])
def test_every_cell_is_done_once_and_after_those_it_needs(tmp_path: Path, workers: int) -> None:
    outcome, said = carry_out(tmp_path / "out", workers)
    cells = {cell.id: cell for cell in cells_of(two_seeds())}
    worked = order(tmp_path / "out")
    assert sorted(worked) == sorted(cells) == sorted(outcome.done)
    for place, id_ in enumerate(worked):
        assert set(cells[id_].needs) <= set(worked[:place]), id_
    assert len(said) == len(cells)
    assert outcome.message == ""


def test_the_same_call_again_does_nothing(tmp_path: Path) -> None:
    carry_out(tmp_path / "out")
    outcome, _ = carry_out(tmp_path / "out")
    assert outcome.done == []
    assert len(order(tmp_path / "out")) == len(cells_of(two_seeds()))


def test_two_callers_in_one_folder_divide_the_cells(tmp_path: Path) -> None:
    out, outcomes = tmp_path / "out", list[Outcome]()
    callers = [
        threading.Thread(target=lambda: outcomes.append(carry_out(out)[0])) for _ in range(2)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sorted(order(out)) == sorted(cell.id for cell in cells_of(two_seeds()))
    assert len(outcomes) == 2, "both returned"
    assert set(outcomes[0].done) | set(outcomes[1].done) == set(order(out))


def test_a_failure_leaves_only_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILING", "shop/seed_1/default/sft")
    outcome, said = carry_out(tmp_path / "out")
    assert list(outcome.failed) == ["shop/seed_1/default/sft"]
    assert outcome.left == [
        "shop/seed_1/default/sft_continued",
        "shop/seed_1/default/gflowgr_tb",
    ]
    assert sum(id_.startswith("shop/seed_2") for id_ in outcome.done) == 4
    assert "shop/seed_1/default/sft: FAILED: ArithmeticError: the loss is nan" in said
    assert "1 cells failed" in outcome.message
    assert "2 cells need them and were left" in outcome.message
    # The next call tries again.
    monkeypatch.delenv("FAILING")
    outcome, _ = carry_out(tmp_path / "out")
    assert len(outcome.done) == 3


def test_a_killed_cell_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYING", "shop/seed_2/default/gflowgr_tb")
    _, said = carry_out(tmp_path / "out")
    assert "shop/seed_2/default/gflowgr_tb: FAILED: killed by SIGKILL" in said


def test_only_what_matches_and_what_it_needs(tmp_path: Path) -> None:
    outcome, _ = carry_out(tmp_path / "out", only="*/seed_2/*/gflowgr_tb")
    assert outcome.done == [
        "shop/seed_2/collaborative",
        "shop/seed_2/default/sft",
        "shop/seed_2/default/gflowgr_tb",
    ]
    with pytest.raises(ConfigError, match=r"--only 'Beauty/\*' matches no cell, such as 'shop/"):
        select_cells(two_seeds(), "Beauty/*")


def test_workers_get_gpus_and_threads(tmp_path: Path) -> None:
    carry_out(tmp_path / "out", resources=Resources(workers=3, threads=4, gpus=("5", "7")))
    lines = [line.split()[1:] for line in (tmp_path / "out" / "order.txt").read_text().splitlines()]
    assert {gpu for gpu, _ in lines} == {"5", "7"}
    assert {threads for _, threads in lines} == {"4"}


@pytest.mark.parametrize("name", ["workers", "threads"])
def test_no_worker_or_thread_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be >= 1; got 0"):
        Resources.of_machine(**{name: 0})


def test_states_tell_what_is_done_running_and_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    carry_out(out, only="*/seed_1/*")
    cells = cells_of(two_seeds())
    holder = (
        "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    with locked(cells[-1], out):
        pass  # makes the file
    lock = next((out / ".locks").glob("*seed_2*gflowgr_tb"))
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        states = cell_states(cells, out)
        process.communicate("")
    assert states["shop/seed_1/default/gflowgr_tb"] == "done"
    assert states["shop/seed_2/default/gflowgr_tb"] == "running"
    assert states["shop/seed_2/default/sft"] == "to do"
    assert cell_states(cells, out)["shop/seed_2/default/gflowgr_tb"] == "to do"


def test_one_process_prepares_a_dataset_while_the_others_wait(tmp_path: Path) -> None:
    inside, seen = list[int](), list[int]()

    def prepare(who: int) -> None:
        with alone("shop", tmp_path):
            inside.append(who)
            time.sleep(0.02)
            seen.append(len(inside))
            inside.remove(who)

    threads = [threading.Thread(target=prepare, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1, 1, 1, 1]


def test_facts_for_the_report(tmp_path: Path) -> None:
    carry_out(tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "experiment.json").read_text())
    assert facts["datasets"] == {"shop": {"identifiers": ["default"]}}
    assert [method["slug"] for method in facts["methods"]] == ["sft_continued", "gflowgr_tb"]
    assert facts["seeds"] == [1, 2]
