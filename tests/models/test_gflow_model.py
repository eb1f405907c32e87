"""GFlowModel: the joint objective, and its checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_shop import make_inputs, make_model, shop_catalogue
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from gflowgr.errors import DataError
from gflowgr.models import FlowSettings, GFlowModel, PartitionHead


def expected_loss(model: GFlowModel, inputs: dict[str, Tensor]) -> dict[str, float]:
    """The joint loss of the paper from log P_F, in plain loops."""
    settings = model.settings
    pooled, log_pf = model.log_pf(
        inputs["input_ids"], inputs["attention_mask"], inputs["tokens"], inputs["mask"]
    )
    learned = None if model.partition is None else model.partition(pooled).detach()
    loss_gr = loss_gfn = 0.0
    for b in range(3):
        loss_gr += -sum(log_pf[b, 0].tolist()) / 3
        valid = [n for n in range(4) if bool(inputs["mask"][b, n].any())]
        log_p = {n: sum(log_pf[b, n].tolist()) for n in valid}
        target = {n: settings.beta * float(inputs["log_reward"][b, n]) for n in valid}
        group = sum(target[n] - log_p[n] for n in valid) / len(valid)
        log_z = group if learned is None else float(learned[b])
        loss_gfn += sum((log_z + log_p[n] - target[n]) ** 2 for n in valid) / 3
    return {
        "loss": loss_gr + settings.gfn_weight * loss_gfn,
        "loss_gr": loss_gr,
        "loss_gfn": loss_gfn,
    }


@pytest.mark.parametrize("partition", ["learned", "scalar", "vargrad"])
@pytest.mark.parametrize("normalize", ["vocab", "children"])
@pytest.mark.parametrize(("beta", "gfn_weight"), [(1.0, 1.0), (0.5, 0.1), (2.0, 10.0)])
def test_joint_loss(partition: str, normalize: str, beta: float, gfn_weight: float) -> None:
    model = make_model(
        partition=partition, normalize=normalize, beta=beta, gfn_weight=gfn_weight
    ).eval()
    if model.partition is not None:
        for parameter in model.partition.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    inputs = make_inputs(model)
    output = model(**inputs)
    expected = expected_loss(model, inputs)
    for name, value in expected.items():
        assert output[name].item() == pytest.approx(value, rel=1e-4), name
    if partition == "vargrad":
        assert model.partition is None
        torch.testing.assert_close(output["log_z"], output["log_z_group"])
    output["loss"].backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_normalised_over_children_the_first_tokens_sum_to_one() -> None:
    model = make_model(normalize="children").eval()
    firsts, _ = model.tree.children(0)
    one_each = [int((model.item_tokens()[:, 0] == token).nonzero()[0, 0]) for token in firsts]
    inputs = make_inputs(model)
    tokens = model.item_tokens()[torch.tensor(one_each)].expand(3, -1, -1)
    totals = {}
    for normalize in ("children", "vocab"):
        other = GFlowModel(
            model.backbone, model.tree, model.vocabulary, FlowSettings(normalize=normalize)
        )
        _, log_pf = other.log_pf(inputs["input_ids"], inputs["attention_mask"], tokens)
        totals[normalize] = log_pf[..., 0].exp().sum(-1)
    torch.testing.assert_close(totals["children"], torch.ones(3))
    assert bool((totals["vocab"] < 0.9).all())


def test_sft_reads_the_positive_only() -> None:
    model = make_model(objective="sft").eval()
    inputs = make_inputs(model)
    whole = model(**inputs)
    assert set(whole) == {"loss", "loss_gr"}
    del inputs["log_reward"]
    inputs["tokens"][:, 1:] = -7  # no token at all
    torch.testing.assert_close(model(**inputs)["loss"], whole["loss"])
    _, log_pf = model.log_pf(inputs["input_ids"], inputs["attention_mask"], inputs["tokens"][:, :1])
    assert whole["loss"].item() == pytest.approx(-log_pf.sum().item() / 3, rel=1e-5)


def test_tb_needs_rewards() -> None:
    model = make_model()
    inputs = make_inputs(model)
    del inputs["log_reward"]
    with pytest.raises(ValueError, match=r"log_reward or signals is required by .* 'tb'.*neither"):
        model(**inputs)
    both = {"log_reward": torch.zeros(3, 4), "signals": torch.ones(3, 4, 3)}
    with pytest.raises(ValueError, match="one of them only; got both"):
        model(**inputs, **both)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "ppo"}, "objective must be one of"),
        ({"partition": "none"}, "partition must be one of"),
        ({"normalize": "all"}, "normalize must be one of"),
        ({"beta": -1.0}, "beta must be finite and > 0; got -1.0"),
        ({"gfn_weight": math.nan}, "gfn_weight must be finite and > 0; got nan"),
        ({"max_history": 0}, "max_history must be >= 1; got 0"),
        (
            {"gfn_weight": 0.0},
            "gfn_weight must be finite and > 0; got 0.0; for no flow loss: .*sft",
        ),
        ({"subtb_lambda": 0.0}, "subtb_lambda must be finite and > 0; got 0.0"),
        ({"importance_clip": -1.0}, "importance_clip must be finite and > 0; got -1.0"),
        ({"log_reward_floor": -math.inf}, "log_reward_floor must be finite; got -inf"),
        ({"reduction": "none"}, "reduction must be one of"),
        ({"fusion": "max"}, "fusion must be one of"),
        ({"fusion_anchor": -1.0}, "fusion_anchor must be finite and >= 0; got -1.0"),
        (
            {"sft_weight": 1.0},
            "sft_weight is of the objectives 'dpo', .* got 1.0 with .*'sft'",
        ),
        ({"preference_beta": 1.0, "objective": "db"}, "preference_beta is of the objectives dpo"),
        ({"preference_beta": 0.0, "objective": "dpo"}, "preference_beta must be finite and > 0"),
        ({"sft_weight": -1.0, "objective": "dpo"}, "sft_weight must be finite and >= 0; got -1.0"),
        ({"fusion": "mlp", "objective": "grpo"}, "fusion 'mlp' is learned by flow losses"),
        ({"importance_clip": 2.0, "objective": "grpo"}, "importance_clip is of the flow object"),
        ({"signals": []}, "signals must be a list of names"),
        ({"signals": ["r_b"]}, "'r_b' is neither one of"),
        ({"objective": "tb", "forward_looking": True}, "forward_looking needs objective 'db'"),
        (
            {"objective": "db", "forward_looking": True, "signals": ["r_a"]},
            "forward_looking needs the signal 'r_sim'",
        ),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowSettings(**settings)


def test_other_settings_start_from_equal_but_independent_weights() -> None:
    start = make_model(objective="sft").eval()
    inputs = make_inputs(start)
    before = start(**inputs)["loss"].detach()
    other = start.with_settings(objective="tb").eval()
    assert isinstance(other.partition, PartitionHead)
    assert other(**inputs)["loss_gr"].item() == pytest.approx(float(before), rel=1e-6)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    assert float(start(**inputs)["loss"].detach()) == float(before)


# ---- checkpoints ----


@pytest.mark.parametrize(
    "settings",
    [
        {"partition": "learned"},
        {"partition": "scalar"},
        {"partition": "vargrad"},
        {"objective": "db", "forward_looking": True, "fusion": "weighted"},
        {"objective": "subtb", "fusion": "mlp", "signals": ["r_a", "r_sim", "my.module:Signal"]},
    ],
    ids=["learned", "scalar", "vargrad", "db", "subtb"],
)
def test_saved_model_is_the_same_model(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {"beta": 0.7, "normalize": "children", **settings}
    model = make_model(**settings).eval()
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone."):
            torch.nn.init.normal_(parameter)
    if not model.flow_started:
        model.start_flow(torch.randn(4))
    model.save_pretrained(tmp_path)
    loaded = GFlowModel.from_pretrained(tmp_path).eval()
    assert loaded.settings == model.settings
    assert loaded.vocabulary == model.vocabulary
    assert torch.equal(loaded.item_tokens(), model.item_tokens())
    inputs = make_inputs(model)
    if model.fusion is not None and model.fusion.learned:
        del inputs["log_reward"]
        inputs["signals"] = torch.rand(3, 4, len(model.settings.signals))
    for name, value in model(**inputs).items():
        assert torch.equal(loaded(**inputs)[name], value), name
    assert loaded.flow_started
    # And in place, into a model that had other weights.
    other = make_model(**settings, seed=1).eval()
    assert not torch.equal(other(**inputs)["loss"], model(**inputs)["loss"])
    other.load_weights(tmp_path)
    assert torch.equal(other(**inputs)["loss"], model(**inputs)["loss"])


def test_checkpoint_is_an_ordinary_transformers_checkpoint(tmp_path: Path) -> None:
    model = make_model().eval()
    model.save_pretrained(tmp_path)
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    inputs = make_inputs(model)
    labels = inputs["tokens"][:, 0].contiguous()
    logits = plain(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels
    ).logits
    log_p = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    _, log_pf = model.log_pf(inputs["input_ids"], inputs["attention_mask"], inputs["tokens"][:, :1])
    torch.testing.assert_close(log_pf[:, 0], log_p, rtol=1e-4, atol=1e-5)
    assert plain.config.vocab_size == shop_catalogue().vocabulary.size


def _without_description(folder: Path) -> None:
    (folder / "gflowgr.json").unlink()


def _other_format(folder: Path) -> None:
    values = json.loads((folder / "gflowgr.json").read_text())
    (folder / "gflowgr.json").write_text(json.dumps({**values, "format": 99}))


def _unknown_setting(folder: Path) -> None:
    values = json.loads((folder / "gflowgr.json").read_text())
    values["settings"]["colour"] = "red"
    (folder / "gflowgr.json").write_text(json.dumps(values))


def _truncated_description(folder: Path) -> None:
    (folder / "gflowgr.json").write_text('{"format": 1,')


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncated_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _without_heads(folder: Path) -> None:
    (folder / "heads.safetensors").unlink()


def _without_tree(folder: Path) -> None:
    (folder / "tree.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_description, "is not a gflowgr checkpoint: it has no gflowgr.json"),
        (_other_format, "format must be 1; got 99"),
        (_unknown_setting, "not what this version writes: .*colour"),
        (_truncated_description, "not valid JSON"),
        (_without_weights, "incomplete or damaged"),
        (_truncated_weights, "incomplete or damaged"),
        (_without_heads, "incomplete or damaged"),
        (_without_tree, "incomplete or damaged"),
    ],
)
def test_damaged_checkpoint_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    """By its manifest, and where a folder has none by what the files themselves say."""
    make_model().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=r"incomplete or damaged|it has no gflowgr\.json") as caught:
        GFlowModel.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match=message) as caught:
        GFlowModel.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing is not a folder, nor the id of a model"):
        GFlowModel.from_pretrained(tmp_path / "nothing")


def test_a_partition_head_starts_once_where_it_is_told() -> None:
    head = PartitionHead(4)
    assert not head.initialised
    head.initialise(torch.tensor(-3.5))
    assert head.initialised
    assert head(torch.randn(2, 4)).tolist() == [-3.5, -3.5]
