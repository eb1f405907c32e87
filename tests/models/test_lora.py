"""LoRA: what trains, what stays, and what is saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from support.small_models import padded_prompts, small_model
from support.tiny_causal import causal_folder, causal_model
from support.tiny_shop import make_args
from support.tiny_trainer import assert_equal_weights, make_trainer
from torch import Tensor
from transformers import AutoModelForCausalLM

from gflowgr.errors import DataError
from gflowgr.evaluation.generative import GenerativeRecommender
from gflowgr.models import (
    CausalConfig,
    GFlowModel,
    LoraSettings,
    add_lora,
    output_head,
    prompt_tokens,
    trajectory_hidden_states,
)

BACKBONES: dict[str, Any] = {
    "tied, gpt2": {"family": "gpt2"},
    "tied, qwen3": {"family": "qwen3", "tie_word_embeddings": True},
    "untied, llama": {"family": "llama", "tie_word_embeddings": False},
}


def config(folder: Path, **changes: Any) -> CausalConfig:
    lora = LoraSettings(r=4, alpha=8.0)
    return CausalConfig(str(causal_folder(folder, **changes)), lora=lora)


def log_pf(model: GFlowModel) -> Tensor:
    items = model.item_tokens()
    ids, mask = prompt_tokens(torch.tensor([[3, 4, 5], [6, -1, -1]]), items, model.prompt)
    with torch.no_grad():
        return model.log_pf(ids, mask, items[torch.tensor([[1, 2, 9], [3, 4, 100]])])[1]


def tables(model: GFlowModel) -> list[Tensor]:
    """Embedding and head as the model uses them."""
    backbone = model.backbone
    parts = (backbone.get_input_embeddings(), backbone.get_output_embeddings())
    return [part.weight.detach().clone() for part in parts]


@pytest.mark.parametrize("normalize", ["vocab", "children"])
@pytest.mark.parametrize("changes", BACKBONES.values(), ids=list(BACKBONES))
def test_new_rows_and_adapters_train_and_nothing_else(
    changes: dict[str, Any], normalize: str, tmp_path: Path
) -> None:
    model = causal_model(config(tmp_path / "base", **changes), normalize=normalize).train()
    first, last = model.vocabulary.offset, model.vocabulary.size
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    rows_before = tables(model)
    make_trainer(make_args(tmp_path / "out", max_steps=2), model).train()
    for old, new in zip(rows_before, tables(model), strict=True):
        assert torch.equal(new[:first], old[:first])
        changed = (new[first:last] != old[first:last]).any(1)
        assert bool(changed.all())
        assert torch.equal(new[last:], old[last:])
    assert torch.equal(*tables(model)) == (model_kind(model) == "tied")
    for name, value in model.backbone.state_dict().items():
        trained = "lora_" in name or "trainable_tokens_delta" in name
        assert torch.equal(value, before[name]) != trained, name


def model_kind(model: GFlowModel) -> str:
    return "tied" if model.backbone.config.tie_word_embeddings else "untied"


@pytest.mark.parametrize("changes", BACKBONES.values(), ids=list(BACKBONES))
def test_saved_model_is_ordinary_and_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    model = causal_model(config(tmp_path / "base", **changes)).eval()
    _disturb(model)
    expected, weights = log_pf(model), model.backbone.state_dict()
    before = {name: value.clone() for name, value in weights.items()}
    model.save_pretrained(tmp_path / "saved")
    assert_equal_weights(model.backbone.state_dict(), before)  # still with adapters

    assert not (tmp_path / "saved" / "adapter_config.json").exists()
    loaded = GFlowModel.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(log_pf(loaded), expected, rtol=1e-4, atol=1e-4)
    assert loaded.prompt == model.prompt
    assert loaded.tokenizer.convert_tokens_to_ids("<a_0>") == model.vocabulary.offset
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert type(plain) is type(model.backbone)
    ids = torch.tensor([[5, 6, 7, model.vocabulary.offset]])
    with torch.no_grad():
        found, wanted = (m(input_ids=ids).logits for m in (plain, model.backbone))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    histories = [torch.tensor([1, 2, 3]).numpy()]
    ours, theirs = (GenerativeRecommender(m).recommend(histories, 5) for m in (model, loaded))
    assert ours[0].tolist() == theirs[0].tolist()


def test_training_checkpoint_holds_adapters_only(tmp_path: Path) -> None:
    settings = config(tmp_path / "base")
    model = causal_model(settings).eval()
    _disturb(model)
    model.save_checkpoint(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    other = causal_model(settings, seed=0).eval()
    assert not torch.equal(log_pf(other), log_pf(model))
    other.load_weights(tmp_path / "saved")
    assert torch.equal(log_pf(other), log_pf(model))
    with pytest.raises(DataError, match="holds adapters only: it is a checkpoint of a training"):
        GFlowModel.from_pretrained(tmp_path / "saved")
    wider = causal_model(CausalConfig(settings.path, lora=LoraSettings(target_modules=["q_proj"])))
    with pytest.raises(RuntimeError, match=r"size mismatch|adapters of another model"):
        wider.load_weights(tmp_path / "saved")


def test_what_trains_is_float32_beside_bfloat16_weights(tmp_path: Path) -> None:
    settings = config(tmp_path)
    model = causal_model(replace(settings, dtype="bfloat16"))
    for name, parameter in model.backbone.named_parameters():
        trained = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype == trained, name
    assert bool(log_pf(model).isfinite().all())


def test_adapters_of_peft_itself_run_set_wise() -> None:
    """Whoever calls peft in a trainer of their own gets the states of the adapted model."""
    model = get_peft_model(small_model("llama"), LoraConfig(init_lora_weights=False, r=4)).eval()
    ids, mask = padded_prompts("right")
    tokens = ids[:, None, :2] + 0
    states = trajectory_hidden_states(model, ids, mask, tokens)
    weight, _ = output_head(model)
    with torch.no_grad():
        expected = model(input_ids=ids[:1]).logits[0, -1]  # a prompt without padding
    torch.testing.assert_close(states.hidden[0, 0, 0] @ weight.T, expected, rtol=1e-4, atol=1e-4)


def test_adapters_that_would_be_missed_are_refused(tmp_path: Path) -> None:
    head = get_peft_model(small_model("llama"), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(TypeError, match="output head is a Linear with an adapter of its own"):
        output_head(head)
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(TypeError, match="of the kind PROMPT_TUNING, which add tokens"):
        output_head(get_peft_model(small_model("llama"), prompt))
    model = causal_model(replace(config(tmp_path), lora=None))
    settings = LoraSettings(target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"lora\.target_modules has 'lm_head'"):
        add_lora(model.backbone, settings, model.vocabulary)


def test_one_set_of_adapters_at_a_time(tmp_path: Path) -> None:
    model = causal_model(config(tmp_path))
    with pytest.raises(ValueError, match="model has adapters already"):
        add_lora(model.backbone, LoraSettings(), model.vocabulary)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "lora.r must be >= 1; got 0"),
        ({"alpha": 0.0}, "lora.alpha must be > 0; got 0.0"),
        ({"dropout": 1.0}, "lora.dropout must be in .0, 1.; got 1.0"),
    ],
)
def test_bad_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraSettings(**values)


def _disturb(model: GFlowModel) -> None:
    """Fresh adapters change nothing; these do."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
