"""The HTTP interface, in this process: endpoints, limits, keys, errors, metrics, the page's data.

Needs the packages of the extra ``serve``, and httpx, which the extra ``dev`` has.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.command_line import Capture, call
from support.documentation import blocks, commands
from support.served_shop import free_identifiers, serve, write_folders
from support.tiny_shop import make_scorer, shop

for _package in ("fastapi", "prometheus_client", "httpx"):
    pytest.importorskip(_package, reason=f"{_package} is not installed (pip install -e '.[dev]')")

from fastapi.testclient import TestClient  # noqa: E402

from gflowgr.serving.http_api import MAX_BODY, MAX_HISTORY, ServerConfig, make_app  # noqa: E402
from gflowgr.serving.requests import Recommend  # noqa: E402
from gflowgr.serving.service import Service  # noqa: E402

KEY = "a key of 16 characters"
LOCAL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_folders(tmp_path_factory.mktemp("served"))


@pytest.fixture
def service(folders: dict[str, str], tmp_path: Path) -> Service:
    return serve(folders, tmp_path)


@pytest.fixture
def client(service: Service) -> TestClient:
    app = make_app(service, ServerConfig())
    return TestClient(app, base_url=LOCAL, raise_server_exceptions=False)


def test_requests_are_answered_as_the_service_answers(client: TestClient, service: Service) -> None:
    asked = {"history": [3, "14"], "k": 5, "with_scores": True, "with_titles": True}
    found = client.post("/recommend", json=asked)
    assert found.status_code == 200
    (wanted,) = service.answer(
        [Recommend(history=(3, 14), k=5, with_scores=True, with_titles=True)]
    )
    assert found.json() == wanted
    for user in ("17", 17):
        assert client.post("/recommend", json={"user": user}).json()["items"]
    health = client.get("/health").json()
    assert health == {"status": "ok", "version": 0, "items": 200}
    tree = client.post("/tree", json={"history": [3]}).json()
    assert tree["history"] == [{"id": 3, "title": shop().dataset.title(3)}]
    assert sum(each["probability"] for each in tree["beginnings"]) == pytest.approx(1, abs=1e-4)
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert set(client.get("/openapi.json").json()["paths"]) >= {"/recommend", "/items", "/model"}


def test_changes_are_answered_audited_and_kept(
    client: TestClient, folders: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gflowgr.serving")
    body = {"id": "a/b c", "identifier": free_identifiers()[0], "title": "A new thing"}
    assert client.post("/items", json=body).json() == {"version": 1}
    only = {"history": [], "available": ["a/b c", 5], "with_titles": True}
    assert "A new thing" in client.post("/recommend", json=only).json()["titles"]
    hidden = client.put("/items/a%2Fb%20c/availability", json={"available": False})
    assert hidden.json() == {"version": 2}
    assert client.post("/recommend", json=only).json()["items"] == [5]
    assert client.delete("/items/5").json() == {"version": 3}
    assert client.post("/model", json={"model": folders["model1"]}).json() == {"version": 4}
    assert client.post("/recommend", json=only).json()["items"] == []
    assert serve(folders, tmp_path).catalogue().version == 4
    for fields in ({}, {"identifier": [0], "vector": [0.5]}, {"vector": [0.5]}, {"text": "a pan"}):
        found = client.post("/items", json={"id": "x", **fields})
        assert (found.status_code, found.json()["detail"][0]["loc"][0]) == (422, "body")
    lines = [record.message for record in caplog.records if record.message.startswith("catalogue")]
    assert len(lines) == 4
    assert '"kind": "availability"' in lines[1]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"k": 0, "history": []}, "k"),
        ({"k": 201, "history": []}, "k"),
        ({"k": "5", "history": []}, "k"),
        ({"history": [3, 900]}, "history"),
        ({"history": [True]}, "history"),
        ({"history": 3}, "history"),
        ({"history": [3] * (MAX_HISTORY + 1)}, "history"),
        ({"user": "nobody\ud800"}, "user"),
        ({"history": [], "exclude": ["x"]}, "exclude"),
        ({"history": [], "available": ["x"]}, "available"),
        ({"history": [], "other": 1}, "other"),
        ({}, "history"),
    ],
)
def test_a_bad_request_names_its_field(
    body: dict[str, Any], field: str, client: TestClient
) -> None:
    found = client.post(
        "/recommend", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert found.status_code == 422
    (*_, each) = found.json()["detail"]
    assert each["loc"][:2] == ["body", field]
    assert each["msg"]


def test_what_is_no_request_is_refused_before_it_is_read(client: TestClient) -> None:
    large = client.post("/recommend", content=b"x" * (MAX_BODY + 1))
    assert large.status_code == 413
    streamed = client.post("/recommend", content=iter([b"{}"]))
    assert streamed.status_code == 411
    json_type = {"Content-Type": "application/json"}
    for text in (b"{", b"[" * 100_000, b"\xff", b'{"k": NaN}', b'{"\\ud800": 1}'):
        found = client.post("/recommend", content=text, headers=json_type)
        assert found.status_code in (400, 422), text
        assert "Traceback" not in found.text
    foreign = client.post("/recommend", json={"user": "1"}, headers={"Origin": "http://evil.test"})
    assert foreign.status_code == 403
    rebound = client.post("/recommend", json={"user": "1"}, headers={"Host": "evil.test"})
    assert rebound.status_code == 403
    for name, value in (("Origin", "http://[bad"), ("Host", "[bad")):
        found = client.post("/recommend", json={"user": "1"}, headers={name: value})
        assert found.status_code == 403, name
    own = client.post("/recommend", json={"user": "1"}, headers={"Origin": LOCAL})
    assert own.status_code == 200


def test_a_fault_of_the_model_shows_no_stack_trace(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise FloatingPointError("the model's scores are NaN, in /secret/place")

    monkeypatch.setattr("gflowgr.evaluation.generative.GenerativeRecommender.recommend", fail)
    found = client.post("/recommend", json={"user": "1"})
    assert (found.status_code, found.text) == (500, "Internal Server Error")
    assert client.get("/health").status_code == 200


def test_a_catalogue_that_cannot_be_read_is_unavailable(
    client: TestClient, service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "changes.jsonl").write_text('{"version": 7, "change": {}}\n')
    for found in (client.post("/recommend", json={"user": "1"}), client.get("/health")):
        assert found.status_code == 503
        assert found.json() == {"detail": "the catalogue's changes cannot be read; see the log"}
    assert "changes.jsonl: line 1: the version must follow" in caplog.text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"identifier": [0, 0, 0, 0], "vector": [1.0]}, "got identifier and vector"),
        ({"title": "x"}, "one of identifier, vector and text must be given; got none"),
        ({"vector": ["1", 2.0]}, "valid"),
        ({"vector": [True, 2.0]}, "valid"),
    ],
)
def test_an_item_comes_in_one_form(body: dict[str, Any], message: str, client: TestClient) -> None:
    found = client.post("/items", json={"id": "new", **body})
    assert found.status_code == 422
    assert message in found.text


def test_with_a_key_nothing_but_health_and_the_page_is_open(service: Service) -> None:
    config = ServerConfig(host="0.0.0.0", api_key=KEY)
    client = TestClient(make_app(service, config), base_url="http://shop.test")
    body = {"id": "new", "identifier": free_identifiers()[0]}
    for given in ({}, {"X-API-Key": "another"}, {"X-API-Key": "\xe9"}):
        raw = {name: value.encode("latin-1") for name, value in given.items()}
        for path in ("/recommend", "/tree", "/items", "/model"):
            assert client.post(path, json=body, headers=raw).status_code == 401
        assert client.delete("/items/5", headers=raw).status_code == 401
        change = {"available": False}
        assert client.put("/items/5/availability", json=change, headers=raw).status_code == 401
        assert client.get("/metrics", headers=raw).status_code == 401
    assert client.get("/health").json()["version"] == 0
    assert client.get("/").status_code == 200
    assert client.post("/items", json=body, headers={"X-API-Key": KEY}).json() == {"version": 1}


def test_metrics_are_there_for_prometheus(client: TestClient) -> None:
    client.post("/recommend", json={"user": "1"})
    client.post("/recommend", json={"user": "nobody"})
    client.get("/no/such/path")
    text = client.get("/metrics").text
    for line in (
        'gflowgr_request_seconds_count{path="/recommend",status="200"} 1.0',
        'gflowgr_request_seconds_count{path="/recommend",status="422"} 1.0',
        'gflowgr_request_seconds_count{path="other",status="404"} 1.0',
        "gflowgr_batch_size_count 2.0",
        "gflowgr_requests_waiting 0.0",
        "gflowgr_catalogue_version 0.0",
    ):
        assert line in text.splitlines()


def test_the_commands_of_the_documentation_are_answered(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch, folders: dict[str, str]
) -> None:
    """In their order; the folder of the other model is the only thing that differs here."""
    answered = 0
    for block in blocks("bash"):
        if block.page != "docs/serving.md":
            continue
        for line in commands(block.text):
            words = shlex.split(line)
            if words[0] != "curl":
                continue
            assert words[1] == "-s"
            method = words[words.index("-X") + 1] if "-X" in words else "POST"
            body = words[words.index("--json") + 1] if "--json" in words else None
            (path,) = [re.sub("^localhost:8000", "", w) for w in words if w.startswith("localhost")]
            if body is None and "-X" not in words:
                method = "GET"
            if path == "/model":
                assert json.loads(body or "")["model"].startswith("runs/")
                body = json.dumps({"model": folders["model1"]})
            found = client.request(
                method, path, content=body, headers={"Content-Type": "application/json"}
            )
            assert found.status_code == 200, (line, found.text)
            answered += 1
    assert answered >= 7


def test_the_command_answers_over_a_socket(
    folders: dict[str, str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    httpx = pytest.importorskip("httpx")
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found: list[Any] = []

    def run(app: Any, **options: Any) -> None:
        """In a thread, until its requests are answered."""
        server = uvicorn.Server(uvicorn.Config(app, **options))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        for path, beside in (("recommend", False), ("recommend", True), ("tree", False)):
            address, body = f"http://127.0.0.1:{port}/{path}", {"user": "17", "beside": beside}
            found.append(httpx.post(address, json=body, trust_env=False, timeout=60).json())
        server.should_exit = True
        thread.join()

    monkeypatch.setattr("uvicorn.run", run)
    make_scorer().save(tmp_path / "scorer")
    where = ("--data", folders["data"], "--state", tmp_path, "--port", port, "--beams", 8)
    more = ("--beside", folders["model1"], "--collaborative", tmp_path / "scorer")
    code, out, error = call(capsys, "serve", folders["model0"], *where, *more)
    assert code == 0, error
    assert out == f"gflowgr: http://127.0.0.1:{port}/ (page: /, interface: /docs)\n"
    alone = [serve(folders, tmp_path), serve({**folders, "model0": folders["model1"]}, tmp_path)]
    assert found[:2] == [each.answer([Recommend(user="17")])[0] for each in alone]
    target = sum(each["target"] for each in found[2]["beginnings"])
    assert target == pytest.approx(1, abs=1e-4)  # its temperature was chosen by validation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "0.0.0.0"), "--host 0.0.0.0 is not this machine alone; give --api-key-file"),
        (("--port", "0"), "--port must be 1 to 65535; got 0"),
        (("--batch-size", "0"), "--batch-size must be at least 1; got 0"),
        (("--beams", "0"), "--beams must be at least 1; got 0"),
        (("--api-key-file", "KEY"), "--api-key-file must hold at least 16 characters"),
        (("--api-key-file", "none.txt"), "--api-key-file must name a file; got none.txt"),
    ],
)
def test_bad_options_of_the_command_are_refused(
    options: tuple[str, ...], message: str, capsys: Capture, tmp_path: Path
) -> None:
    pytest.importorskip("uvicorn", reason="uvicorn is not installed (pip install -e '.[dev]')")
    short = tmp_path / "key.txt"
    short.write_text("short")
    given = [str(short) if option == "KEY" else option for option in options]
    code, _, error = call(capsys, "serve", "model", "--data", "data", *given)
    assert code == 2
    assert message in error
