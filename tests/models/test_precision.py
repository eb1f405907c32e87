"""Backbones in 16 bits without autocast: log Z, log F and a learned fusion stay in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.joint_cases import CASES, make_inputs, make_model
from support.small_models import small_model
from support.tiny_shop import make_args
from support.tiny_shop import make_model as make_shop_model
from support.tiny_trainer import make_trainer, steps
from torch import Tensor

from gflowgr.models import GFlowModel, PartitionHead
from gflowgr.models.heads import StateFlow
from gflowgr.models.objective import flow_start
from gflowgr.models.packed import PromptState
from gflowgr.rewards.fusion import RewardFusion

HALVES = [torch.bfloat16, torch.float16]
TRAINED: dict[str, dict[str, Any]] = {
    **{name: {"objective": name} for name in ("dpo", "sdpo", "grpo", "ipa")},
    **{
        name: CASES[name]
        for name in (
            "sft",
            "tb-children",
            "tb-level-scalar",
            "tb-vargrad",
            "tb-weighted",
            "tb-mlp-sum",
            "db-forward-looking",
            "subtb-importance",
            "gpt2-tb-children",
            "qwen3-db-children",
        )
    },
}


def loss_and_gradients(model: GFlowModel, objective: str) -> tuple[float, dict[str, Tensor]]:
    inputs = make_inputs(model)
    if objective == "dpo":
        inputs = {
            k: v[:, :2] if v.dim() > 1 and v.shape[1:2] == (4,) else v for k, v in inputs.items()
        }
    if model.settings.has_reference:
        model.freeze_reference()
        del inputs["signals"]
        inputs["log_reward"] = torch.arange(16.0).view(4, 4)[:, : inputs["tokens"].shape[1]].log1p()
    elif not model.flow_started:
        model.start_flow(flow_start(model.flow_statistics(**inputs)))
    loss = model(**inputs)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", TRAINED)
def test_every_objective_trains_a_backbone_in_16_bits(case: str, dtype: torch.dtype) -> None:
    settings = TRAINED[case]
    model = make_model(**settings)
    half = copy.deepcopy(model)
    half.backbone.to(dtype)
    exact = copy.deepcopy(model)
    exact.load_state_dict(half.state_dict())  # of the same, rounded weights
    objective = settings["objective"]
    loss, gradients = loss_and_gradients(half, objective)
    wanted, wanted_gradients = loss_and_gradients(exact, objective)
    assert loss == pytest.approx(wanted, rel=0.1, abs=0.1)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        if name.startswith("backbone."):
            assert gradient.dtype == dtype
            assert gradient.isfinite().all()
            continue
        assert gradient.dtype == torch.float32
        off = (gradient - wanted_gradients[name]).abs().max()
        assert off < 0.15 * wanted_gradients[name].abs().max().clamp(min=1.0), name


def heads() -> list[tuple[torch.nn.Module, Tensor]]:
    torch.manual_seed(0)
    made = [
        (PartitionHead(16), torch.randn(5, 16)),
        (PartitionHead(16, "scalar"), torch.randn(5, 16)),
        (StateFlow(16, 3), torch.randn(5, 2, 3, 16)),
        (RewardFusion(3, "weighted"), 5 * torch.rand(5, 2, 3)),
        (RewardFusion(3, "mlp"), 5 * torch.rand(5, 2, 3)),
    ]
    for head, _ in made:
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("place", range(5))
def test_heads_compute_in_float32_whatever_the_states_are(
    place: int, autocast: bool, dtype: torch.dtype
) -> None:
    head, inputs = heads()[place]
    exact = copy.deepcopy(head).double()
    inputs = inputs.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        values = head(inputs)
    assert values.dtype == torch.float32
    wanted = exact(inputs.double())
    torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-5)
    values.square().sum().backward()
    wanted.square().sum().backward()
    for mine, true in zip(head.parameters(), exact.parameters(), strict=True):
        assert mine.grad is not None
        assert true.grad is not None
        torch.testing.assert_close(mine.grad.double(), true.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", range(5))
def test_heads_gathered_in_16_bits_compute_in_float32(place: int) -> None:
    """As FSDP2 gathers them under mixed precision."""
    head, inputs = heads()[place]
    state = {name: value.bfloat16() for name, value in head.named_parameters()}
    values = torch.func.functional_call(head, state, (inputs.bfloat16(),))
    exact = copy.deepcopy(head).double()
    exact.load_state_dict(state, strict=False)  # "initialised" is no parameter
    assert values.dtype == torch.float32
    torch.testing.assert_close(
        values.double(), exact(inputs.bfloat16().double()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half()], ids=["bf16", "fp16"])
@pytest.mark.parametrize("settings", [{"fusion": "weighted"}, {"objective": "db", "fusion": "mlp"}])
def test_casting_the_whole_model_leaves_its_heads_as_they_are(
    settings: dict[str, Any], cast: Any
) -> None:
    """In bfloat16 a step of 0.01 from a log Z of 20 would be none."""
    model = make_model(**{"objective": "tb", **settings})
    before = {n: v.clone() for n, v in model.state_dict().items() if not n.startswith("backbone.")}
    cast(model)
    assert model.backbone.dtype in HALVES
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_the_mean_of_a_long_prompt_does_not_overflow_float16() -> None:
    state = PromptState(torch.full((1, 100, 2), 1000.0).half(), torch.ones(1, 100))
    assert state.pooled().tolist() == [[1000.0, 1000.0]]


@pytest.mark.parametrize("objective", ["tb", "db"])
def test_the_trainer_fine_tunes_a_bfloat16_backbone(objective: str, tmp_path: Any) -> None:
    model = make_shop_model(objective=objective)
    model.backbone.bfloat16()
    args = make_args(tmp_path, per_device_train_batch_size=32, max_steps=2, learning_rate=0.0)
    trainer = make_trainer(args, model)
    trainer.train()
    first, second = (entry["log_z"] for entry in steps(trainer))
    assert 0 < abs(first - second) < 1  # a step of the flow heads' learning rate, 0.01


def test_a_decoder_only_backbone_pools_in_float32() -> None:
    model = make_model(backbone="qwen3", objective="tb")
    assert type(model.backbone) is type(small_model("qwen3"))
    model.backbone.bfloat16()
    inputs = make_inputs(model)
    prompts = (inputs[name] for name in ("input_ids", "attention_mask", "tokens", "mask"))
    assert model.log_pf(*prompts)[0].dtype == torch.float32
