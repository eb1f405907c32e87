"""Each cell is done once, in order, by several processes; a failure stops only what needs it.

A small program stands in for the cells' own; :mod:`test_experiment_run` runs those.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.tiny_experiment import tiny_experiment

from gflowgr.errors import OutputError
from gflowgr.runs import (
    ConfigError,
    ExperimentSpec,
    LocalPool,
    Outcome,
    Resources,
    cell_states,
    cells_of,
    pool,
    run_experiment,
    select_cells,
)
from gflowgr.runs.cell_process import end_with_caller
from gflowgr.runs.processes import alone, working_alone

pytestmark = pytest.mark.process

_STAND_IN = """
import json, os, sys, time
from pathlib import Path

job = json.loads(sys.stdin.readline())
out, cell = Path(job["out"]), job["cell"]["id"]
part = "evaluation/popularity" if cell.endswith("collaborative") else "evaluation"
last = out / cell / part / "analysis.json"
(out / cell).mkdir(parents=True, exist_ok=True)
with open(out / "order.txt", "a") as file:
    file.write(f"{cell} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')} {job['threads']}\\n")
if cell in os.environ.get("FAILING", "").split():
    raise ArithmeticError("the loss is nan")
if cell in os.environ.get("DYING", "").split():
    os.kill(os.getpid(), 9)
time.sleep(600 if cell in os.environ.get("SLOW", "").split() else 0.05)
last.parent.mkdir(parents=True, exist_ok=True)
last.write_text("{}")
"""


@pytest.fixture(autouse=True)
def _stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "stand_in.py"
    program.write_text(_STAND_IN)
    monkeypatch.setattr(pool, "_WORK", (sys.executable, str(program)))
    monkeypatch.setattr(pool, "_POLL_SECONDS", 0.01)


def two_seeds() -> ExperimentSpec:
    return ExperimentSpec.from_dict(tiny_experiment() | {"seeds": [1, 2]})


def carry_out(out: Path, workers: int = 2, **options: Any) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    resources = options.pop("resources", Resources(workers, threads=1))
    outcome = run_experiment(
        two_seeds(), out, LocalPool(resources), say=said.append, progress=False, **options
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


def test_a_second_caller_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ThreadPoolExecutor(1) as other, working_alone(out):
        second = other.submit(carry_out, out)
        with pytest.raises(OutputError, match="is working in this folder; wait for its end"):
            second.result(timeout=60)
    assert not (out / "order.txt").exists()
    assert len(carry_out(out)[0].done) == len(cells_of(two_seeds()))


def test_a_cell_ends_with_the_process_that_started_it() -> None:
    """However that ends: the pipe between them closes."""
    theirs, ours = os.pipe()
    cell = os.fork()
    if cell == 0:
        os.close(ours)
        end_with_caller(theirs)
        os._exit(0)
    assert os.waitpid(cell, os.WNOHANG) == (0, 0), "it works while the pipe is open"
    os.close(ours)
    assert os.WTERMSIG(os.waitpid(cell, 0)[1]) == signal.SIGTERM


def test_closing_the_iterator_ends_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C does; what had been done stays done."""
    first = cells_of(two_seeds())[0]
    monkeypatch.setenv("SLOW", first.id)
    local = LocalPool(Resources(1, threads=1))
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        if (tmp_path / "order.txt").is_file():
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(local.work([first], tmp_path, show))
    assert set(shown) == {first.id}
    assert time.monotonic() - began < 60, "it was not waited for"
    assert not first.is_complete(tmp_path)


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


def test_states_tell_what_is_done_begun_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cells = tmp_path / "out", cells_of(two_seeds())
    monkeypatch.setenv("FAILING", "shop/seed_2/default/sft")
    carry_out(out)
    states = cell_states(cells, out)
    assert states["shop/seed_1/default/gflowgr_tb"] == "done"
    assert states["shop/seed_2/default/sft"] == "begun"
    assert states["shop/seed_2/default/gflowgr_tb"] == "to do"


def test_one_process_prepares_a_dataset_while_the_others_wait(tmp_path: Path) -> None:
    inside, seen = list[int](), list[int]()

    def prepare(who: int) -> None:
        with alone(tmp_path / "shop"):
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
