"""The joint loss and every gradient, end to end, against the method's formulas in float64.

The model packs all trajectories of a prompt in one sequence, and computes the loss through the
fused ops, in float32. The definition runs the plain ``transformers`` model, an encoder-decoder or a
decoder-only one, once per trajectory, in float64, with ordinary log-softmaxes and loops over the
formulas of the paper.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support.joint_cases import CASES, IDENTIFIERS, ITEMS, make_inputs, make_model
from support.small_models import VOCAB
from torch import Tensor

import gflowgr
from gflowgr.models import FlowSettings, GFlowModel
from gflowgr.models.objective import flow_start


def competitors(prefix: list[int], settings: FlowSettings) -> list[int]:
    """The tokens over which the next token's probability is normalised."""
    level = len(prefix)
    if settings.normalize == "vocab":
        return list(range(VOCAB))
    if settings.normalize == "level":
        used = [tokens[level] for tokens in IDENTIFIERS if len(tokens) > level]
        return list(range(min(used), max(used) + 1))
    return sorted({t[level] for t in IDENTIFIERS if t[:level] == prefix and len(t) > level})


def forward_once(backbone: Any, prompt: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and states that predict each token of one sequence, and the pooled prompt."""
    if not backbone.config.is_encoder_decoder:
        sequence = torch.cat([prompt, tokens[:-1]])
        out = backbone(input_ids=sequence.unsqueeze(0), output_hidden_states=True)
        states, first = out.hidden_states[-1][0], len(prompt) - 1
        return out.logits[0, first:], states[first:], states[: len(prompt)].mean(0)
    out = backbone(
        input_ids=prompt.unsqueeze(0), labels=tokens.unsqueeze(0), output_hidden_states=True
    )
    states = out.decoder_hidden_states[-1][0]
    if backbone.config.tie_word_embeddings:
        states = states * backbone.config.d_model**-0.5
    return out.logits[0], states, out.encoder_last_hidden_state[0].mean(0)


def one_trajectory(
    model: GFlowModel, inputs: dict[str, Tensor], b: int, n: int
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """log P_F of each token, log F of each prefix, and the pooled prompt."""
    length = int(inputs["mask"][b, n].sum())
    tokens = inputs["tokens"][b, n, :length]
    prompt = inputs["input_ids"][b, inputs["attention_mask"][b].bool()]
    logits, states, pooled = forward_once(model.backbone, prompt, tokens)
    log_pf, log_flow = [], []
    for at in range(length):
        others = competitors(tokens[:at].tolist(), model.settings)
        scores = logits[at, others].log_softmax(-1)
        log_pf.append(scores[others.index(int(tokens[at]))])
        if model.state_flow is not None:
            flow = model.state_flow.mlp(states[at]).squeeze(-1) + model.state_flow.constant[at]
            if model.settings.forward_looking:
                positive = inputs["tokens"][b, 0][inputs["mask"][b, 0]].tolist()
                agree = sum(x == y for x, y in zip(tokens[:at].tolist(), positive, strict=False))
                flow = flow + model.settings.beta * math.log(1 + agree)
            log_flow.append(flow)
    return log_pf, log_flow, pooled


def flow_losses(
    settings: FlowSettings,
    log_p: list[list[Tensor]],
    log_flow: list[list[Tensor]],
    target: list[Tensor],
    log_z: Tensor | None,
) -> list[Tensor]:
    """The flow loss of each trajectory of one prompt; ``target`` is the shaped log-reward."""
    totals = [sum(steps, torch.tensor(0.0).double()) for steps in log_p]
    losses = []
    if settings.objective == "tb":
        if log_z is None:
            gaps = [r - p for r, p in zip(target, totals, strict=True)]
            log_z = sum(gaps, torch.tensor(0.0).double()) / len(gaps)
        return [(log_z + p - r) ** 2 for p, r in zip(totals, target, strict=True)]
    for steps, flows, reward in zip(log_p, log_flow, target, strict=True):
        states = [*flows, reward]
        last = len(steps)
        pairs = [(i, j) for i in range(last) for j in range(i + 1, last + 1)]
        if settings.objective == "db":
            pairs = [(i, i + 1) for i in range(last)]
        weights = [settings.subtb_lambda ** (j - i) for i, j in pairs]
        total = sum(weights) if settings.objective == "subtb" else 1.0
        loss = torch.tensor(0.0).double()
        for (i, j), weight in zip(pairs, weights, strict=True):
            residual = states[i] + sum(steps[i:j]) - states[j]
            scale = weight / total if settings.objective == "subtb" else 1.0
            loss = loss + scale * residual**2
        losses.append(loss)
    return losses


def fused_reward(model: GFlowModel, signals: Tensor) -> Tensor:
    """R of one trajectory's signals [3]."""
    fusion = model.fusion
    assert fusion is not None
    if fusion.raw is not None:
        positive = torch.log(1 + torch.exp(fusion.raw))
        return (signals * positive).sum() / positive.mean()
    total = signals.sum()
    if fusion.net is None:
        return total
    change = fusion.net(torch.log(1 + signals)).squeeze(-1)
    return torch.log(1 + torch.expm1(total) * torch.exp(change)) + 1e-6


def definition(model: GFlowModel, inputs: dict[str, Tensor]) -> Tensor:
    settings = model.settings
    nlls, flows, counted = [], [], 0
    for b in range(len(ITEMS)):
        valid = [n for n in range(4) if ITEMS[b, n] >= 0]
        counted += len(valid)
        made = {n: one_trajectory(model, inputs, b, n) for n in valid}
        nlls.append(-sum(made[0][0], torch.tensor(0.0).double()))
        if settings.objective == "sft":
            continue
        log_reward = [fused_reward(model, inputs["signals"][b, n].double()).log() for n in valid]
        shaped = [settings.beta * r for r in log_reward]
        if settings.log_reward_floor is not None:
            shaped = [r.clamp_min(settings.log_reward_floor) for r in shaped]
        log_z = None
        if model.partition is not None:
            log_z = model.partition.constant
            if model.partition.mlp is not None:
                log_z = log_z + model.partition.mlp(made[0][2]).squeeze(-1)
        losses = flow_losses(
            settings, [made[n][0] for n in valid], [made[n][1] for n in valid], shaped, log_z
        )
        if settings.importance_clip is not None:
            for at, n in enumerate(valid[1:], start=1):
                log_p = sum(float(step.detach()) for step in made[n][0])
                ratio = math.exp(log_p - float(inputs["log_proposal"][b, n]))
                losses[at] = losses[at] * min(ratio, settings.importance_clip)
        if settings.fusion != "sum":
            plain = [inputs["signals"][b, n].double().sum().log() for n in valid]
            for at, (r, s) in enumerate(zip(log_reward, plain, strict=True)):
                losses[at] = losses[at] + settings.fusion_anchor * (r - s) ** 2
        flows += losses
    prompts = len(ITEMS)
    divide_flow = {"prompt": prompts, "mean": counted, "sum": 1}[settings.reduced_by]
    divide_nll = 1 if settings.reduced_by == "sum" else prompts
    supervised = sum(nlls, torch.tensor(0.0).double()) / divide_nll
    flow = sum(flows, torch.tensor(0.0).double()) / divide_flow
    return supervised + settings.gfn_weight * flow


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_definition(case: str) -> None:
    model = make_model(**CASES[case])
    exact = copy.deepcopy(model).double()
    inputs = make_inputs(model)
    output = model(**inputs)
    output["loss"].backward()
    loss = definition(exact, inputs)
    loss.backward()
    assert output["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    compared = set()
    largest = max(float(p.grad.abs().max()) for p in exact.parameters() if p.grad is not None)
    for (name, mine), wanted in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (mine.grad is None) == (wanted.grad is None), name
        if wanted.grad is None or mine.grad is None:
            continue
        compared.add(name.split(".")[0])
        scale = max(float(wanted.grad.abs().max()), 1e-3 * largest)
        assert float((mine.grad - wanted.grad).abs().max()) < 2e-5 * scale, name
    settings = model.settings
    heads = {"backbone"}
    if settings.objective in ("db", "subtb"):
        heads |= {"state_flow"}
    elif settings.objective == "tb" and settings.partition != "vargrad":
        heads |= {"partition"}
    if settings.fusion != "sum":
        heads |= {"fusion"}
    assert compared == heads


@pytest.mark.parametrize("case", ["tb-children", "db-forward-looking", "subtb-children"])
def test_padding_tokens_reach_neither_loss_nor_gradient(case: str) -> None:
    results = []
    for filler in (0, 7):
        model = make_model(**CASES[case])
        inputs = make_inputs(model)
        inputs["tokens"] = inputs["tokens"].masked_fill(~inputs["mask"], filler)
        inputs["signals"][1, 3] = filler
        loss = model(**inputs)["loss"]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", ["tb", "db", "subtb"])
def test_terms_of_the_loss_are_logged(objective: str) -> None:
    model = make_model(objective=objective, gfn_weight=0.01)
    inputs = make_inputs(model)
    out = model(**inputs)
    joint = out["loss_gr"] + 0.01 * out["loss_gfn"]
    torch.testing.assert_close(out["loss"].detach(), joint)
    _, log_pf = model.log_pf(
        *(inputs[n] for n in ("input_ids", "attention_mask", "tokens", "mask"))
    )
    log_reward = inputs["signals"].sum(-1).log()
    group = gflowgr.vargrad_log_z(log_pf, log_reward, mask=inputs["mask"]).mean()
    torch.testing.assert_close(out["log_z_group"], group.detach())
    assert out["log_z_gap_rms"] >= (out["log_z"] - out["log_z_group"]).abs() - 1e-5


@pytest.mark.parametrize("forward_looking", [False, True])
@pytest.mark.parametrize("objective", ["db", "subtb"])
def test_state_flow_starts_with_residuals_near_zero(objective: str, forward_looking: bool) -> None:
    """Started at zero, the first step would push every trajectory up."""
    losses = {}
    for started in (False, True):
        settings = {"objective": objective, "forward_looking": forward_looking}
        model = make_model(**settings)
        assert model.state_flow is not None
        torch.nn.init.zeros_(model.state_flow.mlp[-1].weight)
        torch.nn.init.zeros_(model.state_flow.constant)
        inputs = make_inputs(model)
        assert not model.flow_started
        if started:
            model.start_flow(flow_start(model.flow_statistics(**inputs)))
            assert model.flow_started
        out = model(**inputs)
        losses[started] = float(out["loss_gfn"])
        if started:
            torch.testing.assert_close(out["log_z"], out["log_z_group"])
    assert losses[True] < 0.5 * losses[False]


@pytest.mark.parametrize("case", ["tb-importance", "subtb-importance"])
def test_importance_weights_are_clipped(case: str) -> None:
    """The cases above have ratios on both sides of their clip, so that ignoring it would show."""
    model = make_model(**CASES[case])
    inputs = make_inputs(model)
    drawn = inputs["mask"].any(-1) & ~inputs["log_proposal"].isnan()
    ratios = (model.log_probs(inputs) - inputs["log_proposal"]).exp()[drawn]
    clip = model.settings.importance_clip
    assert clip is not None
    assert int((ratios < 0.9 * clip).sum()) >= 3
    assert int((ratios > 1.1 * clip).sum()) >= 3
    positives = inputs["mask"].any(-1)[:, 0].sum()
    mean = (ratios.clamp(max=clip).sum() + positives) / inputs["mask"].any(-1).sum()
    torch.testing.assert_close(model(**inputs)["importance"], mean)


def test_importance_weights_need_the_proposal() -> None:
    model = make_model(objective="tb", importance_clip=1.0)
    inputs = make_inputs(model)
    del inputs["log_proposal"]
    with pytest.raises(ValueError, match="log_proposal is required"):
        model(**inputs)
