"""DPO, S-DPO and GRPO of a model, against the model as it was when fine-tuning began."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_causal import causal_folder, causal_model
from support.tiny_shop import make_inputs, make_model
from torch import Tensor

from gflowgr.errors import DataError
from gflowgr.models import CausalConfig, FlowSettings, GFlowModel, LoraSettings, prompt_tokens
from gflowgr.models.preference_objective import best_and_worst, preference_loss

BETA = {"dpo": 0.1, "sdpo": 1.0, "grpo": 1e-3}


def disturb(model: GFlowModel) -> None:
    """Change everything that trains, as a few steps would."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=g)


def inputs_of(objective: str, model: GFlowModel) -> dict[str, Tensor]:
    """Inputs with as many trajectories as the objective takes."""
    inputs = make_inputs(model)
    if objective == "dpo":
        for name in ("tokens", "mask", "log_reward"):
            inputs[name] = inputs[name][:, :2]
    return inputs


def log_pf(model: GFlowModel, inputs: dict[str, Tensor]) -> Tensor:
    names = ("input_ids", "attention_mask", "tokens", "mask")
    return model.log_pf(*(inputs[name] for name in names))[1].detach()


def expected_loss(objective: str, now: Tensor, start: Tensor, inputs: dict[str, Tensor]) -> float:
    """Section by section from log P_F, in plain loops."""
    total = 0.0
    for b in range(3):
        valid = [n for n in range(now.shape[1]) if bool(inputs["mask"][b, n].any())]
        ratio = {n: (now[b, n] - start[b, n]).tolist() for n in valid}
        if objective != "grpo":
            gap = [BETA[objective] * (sum(ratio[n]) - sum(ratio[0])) for n in valid if n]
            total += math.log(1 + sum(math.exp(x) for x in gap)) / 3
            continue
        reward = torch.tensor([float(inputs["log_reward"][b, n].exp()) for n in valid])
        advantage = (reward - reward.mean()) / (reward.std() + 1e-4)
        for n, a in zip(valid, advantage.tolist(), strict=True):
            k3 = [math.exp(-x) + x - 1 for x in ratio[n]]
            total += (BETA["grpo"] * sum(k3) / len(k3) - a) / len(valid) / 3
    return total


@pytest.mark.parametrize("normalize", ["vocab", "children"])
@pytest.mark.parametrize("objective", ["dpo", "sdpo", "grpo"])
def test_the_loss_is_that_of_its_definition(objective: str, normalize: str) -> None:
    settings: dict[str, Any] = {"objective": objective, "normalize": normalize, "gfn_weight": 0.5}
    model = make_model(**settings, sft_weight=2.0).eval()
    inputs = inputs_of(objective, model)
    model.freeze_reference()
    start = log_pf(model, inputs)
    disturb(model)
    now = log_pf(model, inputs)
    output = model(**inputs)
    expected = expected_loss(objective, now, start, inputs)
    nll = -now[:, 0].sum().item() / 3
    assert output["loss_preference"].item() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert output["loss_gr"].item() == pytest.approx(nll, rel=1e-4)
    assert output["loss"].item() == pytest.approx(2.0 * nll + 0.5 * expected, rel=1e-4)
    gained = (now - start).sum(-1).masked_fill(~inputs["mask"].any(-1), -math.inf)
    margin = gained[:, 0] - gained[:, 1:].amax(-1)
    assert output["preference_margin"].item() == pytest.approx(margin.mean().item(), rel=1e-3)
    assert output["preference_accuracy"].item() == pytest.approx((margin > 0).float().mean().item())
    output["loss"].backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert model.backbone.get_input_embeddings().weight.grad.abs().sum() > 0


def causal(folder: Path, lora: bool, tied: bool = True, seed: int = 0) -> GFlowModel:
    path = str(causal_folder(folder, "qwen3", tie_word_embeddings=tied))
    settings = LoraSettings(r=4, alpha=8.0) if lora else None
    return causal_model(CausalConfig(path, lora=settings), objective="sdpo", seed=seed)


