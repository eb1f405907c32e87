"""Benchmarks of decoding and of the tree: what is compared, how it is judged, the bars."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import beam_step
from benchmarks.__main__ import main
from benchmarks.harness import measuring, models, report
from benchmarks.harness.bars import BARS, Wanted, judge_bars
from benchmarks.harness.case import Variant
from benchmarks.harness.constraints import CsrMatrix, DictTrie, packed, prefix_keys, random_tokens
from benchmarks.harness.judging import Ranking, judge_equal, judge_rankings
from benchmarks.harness.registry import build_case, read_shape, read_tables
from gflowgr.tree import PrefixTree

Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Random identifiers, on every machine."""
    monkeypatch.setenv("GFLOWGR_DATA", str(tmp_path))


def bench(*arguments: Any) -> int:
    return main(["--no-progress", "--no-memory", "--repeats", "1", *map(str, arguments)])


# ---- from end to end ----


def test_every_variant_is_right(tmp_path: Path) -> None:
    ops = ("beam_step", "search", "catalogue_scores", "tree")
    sizes = ("beam_step:2x3x1027x300", "search-t5:2x5x3x60", "catalogue_scores:1x5x40", "tree:500")
    out = tmp_path / "results"
    assert bench(*ops, "--shapes", *sizes, "--out", out) == 0
    rows = json.loads((out / "bench.json").read_text())["rows"]
    assert {row["op"] for row in rows} == {table.name for table in read_tables(ops)}
    for row in rows:
        assert row["status"] == "ok", row
        assert row["dtype"] == "float32"
        assert row["ms"] > 0
        assert row["cpu_ms"] is not None

    def variants(op: str) -> set[str]:
        return {row["variant"] for row in rows if row["op"] == op}

    assert variants("beam_step.logits") >= {
        "gflowgr/torch",
        "CSR, top-k of the candidates",
        "CSR, top-k of the vocabulary",
        "transformers, dict trie",
    }
    assert variants("beam_step.hidden") >= {"gflowgr/torch", "logits first, plain torch"}
    assert variants("search") == {"gflowgr", "generate, dict trie"}
    assert variants("catalogue_scores") == {
        "gflowgr",
        "a row per item",
        "a row per item, encoded once",
    }
    assert variants("tree.files") == {"save", "load", "load, memory-mapped"}
    sizes = {row["variant"]: row["bytes_per_item"] for row in rows if row["op"] == "tree.build"}
    assert sizes["gflowgr, NumPy"] < sizes["CSR, NumPy"] < sizes["dict trie"]
    text = (out / "bench.md").read_text()
    assert "memory is not counted: a step holds little" in text
    assert "| bytes per item |" in text
    assert "## Bars" not in text  # they are for the sizes of the README


