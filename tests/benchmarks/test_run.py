"""``python -m benchmarks`` from end to end at tiny sizes; what is wrong is never timed."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.__main__ import main
from benchmarks.harness import checking, floors, measuring, memory, ours, peers, report
from benchmarks.harness.case import Variant
from benchmarks.harness.floors import Floor, Rates
from benchmarks.harness.registry import build_case, read_shape, read_tables

Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")
LOSSES = ("flow_loss", "logprobs_children", "logprobs_dense", "logprobs_logits")


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Random identifiers, on every machine."""
    monkeypatch.setenv("GFLOWGR_DATA", str(tmp_path))


def bench(*arguments: Any) -> int:
    return main(["--no-progress", *map(str, arguments)])


def wrong_by(factor: float) -> peers.Peer:
    """A peer whose log-probabilities are off by a factor."""

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return peers.log_softmax_gather(hidden, weight, targets) * factor

    return peers.Peer("torch", f"times {factor:g}", lambda device, dtype: logprobs)


# ---- from end to end ----


def test_all_losses_and_their_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "results"
    measure = floors._product_rate

    def rate(device: torch.device, dtype: torch.dtype) -> float:
        """Measured, but for bfloat16: without AMX its product of 1024 takes 50 s in all."""
        return 1e9 if dtype == torch.bfloat16 else measure(device, dtype)

    monkeypatch.setattr(floors, "_product_rate", rate)
    sizes = ("--shapes", "3x2x4x8x1030", "--repeats", 2)
    peer = ("--peers", "torch", "--no-memory")
    dtypes = ("--dtype", "float32", "bfloat16")
    assert bench(*LOSSES, *dtypes, *sizes, *peer, "--out", out) == 0
    printed = capsys.readouterr().out

    written = json.loads((out / "bench.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert written["machine"]["threads"] == torch.get_num_threads()
    rows = written["rows"]
    tables = [table.name for table in read_tables(LOSSES)]
    assert {(row["op"], row["dtype"]) for row in rows} == {
        (table, dtype)
        for table in tables
        for dtype in ("float32", "bfloat16")
        if dtype == "float32" or not table.startswith("flow_loss.")
    }
    for row in rows:
        assert row["status"] == "ok", row
        assert 0 < row["ms_q1"] <= row["ms"] <= row["ms_q3"]
        assert row["repeats"] == 2
        tolerance = checking.TOLERANCES[getattr(torch, row["dtype"])]
        assert max(row["result_error"], row["gradient_error"]) <= tolerance
    for table in tables:
        assert any(row["variant"] == "gflowgr/torch" for row in rows if row["op"] == table)
        assert any(row["family"] for row in rows if row["op"] == table)
    children = "logprobs_children.fused"
    assert {row["variant"] for row in rows if row["op"] == children} >= {
        "gflowgr/torch",
        "the same restriction, plain torch",
        "the same restriction, plain torch, sparse",
        "torch log_softmax",
    }
    for case in written["cases"]:
        assert len(case["canary_ms"]) == 3  # before each round, and after the last
        assert case["product_tflops"] > 0
        assert all(floor["predicted_ms"] > 0 for floor in case["floors"].values())

    with open(out / "bench.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["variant"] for row in table] == [row["variant"] for row in rows]
    assert float(table[0]["ms"]) == rows[0]["ms"]
    summary = (out / "bench.md").read_text()
    assert "random identifiers" in summary
    assert summary.count("\n## ") == len(written["cases"])
    assert "left out: gflowgr/cuda: " in printed
    assert (out / "time.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == [
        "bench.csv",
        "bench.json",
        "bench.md",
        "time.png",  # no memory was counted: no plot of it
    ]


def test_a_wrong_peer_is_named_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    monkeypatch.setattr(peers, "PEERS", (wrong_by(1.001), wrong_by(1.0)))
    tables = ("logprobs_dense.fused", "logprobs_dense.fused_frozen")
    calls = (*tables, "--shapes", "3x2x4x8x50", "--repeats", 1, "--no-memory")
    # A peer's mistake is not ours: the exit code stays 0.
    assert bench(*calls, "--dtype", "float32", "--peers", "torch", "--out", tmp_path / "o") == 0
    rows = json.loads((tmp_path / "o" / "bench.json").read_text())["rows"]
    for op in tables:
        wrong, right = (
            next(r for r in rows if (r["op"], r["variant"]) == (op, f"times {factor}"))
            for factor in ("1.001", "1")
        )
        assert wrong["status"] == "wrong"
        assert wrong["ms"] is None
        assert wrong["repeats"] == 0
        assert "relative error over 2e-05: result" in wrong["reason"]
        assert "speedup_vocabulary" not in wrong
        assert right["status"] == "ok"
        assert right["fastest_vocabulary_peer"] == "times 1"
    assert "not timed: times 1.001 (wrong): relative error over" in capsys.readouterr().out


def test_our_own_mistake_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    loss = ours.fused_loss
    monkeypatch.setattr(ours, "fused_loss", lambda *args, **kwargs: loss(*args, **kwargs) * 1.01)
    size = ("--shapes", "3x2x4x8x50", "--dtype", "float32", "--repeats", 1)
    assert bench("logprobs_dense.fused", *size, "--peers", "none", "--no-memory") == 1
    assert "gflowgr/torch (wrong)" in capsys.readouterr().out


def test_why_a_peer_is_missing_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    load = importlib.import_module

    def missing(name: str, *anchor: str) -> Any:
        package = name.split(".")[0]
        if package in ("cut_cross_entropy", "liger_kernel"):
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        if package == "trl":
            raise RuntimeError("Failed to import trl.trainer: something it needs")
        return load(name, *anchor)

    monkeypatch.setattr(peers.importlib, "import_module", missing)
    monkeypatch.delattr(peers.F, "linear_cross_entropy", raising=False)
    wanted = ("--peers", "cut-cross-entropy", "liger", "trl", "linear_cross_entropy")
    size = ("--shapes", "3x2x4x8x50", "--dtype", "float32", "--repeats", 1)
    assert bench("logprobs_dense.logprobs", *size, "--no-memory", *wanted) == 0
    printed = capsys.readouterr().out
    assert "left out: cut-cross-entropy: cut-cross-entropy is not installed" in printed
    assert "left out: liger fused linear CE: its Triton kernels need a GPU" in printed
    assert "left out: liger chunked log-prob: liger-kernel is not installed" in printed
    assert "left out: trl selective_log_softmax: trl cannot be imported: Failed" in printed
    assert "left out: torch linear_cross_entropy: torch" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fly",), "op must be any of beam_step, catalogue_scores, flow_kl, flow_loss, item_flows"),
        (("--shapes", "1x2"), "shape must be a name (letter, llm, tiger"),
        (
            ("logprobs_children.fused", "--shapes", "1x1x4x8x50"),
            "logprobs_children.fused at shape 1x1x4x8x50: V must be at least L * 256 = 1024; got",
        ),
        (
            ("flow_loss.tb", "flow_loss.db", "--shapes", "tree:9"),
            "shape must be one of flow_loss.tb, flow_loss.db; got tree:9",
        ),
        (("--dtype", "int8"), "dtype must be any of float32, bfloat16, float16; got 'int8'"),
        (("flow_loss", "--peers", "jax"), "peer must be none, or any of torch"),
        (("--repeats", "0"), "--repeats must be at least 1; got 0"),
        (("--seconds", "0"), "--seconds must be greater than 0; got 0"),
        (("--threads", "0"), "--threads must be at least 1; got 0"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], message: str, capsys: Capture) -> None:
    assert bench(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("benchmarks: error: ")
    assert message in captured.err


def test_help_teaches(capsys: Capture) -> None:
    """Every op with its tables and how its shapes are written."""
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for explained in (
        "BxNxLxdxV",
        "letter, llm, tiger",
        "python -m benchmarks flow_loss",
        "Exit codes",
        "beam_step One step of a constrained beam search",
        "beam_step:PROMPTSxBEAMSxVOCABxITEMS",
        "search-MODEL:PROMPTSxSOURCExBEAMSxITEMS (MODEL: t5, gpt2, qwen3, decoder)",
        *(table.name for table in read_tables([])),
    ):
        assert explained in text


@pytest.mark.process
def test_an_op_imports_no_other() -> None:
    """A measurement of memory starts a process per variant: it imports what it measures."""
    code = (
        "import sys; from benchmarks.harness.registry import read_tables; "
        "read_tables(['flow_loss']); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "benchmarks.flow_loss" in loaded
    assert "benchmarks.tree" not in loaded
    assert "transformers" not in loaded


# ---- checks ----


def checked(peer: peers.Peer, monkeypatch: pytest.MonkeyPatch) -> checking.Check:
    monkeypatch.setattr(peers, "PEERS", (peer,))
    case = build_case(
        "logprobs_dense.logprobs", read_shape("3x2x2x8x50"), CPU, torch.float32, ("torch",)
    )
    variant = next(v for v in case.variants if v.family == "vocabulary")
    inputs = case.make_inputs(1)
    return checking.check(case, variant, inputs, case.references["vocabulary"](inputs))


def test_a_wrong_gradient_of_a_right_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # Right forward; the head's gradient misses a thousandth.
        leaky = weight * 0.999 + (weight * 0.001).detach()
        return peers.log_softmax_gather(hidden, leaky, targets)

    found = checked(peers.Peer("torch", "leaky", lambda device, dtype: logprobs), monkeypatch)
    assert found.status == "wrong"
    assert "weight 0.001" in found.reason
    assert "result" not in found.reason


def test_no_number_and_no_gradient_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked(wrong_by(float("nan")), monkeypatch).status == "wrong"

    def frozen(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return peers.log_softmax_gather(hidden, weight.detach(), targets)

    found = checked(peers.Peer("torch", "frozen", lambda device, dtype: frozen), monkeypatch)
    assert (found.status, found.reason) == ("wrong", "no gradient of weight")


def test_what_raises_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError("only on Tuesdays\nand so on")

    found = checked(peers.Peer("torch", "raising", lambda device, dtype: raising), monkeypatch)
    assert (found.status, found.reason) == ("failed", "NotImplementedError: only on Tuesdays")


def test_relative_error() -> None:
    wanted = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert checking.relative_error(wanted.float(), wanted) == 0.0
    assert checking.relative_error(torch.tensor([3.0, 4.5]), wanted) == pytest.approx(0.1)
    assert checking.relative_error(torch.tensor([3.0]), wanted) == float("inf")
    zero = torch.zeros(2, dtype=torch.float64)
    assert checking.relative_error(torch.tensor([0.0, 2.0]), zero) == 2.0
    sparse = torch.tensor([3.0, 0.0]).to_sparse()
    assert checking.relative_error(sparse, torch.tensor([3.0, 0.0]).double()) == 0.0


# ---- times, ratios, memory ----


def test_variants_take_turns_on_fresh_data() -> None:
    case = build_case("flow_loss.tb", read_shape("2x2x2x1x1"), CPU, torch.float32, ("torch",))
    seen: list[tuple[str, float]] = []

    def watched(name: str) -> Variant:
        def forward(inputs: Any) -> Tensor:
            seen.append((name, float(inputs["log_pf"].detach().sum())))
            return inputs["log_pf"].sum()

        return Variant(name, "", forward, "definition")

    times = measuring.time_case(case, [watched("a"), watched("b")], repeats=3, seconds=60.0)
    assert {name: len(samples) for name, samples in times.samples.items()} == {"a": 3, "b": 3}
    turns = [seen[0]]
    for entry in seen[1:]:
        if entry != turns[-1]:
            turns.append(entry)
    # The warm-up, then three rounds of new data, each begun by another variant.
    assert [name for name, _ in turns] == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert len({data for _, data in turns}) == 4


def test_a_slow_variant_is_left_alone_after_its_second_sample() -> None:
    case = build_case("flow_loss.tb", read_shape("2x2x2x1x1"), CPU, torch.float32, ("torch",))
    definition = next(v for v in case.variants if v.family)
    times = measuring.time_case(case, [definition], repeats=5, seconds=1e-9)
    assert len(times.samples[definition.name]) == 2


def test_an_unsteady_canary_flags_the_run() -> None:
    assert not measuring.Times(canary=[1.0, 1.05, 1.1]).contended
    assert measuring.Times(canary=[1.0, 1.0, 1.3]).contended


def row(
    variant: str, family: str, floor: str, ms: float | None, mib: float | None
) -> report.BenchRow:
    return report.BenchRow(
        *("table", "s", "s", "float32", "cpu", variant, family, floor, "ok", ""),
        result_error=0.0,
        gradient_error=0.0,
        ms=ms,
        extra_mib=mib,
    )


def test_ratios_are_over_the_fastest_peer_of_each_family() -> None:
    """Like with like: dense gradients with dense ones, row-sparse with row-sparse."""
    dense, sparse = row("dense", "", "dense", 2.0, 10.0), row("sparse", "", "sparse", 1.0, 1.0)
    rows = [
        dense,
        sparse,
        row("slow", "vocabulary", "", 80.0, 50.0),
        row("quick", "vocabulary", "", 40.0, 100.0),
        row("wrong", "vocabulary", "", None, None),
        row("plain", "restricted", "dense", 6.0, 20.0),
        row("plain, sparse", "restricted", "sparse", 4.0, 4.0),
    ]
    report.fill_ratios(rows)
    assert dense.ratios == {
        "vocabulary": report.Ratio("quick", 20.0, 0.1),
        "restricted": report.Ratio("plain", 3.0, 0.5),
    }
    assert sparse.ratios == {
        "vocabulary": report.Ratio("quick", 40.0, 0.01),
        "restricted": report.Ratio("plain, sparse", 4.0, 0.25),
    }
    flat = dense.flat()
    assert (flat["fastest_restricted_peer"], flat["speedup_restricted"]) == ("plain", 3.0)
    assert flat["memory_vocabulary"] == 0.1


class FixedRates(Rates):
    """A machine of 1 GFLOP/s and 1 GB/s."""

    def __init__(self) -> None:
        self.product = self.bandwidth = 1e9

    def bandwidth_at(self, nbytes: float) -> float:
        return self.bandwidth


def test_a_floor_is_the_larger_of_arithmetic_and_traffic() -> None:
    assert Floor(2e9, 1e9).predict(FixedRates()) == 2.0
    assert Floor(1e9, 3e9).predict(FixedRates()) == 3.0


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="counting memory needs Linux"
)
def test_memory_is_what_a_known_variant_holds() -> None:
    """Log-softmax at its peak: its result, its gradient, and the zeros that gather scatters in."""
    shape = read_shape("32x4x4x16x8000")
    case = build_case("logprobs_dense.fused_frozen", shape, CPU, torch.float32, ("torch",))
    variant = next(v for v in case.variants if v.family == "vocabulary")
    found, note = memory.peak_extra_bytes(case, variant, ("torch",))
    assert note == ""
    assert found is not None
    assert found == pytest.approx(3 * shape.rows * shape.V * 4, abs=2 * 2**20)


def test_memory_that_cannot_be_counted_has_a_reason() -> None:
    case = build_case("flow_loss.tb", read_shape("2x2x2x1x1"), CPU, torch.float32, ("torch",))
    unknown = Variant("unknown", "", lambda inputs: inputs["log_pf"].sum(), "definition")
    found, note = memory.peak_extra_bytes(case, unknown, ("torch",))
    assert found is None
    assert "unknown" in note