@pytest.mark.parametrize("kind", ["t5", "tied", "untied", "lora"])
def test_the_reference_is_the_model_as_it_was(kind: str, tmp_path: Path) -> None:
    """For every kind of model; with LoRA that is the model with its adapters switched off."""
    if kind == "t5":
        model = make_model(objective="sdpo", dropout=0.3)
    else:
        model = causal(tmp_path, kind == "lora", tied=kind != "untied")
    items = model.item_tokens()
    histories = torch.tensor([[5, 6, 7], [100, -1, -1], [1, 2, -1]])
    ids, mask = prompt_tokens(histories, items, model.prompt)
    tokens = items[torch.tensor([[3, 50], [9, 8], [1, 0]])]
    inputs = {"input_ids": ids, "attention_mask": mask, "tokens": tokens}
    names, before = set(model.state_dict()), copy.deepcopy(model).eval()
    model.freeze_reference()
    disturb(model.train())
    for training in (True, False):
        model.train(training)
        states, weight, bias = model.reference.states(model.backbone, *inputs.values(), None)
        assert all(module.training == training for module in model.backbone.modules())
        logits = states @ weight.T + (0 if bias is None else bias)
        assert not logits.requires_grad
        found = logits.log_softmax(-1).gather(-1, inputs["tokens"][..., None])[..., 0]
        wanted = before.log_pf(*inputs.values())[1]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model.log_pf(*inputs.values())[1], wanted, atol=1e-2)
    assert set(model.state_dict()) == names  # no part of the model that is saved
    if kind == "lora":
        kept = sum(value.numel() for value in model.reference.weights.values())
        assert kept < sum(p.numel() for p in model.parameters()) / 2


def test_autocast_keeps_the_two_models_apart() -> None:
    """Autocast caches its copies of weights: those of the reference must not serve the policy."""
    model = make_model(objective="sdpo").eval()
    inputs = make_inputs(model)
    model.freeze_reference()
    disturb(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**inputs)
    exact = model(**inputs)
    for name in ("loss_gr", "loss_preference", "preference_margin"):
        assert mixed[name].item() == pytest.approx(exact[name].item(), rel=0.05), name


@pytest.mark.parametrize("kind", ["t5", "lora"])
def test_checkpoints_carry_the_reference_and_saved_models_do_not(kind: str, tmp_path: Path) -> None:
    def make(seed: int) -> GFlowModel:
        if kind == "t5":
            return make_model(objective="sdpo", seed=seed).eval()
        return causal(tmp_path / "base", lora=True, seed=seed).eval()

    model = make(0)
    inputs = make_inputs(model)
    with pytest.raises(ValueError, match=r"'sdpo' needs a reference: call freeze_reference"):
        model(**inputs)
    disturb(model)
    model.freeze_reference()
    disturb(model)
    wanted = model(**inputs)["loss"]
    model.save_checkpoint(tmp_path / "checkpoint")
    other = make(9)
    other.load_weights(tmp_path / "checkpoint")
    torch.testing.assert_close(other(**inputs)["loss"], wanted)

    model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "reference.safetensors").exists()
    assert GFlowModel.from_pretrained(tmp_path / "model").reference is None
    (tmp_path / "checkpoint" / "reference.safetensors").unlink()
    with pytest.raises(
        DataError, match=r"incomplete or damaged checkpoint: reference\.safetensors"
    ):
        other.load_weights(tmp_path / "checkpoint")


def test_the_group_of_grpo_needs_rewards() -> None:
    model = make_model(objective="grpo")
    model.freeze_reference()
    inputs = make_inputs(model)
    del inputs["log_reward"]
    with pytest.raises(ValueError, match=r"log_reward or signals is required by .* 'grpo'"):
        model(**inputs)


