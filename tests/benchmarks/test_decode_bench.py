"""``gflowgr bench decode`` and ``bench tree``: what is compared, how it is judged, the bars."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import beam_step as step_cases
from benchmarks import search as model_cases
from benchmarks.harness import measuring, report
from benchmarks.harness.bars import judge_bars
from benchmarks.harness.case import Variant
from benchmarks.harness.constraints import CsrMatrix, DictTrie, packed, prefix_keys, random_tokens
from benchmarks.harness.judging import Ranking, judge_equal, judge_rankings
from benchmarks.harness.shapes import GROUPS, read_shape
from benchmarks.logprobs_dense import build_case
from gflowgr.cli.main import main
from gflowgr.tree import PrefixTree

Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Random identifiers, on every machine."""
    monkeypatch.setenv("GFLOWGR_DATA", str(tmp_path))


def bench(*arguments: Any) -> int:
    return main(["bench", "--no-progress", "--no-memory", "--repeats", "1", *map(str, arguments)])


# ---- from end to end ----


def test_every_variant_is_right(tmp_path: Path) -> None:
    shapes = ("beam:2x3x1027x300", "t5:2x5x3x60", "score:1x5x40", "tree:500")
    out = tmp_path / "results"
    assert bench("decode", "tree", "--shapes", *shapes, "--out", out) == 0
    rows = json.loads((out / "bench.json").read_text())["rows"]
    assert {row["op"] for row in rows} == {*GROUPS["decode"], *GROUPS["tree"]}
    for row in rows:
        assert row["status"] == "ok", row
        assert row["dtype"] == "float32"
        assert row["ms"] > 0
        assert row["cpu_ms"] is not None

    def variants(op: str) -> set[str]:
        return {row["variant"] for row in rows if row["op"] == op}

    assert variants("beam") >= {
        "gflowgr/torch",
        "CSR, top-k of the candidates",
        "CSR, top-k of the vocabulary",
        "transformers, dict trie",
    }
    assert variants("beam-hidden") >= {"gflowgr/torch", "logits first, plain torch"}
    assert variants("search") == {"gflowgr", "generate, dict trie"}
    assert variants("score") == {
        "gflowgr",
        "a row per item",
        "a row per item, encoded once",
    }
    assert variants("tree-files") == {"save", "load", "load, memory-mapped"}
    sizes = {row["variant"]: row["bytes_per_item"] for row in rows if row["op"] == "tree-build"}
    assert sizes["gflowgr, NumPy"] < sizes["CSR, NumPy"] < sizes["dict trie"]
    text = (out / "bench.md").read_text()
    assert "memory is not counted: a step holds little" in text
    assert "| bytes per item |" in text
    assert "## Bars" not in text  # they are for the sizes of the README


