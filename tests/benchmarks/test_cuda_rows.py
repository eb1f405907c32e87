"""What the harness does on a GPU only: 16 bits, no data checks, CUDA graphs. Seen by stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import case as harness
from benchmarks.harness import ours, running
from benchmarks.harness.case import Case, GraphedVariant
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.judging import Ranking, judge_scores
from benchmarks.harness.registry import build_case, read_shape, read_tables
from benchmarks.harness.running import Settings
from benchmarks.harness.shapes import NAMED
from gflowgr.ops import validation_enabled

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LOW = {"beam_step.hidden", "beam_step.logits", "search", "train_step"}


def empty_case(device: torch.device) -> Case:
    return Case("x", NAMED["tiger"], device, torch.float32, lambda seed: Inputs({}), {})


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, without: list[str]) -> None:
    monkeypatch.setattr(ours, "usable_backends", lambda *given: ([None, "cuda"], []))
    monkeypatch.setattr(ours, "without_kernels", lambda *given: without)


def test_16_bits_are_for_the_gpu_where_cpus_have_no_kernels_for_them() -> None:
    tables = tuple(read_tables([]))
    settings = Settings(tables, CPU, (torch.float32, torch.bfloat16), (), ())
    for device in (CPU, CUDA):
        cases = replace(settings, device=device).cases()
        low = {table.name for table, _, dtype in cases if dtype == torch.bfloat16}
        assert (low >= LOW) == (device == CUDA)
        assert (LOW & low) == (LOW if device == CUDA else set())
        assert "flow_loss.tb" not in low


def test_data_are_checked_on_the_cpu_and_not_in_rows_of_a_gpu() -> None:
    for device in (CPU, CUDA):
        with running.timed_checks(device):
            assert validation_enabled() == (device == CPU)
    assert validation_enabled()


def test_rows_in_graphs_are_for_the_gpu_and_for_ops_with_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_cpu = empty_case(CPU)
    on_cpu.add_ours("flow_loss", lambda inputs: None, "reference")
    assert not any(isinstance(variant, GraphedVariant) for variant in on_cpu.variants)
    for without, graph, expected in (([], True, 1), (["op"], True, 0), ([], False, 0)):
        on_a_gpu(monkeypatch, without)
        case = empty_case(CUDA)
        case.add_ours("flow_loss", lambda inputs: None, "reference", graph=graph)
        assert sum(isinstance(v, GraphedVariant) for v in case.variants) == expected
        assert [name for name, _ in case.missing] == ["gflowgr, CUDA graph"] * len(without)


def test_a_graph_is_captured_for_new_inputs_and_gives_gradients_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stand-in's graph writes to the tensors of the run that it has seen, as a real one."""
    counts = {"captures": 0, "replays": 0}

    def capture(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        counts["captures"] += 1
        result = work()

        def replay() -> None:
            counts["replays"] += 1
            gradient.mul_(2)  # whoever holds another tensor does not see it

        gradient = leaf.grad
        assert gradient is not None
        return replay, result

    monkeypatch.setattr(harness, "capture", capture)

    def forward(inputs: Inputs) -> Tensor:
        return inputs["x"].square().sum()

    variant = GraphedVariant("graph", "", forward, "reference")
    for round_ in range(2):
        leaf = torch.tensor([3.0], requires_grad=True)
        inputs = Inputs({"x": leaf})
        variant.get_ready(inputs)
        for k in range(2):
            inputs.clear()
            assert variant.run(inputs).item() == 9.0
            assert leaf.grad is not None
            assert leaf.grad.item() == 6.0 * 2 ** (k + 1)
        assert counts == {"captures": round_ + 1, "replays": 2 * (round_ + 1)}


@pytest.mark.parametrize("op", ["beam_step.logits", "beam_step.hidden"])
def test_steps_in_16_bits_are_right(op: str) -> None:
    shape = read_shape("beam_step:2x4x1100x200")
    case = build_case(op, shape, CPU, torch.bfloat16, ("torch", "csr"))
    inputs = case.make_inputs(0)
    name = "hidden" if op.endswith("hidden") else "logits"
    assert inputs[name].dtype == torch.bfloat16
    checks = running._check_all(case, running._Status(False))
    assert {variant: check.reason for variant, check in checks.items()} == dict.fromkeys(checks, "")
    assert {"gflowgr/cpp", "gflowgr/torch"} <= set(checks)


def test_a_search_in_16_bits_is_judged_by_its_scores() -> None:
    keys, scores = torch.tensor([[1, 2, 3]]), torch.tensor([[-1.0, -2.0, -torch.inf]])
    wanted = Ranking(keys, scores.double())
    others = Ranking(keys.flip(1), scores + torch.tensor([0.1, -0.1, 0.0]))
    assert judge_scores(others, wanted, 0.2).status == "ok"
    assert judge_scores(others, wanted, 0.05).status == "wrong"
    assert judge_scores(Ranking(keys, None), wanted, 0.05).status == "ok"
    assert judge_scores(Ranking(keys[:, :2], scores[:, :2]), wanted, 9.0).status == "wrong"
    fewer: Any = scores.masked_fill(keys == 2, -torch.inf)
    assert judge_scores(Ranking(keys, fewer), wanted, 9.0).reason.startswith("other numbers")
    nan = scores.masked_fill(keys == 2, torch.nan)
    assert judge_scores(Ranking(keys, nan), wanted, 9.0).status == "wrong"