def test_ipa_compares_the_best_with_the_worst_generated_trajectory() -> None:
    """Prompt 0: trajectories 3 and 1; prompt 1: equal rewards; prompt 2: the first of equal ones.

    The positive has the best reward and is no candidate.
    """
    model = make_model(objective="ipa", gfn_weight=0.5).eval()
    inputs = make_inputs(model)
    inputs["log_reward"] = torch.tensor(
        [[9.0, 0.1, 0.5, 0.7], [9.0, 0.3, 0.3, 5.0], [9.0, 0.2, 0.8, 0.8]]
    )
    assert not inputs["mask"][1, 3].any()
    tokens, mask = best_and_worst(inputs["tokens"], inputs["mask"], inputs["log_reward"])
    for b, chosen in ((0, [0, 3, 1]), (2, [0, 2, 1])):
        assert torch.equal(tokens[b], inputs["tokens"][b, chosen])
    assert mask.any(-1).tolist() == [[True] * 3, [True, False, False], [True] * 3]

    model.freeze_reference()
    start = log_pf(model, inputs)
    disturb(model)
    now = log_pf(model, inputs)
    output = model(**inputs)
    delta = (now - start).sum(-1)
    gaps = [0.1 * (delta[0, 1] - delta[0, 3]).item(), 0.1 * (delta[2, 1] - delta[2, 2]).item()]
    expected = sum(math.log(1 + math.exp(gap)) for gap in gaps) / 2
    nll = -now[:, 0].sum().item() / 3
    assert output["loss_preference"].item() == pytest.approx(expected, rel=1e-3)
    assert output["loss"].item() == pytest.approx(nll + 0.5 * expected, rel=1e-4)
    with pytest.raises(ValueError, match="N >= 3 trajectories for objective 'ipa'; got 2"):
        best_and_worst(inputs["tokens"][:, :2], inputs["mask"][:, :2], inputs["log_reward"][:, :2])


@pytest.mark.parametrize("objective", ["dpo", "ipa"])
def test_model_and_reference_each_have_the_bias_of_their_own_head(objective: str) -> None:
    """No T5 has one; the losses here are ``-log sigmoid(0.1 * what the chosen gained more)``."""
    g = torch.Generator().manual_seed(0)
    count = 3 if objective == "ipa" else 2
    shape, vocabulary = (4, count, 3), 11
    hidden, ref_hidden = (torch.randn(*shape, 5, generator=g) for _ in range(2))
    weight, ref_weight = (torch.randn(vocabulary, 5, generator=g) for _ in range(2))
    bias, ref_bias = (3 * torch.randn(vocabulary, generator=g) for _ in range(2))
    tokens = torch.randint(vocabulary, shape, generator=g)
    mask = torch.ones(shape, dtype=torch.bool)

    def log_p(states: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
        logits = (states @ matrix.T + offset).log_softmax(-1)
        return logits.gather(-1, tokens[..., None])[..., 0].sum(-1)

    head: dict[str, Any] = {"weight": weight, "bias": bias, "tree": None, "normalize": "vocab"}
    reference = (ref_hidden, ref_weight, ref_bias)
    settings = FlowSettings(objective=objective, max_history=8)
    loss, logs = preference_loss(settings, head, hidden, tokens, mask, reference, None)
    now = log_p(hidden, weight, bias)
    gained = now - log_p(*reference)
    margin = gained[:, -2] - gained[:, -1]
    expected = torch.nn.functional.softplus(-0.1 * margin).mean()
    torch.testing.assert_close(logs["loss_preference"], expected)
    torch.testing.assert_close(logs["preference_margin"], margin.mean())
    torch.testing.assert_close(loss, expected - (objective == "ipa") * now[:, 0].mean())


@pytest.mark.parametrize("objective", ["sprec", "ipa"])
def test_a_positive_alone_makes_a_supervised_step(objective: str) -> None:
    model = make_model(objective=objective).eval()
    inputs = make_inputs(model)
    alone = {**inputs, "tokens": inputs["tokens"][:, :1], "mask": inputs["mask"][:, :1]}
    del alone["log_reward"]
    output = model(**alone)
    supervised = make_model(objective="sft").eval()(**alone)
    assert set(output) == {"loss", "loss_gr"}
    torch.testing.assert_close(output["loss"], supervised["loss"])