@pytest.mark.parametrize("model", ["gpt2", "qwen3"])
def test_decoder_only_searches_are_right(model: str, tmp_path: Path) -> None:
    assert bench("search", "--shapes", f"{model}:2x4x3x50", "--out", tmp_path / "o") == 0
    rows = json.loads((tmp_path / "o" / "bench.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert rows[0]["speedup_transformers"] > 0


def test_a_wrong_step_is_neither_timed_nor_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    step = step_cases.beam_step

    def off(*args: Any, **options: Any) -> Any:
        found = step(*args, **options)
        return found._replace(scores=found.scores + 1e-3)

    monkeypatch.setattr(step_cases, "beam_step", off)
    shape = ("beam", "--shapes", "beam:2x3x1027x300", "--peers", "csr")
    assert bench(*shape, "--out", tmp_path / "o") == 1
    rows = json.loads((tmp_path / "o" / "bench.json").read_text())["rows"]
    ours = [row for row in rows if not row["family"]]
    assert {row["status"] for row in ours} == {"wrong"}
    assert {row["speedup_csr"] for row in ours} == {None}
    assert "a score is off by 0.001, over 1e-05" in capsys.readouterr().out


def test_the_tree_is_not_benchmarked_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench("tree", "--device", "cuda") == 2
    assert "the ops of group tree run on the CPU" in capsys.readouterr().err


# ---- the structures of the others ----


def test_trie_and_matrix_hold_the_tree() -> None:
    """Same prefixes, and under every prefix the same children."""
    tokens = random_tokens(400, 3)
    tokens[:200, :2] = tokens[0, :2]  # some that share their beginning
    tree = PrefixTree.from_identifiers(tokens)
    trie, matrix = DictTrie(tokens), CsrMatrix(tokens, 3)
    assert trie.level_sizes == matrix.level_sizes == tree.level_sizes
    for depth in range(4):
        prefix = torch.from_numpy(tokens[::7, :depth].astype(np.int64))
        nodes = tree.walk(prefix)[:, -1] if depth else torch.zeros(len(prefix), dtype=torch.long)
        found, after, valid = matrix.children(nodes, depth)
        for row, node in enumerate(nodes.tolist()):
            wanted, below = tree.children(node)
            assert found[row, valid[row]].tolist() == wanted.tolist()
            assert after[row, valid[row]].tolist() == below.tolist()
            assert sorted(trie.allowed(prefix[row].tolist())) == wanted.tolist()
    assert trie.allowed([1]) == []  # no prefix
    assert matrix.nbytes_structure == 4 * (tree.num_nodes + 1) + 8 * (tree.num_nodes - 1 + 256)


def test_prefixes_are_numbers_in_base_256() -> None:
    tokens = np.array([[7, 256 + 1, 512 + 2, 768 + 3], [7, 256 + 1, 512 + 2, 768]])
    assert packed(tokens, 0).tolist() == [0x07010203, 0x07010200]
    levels = [keys.tolist() for keys in prefix_keys(tokens, 0)]
    assert levels == [[0x07], [0x0701], [0x070102], [0x07010200, 0x07010203]]


# ---- the judges ----

WANTED = Ranking(
    torch.tensor([[5, 9, 2], [4, 8, -1]]),
    torch.tensor([[-1.0, -2.0, -2.0000001], [-1.0, -3.0, -torch.inf]], dtype=torch.float64),
)


def edited(edit: Callable[[Tensor, Tensor], None]) -> Ranking:
    keys, scores = WANTED.keys.clone(), WANTED.scores.float()  # type: ignore[union-attr]
    edit(keys, scores)
    return Ranking(keys, scores)


def test_the_same_ranking_is_right() -> None:
    assert judge_rankings(edited(lambda keys, scores: None), WANTED).status == "ok"
    assert judge_rankings(WANTED._replace(scores=None), WANTED).status == "ok"


def test_equal_scores_may_change_places() -> None:
    def swap(keys: Tensor, scores: Tensor) -> None:
        keys[0, 1:] = torch.tensor([2, 9])

    def another_at_the_edge(keys: Tensor, scores: Tensor) -> None:
        keys[0, 2] = 77

    assert judge_rankings(edited(swap), WANTED).status == "ok"
    assert judge_rankings(edited(another_at_the_edge), WANTED).status == "ok"


@pytest.mark.parametrize(
    ("place", "key", "score", "reason"),
    [
        ((0, 0), 5, -1.0001, "a score is off by 0.0001"),
        ((0, 0), 5, float("nan"), "other numbers of candidates"),
        ((0, 0), 77, -1.0, "1 of 5 candidates are others"),
        ((0, 0), 9, -1.0, "a candidate is found twice"),
        ((1, 2), 6, -4.0, "other numbers of candidates"),
    ],
)
def test_another_ranking_is_wrong(
    place: tuple[int, int], key: int, score: float, reason: str
) -> None:
    def edit(keys: Tensor, scores: Tensor) -> None:
        keys[place], scores[place] = key, score

    found = judge_rankings(edited(edit), WANTED)
    assert found.status == "wrong"
    assert reason in found.reason


def test_equal_is_every_element() -> None:
    assert judge_equal(torch.tensor([1, 2]), torch.tensor([1, 2])).status == "ok"
    assert judge_equal(torch.tensor([1, 3]), torch.tensor([1, 2])).reason == (
        "1 of 2 elements differ"
    )
    assert judge_equal(torch.tensor([1]), torch.tensor([1, 2])).status == "wrong"


# ---- times, floors, bars ----


def test_what_comes_before_the_clock_and_scaled_times() -> None:
    """``prepare`` runs once for each new inputs; ``scale`` is of the times."""
    case = build_case("beam", read_shape("beam:1x1x1027x20"), CPU, torch.float32, ())
    prepared = []

    def forward(inputs: Any) -> None:
        torch.ones(1000).sum()

    whole = Variant("whole", "", forward, "float64", trains=False)
    half = dataclasses.replace(whole, name="part", scale=1e-6, prepare=prepared.append)
    times = measuring.time_case(case, [whole, half], repeats=3, seconds=60.0)
    assert len({id(inputs) for inputs in prepared}) == len(prepared) == 4  # warm-up, three rounds
    assert max(times.samples["part"]) < min(times.samples["whole"])
    assert max(times.cpu["part"]) < min(times.cpu["whole"])


def test_arithmetic_of_a_token_is_that_of_its_products() -> None:
    """T5: projections of both attentions, feed-forward and head; attention itself adds a little."""
    model = model_cases.build_model("t5", CPU)
    prompt, token = model_cases.token_flops(model, 2)
    per_layer = 6 * 128 * 384 + 2 * 128 * 1024
    assert token == pytest.approx(2 * (4 * per_layer + 128 * 1027), rel=0.03)
    encoder_layer = 4 * 128 * 384 + 2 * 128 * 1024
    cross_keys = 2 * 128 * 384
    assert prompt == pytest.approx(2 * 2 * 4 * (encoder_layer + cross_keys), rel=0.03)


def row(op: str, shape: str, ms: float, **values: Any) -> report.Row:
    return report.Row(
        *(op, shape, shape, "float32", "cpu", "gflowgr/cpp", "", "", "ok", ""),
        result_error=0.0,
        gradient_error=None,
        ms=ms,
        **values,
    )


def test_bars_are_judged_by_our_fastest_variant() -> None:
    rows = [
        row("beam", "beam:64x20x1027x12101", 0.9),
        row("beam", "beam:64x20x1027x12101", 0.5),
        row("beam", "beam:64x20x1027x10m", 0.8),
        row("beam", "beam:8x20x1027x10m", 9.0),  # nothing is asked of it
        row("search", "t5:64x60x20x12101", 1, speedup_transformers=9, memory_transformers=0.5),
        row("tree-build", "tree:10m", 1500, bytes_per_item=4.9, contended=True),
    ]
    assert [bar.text for bar in judge_bars(rows)] == [
        "met: beam, beam:64x20x1027x12101: ms 0.5, at most 0.7",
        "MISSED: beam, beam:64x20x1027x10m: ms 0.8, at most 0.7",
        "met: search, t5:64x60x20x12101: times faster than generate 9, at least 8",
        "MISSED: search, t5:64x60x20x12101: of the memory of generate 0.5, at most 0.333",
        "met: tree-build, tree:10m: bytes per item 4.9, at most 5 (CONTENDED)",
        "met: tree-build, tree:10m: seconds 1.5, at most 2 (CONTENDED)",
        "MISSED: beam, 64x20, V 1027: the slowest catalogue over the fastest 1.6, at most 1.5",
    ]
