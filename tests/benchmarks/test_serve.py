"""The load test and the soak of the server: small ones run, and the soak finds planted faults."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

for _package in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(_package, reason=f'{_package} is not installed: pip install ".[dev]"')

from fastapi.testclient import TestClient  # noqa: E402
from support.listening import listening  # noqa: E402

from benchmarks.__main__ import main  # noqa: E402
from benchmarks.harness.constraints import DictTrie  # noqa: E402
from benchmarks.harness.generate_server import make_app  # noqa: E402
from benchmarks.harness.http_clients import load  # noqa: E402
from benchmarks.harness.served import SMALL, Shop  # noqa: E402
from benchmarks.harness.soak import Seen, grown, lost, soak_test, soak_text, wrong_items  # noqa: E402
from benchmarks.serve import ALONE, OURS, PEER, SEARCH, Cell, report  # noqa: E402
from gflowgr.evaluation.generative import GenerativeRecommender  # noqa: E402
from gflowgr.models import FlowSettings, GFlowModel  # noqa: E402
from gflowgr.tree import PrefixTree  # noqa: E402


@pytest.mark.process
def test_a_soak_of_ten_seconds_finds_nothing_wrong() -> None:
    found = soak_test(300, seconds=10, sizes=SMALL, say=lambda _: None)
    assert found.wrong == []
    assert found.requests > 5
    assert found.changes > 5
    assert found.retried == []
    assert "- wrong: 0\n" in soak_text(found)


def test_the_peer_answers_as_the_search_and_its_clients_count_every_request(
    tmp_path: Path,
) -> None:
    shop = Shop(tmp_path, 300, SMALL)
    backbone = shop.backbone(0)
    app = make_app(backbone, shop.tokens, DictTrie(shop.tokens), beams=20)
    tree = PrefixTree.from_identifiers(torch.from_numpy(shop.tokens))
    settings = FlowSettings(objective="sft", max_history=20)
    ours = GenerativeRecommender(GFlowModel(backbone, tree, shop.vocabulary, settings).eval())
    bodies = shop.requests(4, mask_seen=False)
    client = TestClient(app)
    for body in bodies:
        wanted = ours.recommend([np.array(body["history"])], 10)[0][0].tolist()
        assert set(client.post("/recommend", json=body).json()["items"]) == set(wanted)
    with listening(app) as port:
        found = asyncio.run(load(port, [*bodies, {"history": "none"}], 3, 0.3))
    assert len(found.seconds) >= 3
    assert max(found.seconds) <= found.elapsed
    assert found.failed == len(found.seconds) // 5


def test_the_report_judges_the_figures() -> None:
    cells = [Cell(SEARCH, 1, [0.01] * 10, 0.1, rate=[100.0])]
    for name, rate in ((OURS, 100), (PEER, 10), (ALONE, 50)):
        for clients in (1, 64):
            times = [clients / rate] * 20
            cells.append(Cell(name, clients, times, 20 / rate, 5 / rate, [float(rate)]))
    cells[1].seconds = [0.02] * 20
    table, bars = report(cells)
    assert len(table.splitlines()) == 2 + len(cells)
    assert bars == [
        f"met: requests/s at 64 clients over {PEER}: 10.00, at least 8",
        f"requests/s at 64 clients over {ALONE}: 2.00",
        f"CPU time of a request of {PEER} over ours: 10.00",
        f"MISSED: p95 at 1 client over p95 of {SEARCH}: 2.00, at most 1.5",
    ]


def test_the_soak_names_what_must_not_be() -> None:
    lines = [
        {"change": {"kind": "remove", "id": "1"}},
        {"change": {"kind": "add", "id": "new"}},
        {"change": {"kind": "availability", "id": "2", "available": False}},
    ]
    right = [
        Seen(0, 0, None, ("1", "2")),
        Seen(1, 2, ("1", "2", "new"), ("2", "new")),
        Seen(3, 3, ("2", "new"), ("new",)),
    ]
    assert wrong_items(right, lines, 3) == []
    wrong = [
        (Seen(1, 1, None, ("1",)), "version 1 has no ['1']"),
        (Seen(3, 3, None, ("2",)), "version 3 has no ['2']"),
        (Seen(2, 2, ("new",), ()), "version 2 has ['new'], which were asked for"),
        (Seen(2, 1, None, ()), "an answer of version 1 came after 2"),
    ]
    for seen, message in wrong:
        assert wrong_items([seen], lines, 3) == [message]
    assert lost({1: {"kind": "remove", "id": "1"}}, lines) == []
    assert len(lost({2: {"kind": "remove", "id": "1"}, 4: {"kind": "add", "id": "x"}}, lines)) == 2
    flat = {1: {"a": 300.0}, 2: {"a": 350.0}, 3: {"a": 380.0, "b": 100.0}, 4: {"b": 400.0}}
    assert grown(flat) == []
    assert grown({**flat, 4: {"a": 400.0}})[0].startswith("memory of a must stay flat")


def test_the_command_has_options_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    assert "--soak [SECONDS]" in capsys.readouterr().out
