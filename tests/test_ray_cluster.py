"""A cluster of two nodes gives the results and answers of one process, whatever is killed."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pytest
import yaml
from pyarrow import parquet
from support.forked_cells import forked_cells  # noqa: F401  # a fixture
from support.served_shop import serve, write_folders
from support.tiny_experiment import tiny_experiment

from gflowgr.cli import main
from gflowgr.files import read_json
from gflowgr.ray_cluster import caller_facts, take_over
from gflowgr.runs import ExperimentSpec, cells_of, run_experiment
from gflowgr.serving.requests import Recommend

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install ".[ray]"')
if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

# On a busy machine the start of a process of Ray takes half a minute.
pytestmark = [pytest.mark.process, pytest.mark.timeout(600)]

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of one node, which the test's process is connected to."""
    from ray.cluster_utils import Cluster

    # Ray's processes read both when they start; by default its workers give way to all others.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    made = Cluster(initialize_head=True, head_node_args=NODE)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


def add_node(cluster: Cluster) -> None:
    """A second node, if there is none yet."""
    if len(cluster.worker_nodes) == 0:
        cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    assert ray.cluster_resources()["CPU"] == 2


@contextmanager
def killing(name: str, once_there: Path) -> Iterator[list[int]]:
    """Kill a process of the Ray task or actor of that name as soon as a file is there.

    Yields a list, which gets its id.
    """
    over, killed = threading.Event(), list[int]()

    def watch() -> None:
        while not over.wait(0.005):
            if once_there.exists():
                killed.extend(_pids(f"ray::{name}")[:1])
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def _pids(title: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue  # it has ended
        if text.startswith(title):
            found.append(int(path.parent.name))
    return found


# ---- experiments ----


def metrics(out: Path) -> dict[str, dict[str, float]]:
    """Of all evaluations, by their folder."""
    found = {
        str(path.parent.relative_to(out)): read_json(path)["metrics"]
        for path in out.rglob("evaluation/**/done.json")
    }
    assert len(found) == 5
    return found


@pytest.mark.usefixtures("forked_cells")
def test_results_are_those_of_one_machine_though_cells_are_killed_and_nodes_come(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gflowgr.runs.ray_pool import RayPool

    written = tmp_path / "tiny.yaml"
    written.write_text(yaml.safe_dump(tiny_experiment()))
    options = ["--no-progress", "--threads", "1"]
    here, there = tmp_path / "here", tmp_path / "there"
    assert main(["experiment", str(written), "--out", str(here), *options]) == 0
    # On one node, until the first cell is done.
    monkeypatch.chdir(tmp_path)

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(
            ExperimentSpec.load(str(written)),
            there,
            RayPool(cluster.address),
            say=interrupt,
            progress=False,
        )
    first, start, *_ = cells_of(ExperimentSpec.load(str(written)))
    assert first.is_complete(there)
    assert not start.is_complete(there)
    before = {path: path.stat().st_mtime_ns for path in (there / first.id).rglob("*")}
    # On two nodes; the start's process is killed after its first checkpoint.
    add_node(cluster)
    with killing(start.id, there / start.id / "checkpoints" / "checkpoint-4") as killed:
        ray_options = ["--ray", cluster.address, *options]
        assert main(["experiment", str(written), "--out", str(there), *ray_options]) == 0
    assert killed
    assert "resuming from checkpoint-4" in (there / start.id / "log.txt").read_text()
    assert {path: path.stat().st_mtime_ns for path in (there / first.id).rglob("*")} == before
    expected = metrics(here)
    assert metrics(there) == {name: pytest.approx(values) for name, values in expected.items()}


def test_a_folder_that_is_not_shared_fails_one_cell_and_no_other_begins(
    cluster: Cluster, tmp_path: Path
) -> None:
    from gflowgr.runs.ray_pool import RayPool

    cells = cells_of(ExperimentSpec.from_dict(tiny_experiment()))
    (end,) = RayPool(cluster.address).work(cells, tmp_path / "elsewhere", lambda _: None)
    assert end.cell.id == cells[0].id
    assert end.why is not None
    assert end.why.startswith("FileNotFoundError: ")
    assert "must be a folder that all machines of the cluster share; got none" in end.why


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "1"], "--gpus must come with --ray; got --gpus 1 without it"),
        (["--ray", "auto", "--workers", "2"], "--workers must be left out with --ray"),
        (["--ray", "auto", "--threads", "0"], "threads must be >= 1; got 0"),
        (["--ray", "auto", "--gpus", "-1"], "gpus must be >= 0 and finite; got -1"),
    ],
)
def test_wrong_usage(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["experiment", "smoke", "--out", str(out), *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


# ---- answers ----


def test_answers_are_those_of_one_process_though_an_actor_is_killed(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_node(cluster)
    folders, source = write_folders(tmp_path / "shop"), tmp_path / "users.parquet"
    parquet.write_table(pyarrow.table({"user": [str(user) for user in range(60)]}), source)
    asked = ["recommend", folders["model0"], "--data", folders["data"], "--input", str(source)]
    asked += ["--shard-rows", "1", "--with-scores"]
    here, there = tmp_path / "here", tmp_path / "there"
    assert main([*asked, "--output", f"{here}/", "--no-progress"]) == 0
    asked += ["--output", f"{there}/", "--ray", cluster.address]
    with killing("MapWorker", there / "users-00000.parquet") as killed:
        assert main(asked) == 0
    assert killed
    assert "60 users in " in capsys.readouterr().err
    expected = parquet.read_table(here).to_pylist()
    for found, wanted in zip(parquet.read_table(there).to_pylist(), expected, strict=True):
        assert found.pop("scores") == pytest.approx(wanted.pop("scores"), rel=1e-5)
        assert found == wanted
    # A bad row is said as by one process.
    parquet.write_table(pyarrow.table({"user": ["nobody"]}), source)
    asked[asked.index(f"{there}/")] = f"{tmp_path / 'bad'}/"
    assert main(asked) == 2
    assert f"{source}: row 1: user 'nobody' is not in" in capsys.readouterr().err


def test_a_server_on_a_cluster_answers_and_is_the_only_one_there(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    httpx = pytest.importorskip("httpx", reason='httpx is not installed: pip install ".[dev]"')
    add_node(cluster)
    folders = write_folders(tmp_path / "shop")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    asked = ["serve", folders["model0"], "--data", folders["data"], "--state", str(tmp_path)]
    asked += ["--beams", "8", "--ray", cluster.address, "--port"]
    found: list[Any] = []

    def ask_and_end() -> None:
        address = f"http://127.0.0.1:{port}/recommend"
        found.append(httpx.post(address, json={"user": "17"}, trust_env=False, timeout=60).json())
        found.append(main([*asked, "1024", "--replicas", "1"]))

    monkeypatch.setattr("gflowgr.serving.replicas.wait_for_the_end", ask_and_end)
    assert main([*asked, str(port), "--replicas", "3"]) == 2
    assert "3 replicas must find 1 CPUs and 0 GPUs each; Ray has 2 CPUs" in capsys.readouterr().err
    assert main([*asked, str(port), "--replicas", "1"]) == 0
    assert found == [*serve(folders, tmp_path).answer([Recommend(user="17")]), 2]
    assert "a cluster without Ray Serve; it runs there already" in capsys.readouterr().err


# ---- usage ----


def test_without_ray_its_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["experiment", "smoke", "--out", str(tmp_path), "--ray", "auto"]) == 2
    assert 'this needs pip install "gflowgr[ray]" (ray is not installed)' in capsys.readouterr().err


def test_processes_of_the_cluster_take_over_variables_and_must_have_the_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GFLOWGR_BACKEND", "torch")
    monkeypatch.setenv("SECRET", "x")
    facts: dict[str, Any] = caller_facts()
    assert "SECRET" not in facts
    monkeypatch.delenv("GFLOWGR_BACKEND")
    take_over(facts)
    assert os.environ["GFLOWGR_BACKEND"] == "torch"
    with pytest.raises(RuntimeError, match=r"must be of version 0\.0\.1, as it is where"):
        take_over(facts | {"version": "0.0.1"})
