"""Replicas on Ray Serve: one catalogue, whoever answers, whoever dies; nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.command_line import Capture, call
from support.served_shop import free_identifiers, serve, write_folders

from benchmarks.harness.processes import descendants, listening

httpx = pytest.importorskip("httpx", reason='httpx is not installed: pip install ".[dev]"')
pytest.importorskip("fastapi", reason='fastapi is not installed: pip install ".[dev]"')

from gflowgr.serving.http_api import Metrics  # noqa: E402
from gflowgr.serving.replicas import Replicas, merged, with_honest_client  # noqa: E402
from gflowgr.serving.requests import Recommend  # noqa: E402
from gflowgr.serving.service import Service  # noqa: E402

# On a busy machine the start of a process of Ray takes half a minute.
pytestmark = [pytest.mark.process, pytest.mark.timeout(600)]

PATIENCE = 240.0
"""Seconds, on a machine that does much else."""


@dataclass
class Server:
    """A running ``gflowgr serve --replicas 2``."""

    process: subprocess.Popen[bytes]
    address: str
    folders: dict[str, str]
    state: Path
    log: Path

    def ask(self, path: str, body: Any = None, **options: Any) -> Any:
        """The answer of whichever replica, over a connection of its own."""
        method = options.pop("method", "GET" if body is None else "POST")
        found = httpx.request(
            method, self.address + path, json=body, timeout=60, trust_env=False, **options
        )
        assert found.status_code == 200, (found.status_code, found.text)
        return found.text if path == "/metrics" else found.json()

    def processes(self, name: str = "") -> list[int]:
        """Ids of what it has started; of the processes of Ray with this title alone."""
        return [pid for pid, title in descendants(self.process.pid).items() if name in title]

    def replicas(self) -> dict[str, float]:
        """How many requests each replica has answered, by its name."""
        values: dict[str, float] = {}
        for line in self.ask("/metrics").splitlines():
            if line.startswith('gflowgr_request_seconds_count{path="/recommend"'):
                name = line.split('replica="')[1].partition('"')[0]
                values[name] = values.get(name, 0.0) + float(line.rpartition(" ")[2])
        return values


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("ray", reason='Ray is not installed: pip install ".[ray]"')
    root = tmp_path_factory.mktemp("replicas")
    folders, log = write_folders(root), root / "log.txt"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gflowgr", "serve", folders["model0"]]
    command += ["--data", folders["data"], "--state", str(root / "state"), "--port", str(port)]
    command += ["--beams", "8", "--replicas", "2", "--threads", "1", "--beside", folders["model1"]]
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    with log.open("wb") as written:
        process = subprocess.Popen(command, stdout=written, stderr=written, env=environment)
    made = Server(process, f"http://127.0.0.1:{port}", folders, root / "state", log)
    try:
        end = time.monotonic() + PATIENCE
        while b"gflowgr: http://" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield made
    finally:
        process.terminate()
        process.wait(60)


def test_replicas_share_the_requests_and_answer_as_the_offline_search(server: Server) -> None:
    bodies = [{"history": [3, number], "k": 5, "with_scores": True} for number in range(40)]
    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(lambda body: server.ask("/recommend", body), bodies))
    offline = serve(server.folders, server.state)
    wanted = offline.answer(
        [Recommend(history=(3, number), k=5, with_scores=True) for number in range(40)]
    )
    for one, other in zip(found, wanted, strict=True):
        assert isinstance(other, dict)
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
        assert one["items"] == other["items"]
    beside = Service(
        server.folders["model1"], server.folders["data"], str(server.state), num_beams=8
    )
    (wanted_beside,) = beside.answer([Recommend(history=(3, 4), k=5)])
    assert server.ask("/recommend", {"history": [3, 4], "k": 5, "beside": True}) == wanted_beside
    counts = server.replicas()
    assert sum(counts.values()) == 41
    assert len(counts) == 2
    assert all(count > 0 for count in counts.values())
    memory = [line for line in server.ask("/metrics").splitlines() if line.startswith("process_re")]
    assert [float(line.rpartition(" ")[2]) > 1e7 for line in memory] == [True, True]


def test_no_process_listens_on_anything_but_loopback(server: Server) -> None:
    ours = descendants(server.process.pid) | {server.process.pid: "gflowgr"}
    assert sum("ray::ServeReplica" in title for title in ours.values()) == 2
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, also within IPv6
    found = {f"{pid} {title[:60]}": listening(pid) for pid, title in ours.items()}
    assert not {name: found[name] - loopback for name in found if found[name] - loopback}
    assert any(found.values())


def test_every_request_after_a_change_sees_it_whichever_replica_answers(server: Server) -> None:
    codes, before = free_identifiers()[:3], server.replicas()
    for number, identifier in enumerate(codes):
        made = server.ask("/items", {"id": f"new-{number}", "identifier": identifier})
        for _ in range(6):
            found = server.ask("/recommend", {"history": [], "available": [f"new-{number}"]})
            assert found == {"items": [f"new-{number}"], "version": made["version"]}
        hidden = server.ask(f"/items/new-{number}/availability", {"available": False}, method="PUT")
        for _ in range(6):
            found = server.ask("/recommend", {"history": [], "available": [f"new-{number}"]})
            assert found == {"items": [], "version": hidden["version"]}
    assert all(count > before[name] for name, count in server.replicas().items())
    server.ask("/items/5", method="DELETE", headers={"X-Forwarded-For": "203.0.113.9"})
    lines = (server.state / "changes.jsonl").read_text().splitlines()
    who = [json.loads(line)["by"] for line in lines]
    assert who == ["127.0.0.1"] * 6 + ["unknown (X-Forwarded-For: 203.0.113.9)"]
    assert b"catalogue changed: " in server.log.read_bytes()


def test_a_killed_replica_comes_back_with_the_whole_catalogue(server: Server) -> None:
    changed = server.ask("/items", {"id": "kept", "identifier": free_identifiers()[9]})["version"]
    old = set(server.replicas())
    os.kill(server.processes("ray::ServeReplica")[0], signal.SIGKILL)
    refused, end = 0, time.monotonic() + PATIENCE
    while True:
        try:
            found = server.ask("/recommend", {"history": [], "available": ["kept"]})
        except (httpx.HTTPError, AssertionError):
            refused += 1  # what the killed one was asked; whoever asked asks again
            continue
        assert found == {"items": ["kept"], "version": changed}
        names = server.replicas()
        if len(names) == 2 and set(names) != old:
            break
        assert time.monotonic() < end, server.log.read_text()
        time.sleep(0.3)
    assert refused <= 2
    # It was the new one, too, that has answered with what had been changed before it was there.
    (new,) = set(names) - old
    assert names[new] > 0


def test_the_end_of_the_command_leaves_no_process_behind(server: Server) -> None:
    started = descendants(server.process.pid)
    assert len(started) >= 6
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0, server.log.read_text()
    end = time.monotonic() + 20
    while time.monotonic() < end and any(Path(f"/proc/{pid}/exe").exists() for pid in started):
        time.sleep(0.1)
    left = [title for pid, title in started.items() if Path(f"/proc/{pid}/exe").exists()]
    assert left == []


# ---- without Ray ----


def test_counts_of_several_replicas_are_one_table_with_a_label() -> None:
    one, other = Metrics(), Metrics()
    one.batch.observe(3)
    other.batch.observe(5)
    other.batch.observe(5)
    families = merged([one.families({"replica": "a"}), other.families({"replica": "b"})])
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    counts = {
        sample.labels["replica"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == "gflowgr_batch_size_count"
    }
    assert counts == {"a": 1.0, "b": 2.0}
    assert all("replica" not in s.labels for f in one.registry.collect() for s in f.samples)


def test_an_address_that_a_header_claims_is_marked_as_such() -> None:
    scope = {"client": ("203.0.113.9", 0), "headers": [(b"host", b"x")]}
    assert with_honest_client(scope) is scope
    claimed = {**scope, "headers": [(b"x-forwarded-for", b"203.0.113.9")]}
    assert with_honest_client(claimed)["client"][0] == "unknown (X-Forwarded-For: 203.0.113.9)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--replicas", "0"), "--replicas must be at least 1; got 0"),
        (("--replicas", "2", "--threads", "0"), "--threads must be at least 1; got 0"),
        (("--ray", "auto", "--gpus", "-1"), "--gpus must be >= 0 and finite; got -1"),
        (("--threads", "2"), "--threads and --gpus must come with --replicas or --ray"),
    ],
)
def test_wrong_usage(options: tuple[str, ...], message: str, capsys: Capture) -> None:
    code, _, error = call(capsys, "serve", "model", "--data", "data", *options)
    assert code == 2
    assert message in error


@pytest.mark.parametrize("missing", ["ray", "ray.serve"])
def test_without_ray_serve_its_extras_are_named(
    missing: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "ray":
        monkeypatch.setitem(sys.modules, "ray", None)
    else:
        pytest.importorskip("ray", reason='Ray is not installed: pip install ".[ray]"')
        monkeypatch.setitem(sys.modules, "ray.serve", None)
    code, _, error = call(capsys, "serve", "model", "--data", "data", "--replicas", "2")
    assert code == 2
    assert "gflowgr[serve,ray]" in error
    assert missing in error


def test_demands_of_replicas() -> None:
    with pytest.raises(ValueError, match="--gpus must be >= 0 and finite; got inf"):
        Replicas(2, gpus=float("inf"))