@pytest.mark.parametrize("model", ["gpt2", "qwen3"])
def test_decoder_only_searches_are_right(model: str, tmp_path: Path) -> None:
    assert bench("search", "--shapes", f"search-{model}:2x4x3x50", "--out", tmp_path / "o") == 0
    rows = json.loads((tmp_path / "o" / "bench.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert rows[0]["speedup_transformers"] > 0


def test_a_wrong_step_is_neither_timed_nor_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    step = beam_step.beam_step

    def off(*args: Any, **options: Any) -> Any:
        found = step(*args, **options)
        return found._replace(scores=found.scores + 1e-3)

    monkeypatch.setattr(beam_step, "beam_step", off)
    shape = ("beam_step.logits", "--shapes", "beam_step:2x3x1027x300", "--peers", "csr")
    assert bench(*shape, "--out", tmp_path / "o") == 1
    rows = json.loads((tmp_path / "o" / "bench.json").read_text())["rows"]
    ours = [row for row in rows if not row["family"]]
    assert {row["status"] for row in ours} == {"wrong"}
    assert not any("speedup_csr" in row for row in ours)
    assert "a score is off by 0.001, over 1e-05" in capsys.readouterr().out


def test_the_tree_is_not_benchmarked_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench("tree", "--device", "cuda") == 2
    assert (
        "device must be cpu for tree.build, tree.walk, tree.available, tree.files; got cuda"
        in capsys.readouterr().err
    )


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
    case = build_case(
        "beam_step.logits", read_shape("beam_step:1x1x1027x20"), CPU, torch.float32, ()
    )
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
    model = models.build_model("t5", CPU)
    prompt, token = models.token_flops(model, 2)
    per_layer = 6 * 128 * 384 + 2 * 128 * 1024
    assert token == pytest.approx(2 * (4 * per_layer + 128 * 1027), rel=0.03)
    encoder_layer = 4 * 128 * 384 + 2 * 128 * 1024
    cross_keys = 2 * 128 * 384
    assert prompt == pytest.approx(2 * 2 * 4 * (encoder_layer + cross_keys), rel=0.03)


def row(op: str, shape: str, ms: float, **values: Any) -> report.BenchRow:
    return report.BenchRow(
        *(op, shape, shape, "float32", "cpu", "gflowgr/cpp", "", "", "ok", ""),
        result_error=0.0,
        gradient_error=None,
        ms=ms,
        **values,
    )


def test_bars_are_judged_by_our_fastest_variant() -> None:
    peers = {"transformers": report.Ratio("generate, dict trie", 9.0, 0.5)}
    rows = [
        row("beam_step.logits", "beam_step:64x20x1027x12101", 0.9),
        row("beam_step.logits", "beam_step:64x20x1027x12101", 0.5),
        row("beam_step.logits", "beam_step:64x20x1027x10m", 0.8),
        row("beam_step.logits", "beam_step:8x20x1027x10m", 9.0),  # nothing is asked of it
        row("search", "search-t5:64x60x20x12101", 1, ratios=peers),
        row("tree.build", "tree:10m", 1500, bytes_per_item=4.9, contended=True),
    ]
    assert [bar.text for bar in judge_bars(rows)] == [
        "met: beam_step.logits, beam_step:64x20x1027x12101: ms 0.5, at most 0.7",
        "MISSED: beam_step.logits, beam_step:64x20x1027x10m: ms 0.8, at most 0.7",
        "MISSED: beam_step.logits, beam_step:64x20x1027x*: slowest over fastest 1.6, at most 1.3",
        "met: search, search-t5:64x60x20x12101: faster, transformers 9, at least 8",
        "MISSED: search, search-t5:64x60x20x12101: memory, transformers 0.5, at most 0.333",
        "met: tree.build, tree:10m: bytes per item 4.9, at most 5 (CONTENDED)",
        "met: tree.build, tree:10m: seconds 1.5, at most 2 (CONTENDED)",
    ]


def test_what_is_wrong_or_a_peers_has_no_bar() -> None:
    wrong = row("tree.files", "tree:10m", 1.0)
    wrong.ms = None
    peer = row("tree.files", "tree:10m", 1.0)
    peer.variant, peer.family = "load, memory-mapped", "others"
    assert judge_bars([wrong, peer]) == []
    loaded = row("tree.files", "tree:10m", 1.0)  # of another variant than the bar's
    assert judge_bars([loaded]) == []
    loaded.variant = "load, memory-mapped"
    assert [bar.measured for bar in judge_bars([loaded])] == [1.0]


@pytest.mark.parametrize("wanted", BARS, ids=lambda wanted: f"{wanted.shape} {wanted.figure}")
def test_every_bar_is_of_a_shape_that_is_measured(wanted: Wanted) -> None:
    """A misspelt pattern would ask for nothing. 100 million items are measured on request."""
    (table,) = read_tables([wanted.table])
    shapes = [shape.label for shape in table.on_cpu]
    shapes += [text for text in ("tree:100m", "item_flows:128x100000000") if table.op in text]
    assert any(fnmatchcase(shape, wanted.shape) for shape in shapes)
    if wanted.variant:
        shape = read_shape({"tree": "tree:9", "flow_kl": "2x2x2x8x600"}[table.op])
        case = build_case(wanted.table, shape, CPU, torch.float32, ())
        assert wanted.variant in [variant.name for variant in case.variants]
