"""The changes to T5 and dropout as a whole: one switch, and undoing them restores the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_models import padded_prompts, small_model
from support.tiny_shop import make_args, make_model
from support.tiny_trainer import make_trainer
from torch import nn
from transformers import TrainerCallback

from gflowgr.models.t5_on_cpu import restore, rewired

OURS = "gflowgr.models.t5_on_cpu"


def state_of(model: nn.Module) -> list[Any]:
    """All that can be told of a model's modules and configurations, but for its weights."""
    found: list[Any] = []
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        kept = None if config is None else (config.to_dict(), config._attn_implementation)
        found.append((name, type(module), sorted(vars(module)), sorted(module._modules), kept))
    return found


def changed(model: nn.Module) -> set[str]:
    """Names of the classes of ours that are in a model, and of its attention."""
    kinds = {type(m).__name__ for m in model.modules() if type(m).__module__ == OURS}
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    return kinds | {c._attn_implementation for c in configs} - {"sdpa", "eager", None}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("t5", {"_T5", "_CheapDropout", "gflowgr_dense"}),
        ("t5-gated-untied", {"_T5Gated", "_CheapDropout", "gflowgr_dense"}),
        ("mt5", {"_MT5Gated", "_CheapDropout", "gflowgr_dense"}),
        ("umt5", {"_CheapDropout"}),
        ("gpt2", {"_CheapDropout", "gflowgr_dense"}),
    ],
)
def test_a_model_is_restored_exactly(name: str, wanted: set[str]) -> None:
    model = small_model(name)
    ids, mask = padded_prompts("right")
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    before, loss = state_of(model), model(**inputs).loss
    with rewired(model):
        assert changed(model) == wanted
        torch.testing.assert_close(model(**inputs).loss, loss)
        twin = copy.deepcopy(model)
    assert state_of(model) == before
    assert torch.equal(model(**inputs).loss, loss)
    assert changed(twin) == wanted  # made within, of which the context does not know
    restore(twin)
    assert state_of(twin) == before


def _fail(model: nn.Module) -> None:
    assert changed(model)
    raise ArithmeticError("on the way")


def test_an_error_undoes_the_changes_and_a_choice_of_the_user_stays() -> None:
    model = small_model("t5")
    model.set_attn_implementation("eager")
    before = state_of(model)
    with pytest.raises(ArithmeticError), rewired(model):
        _fail(model)
    assert state_of(model) == before
    assert model.encoder.config._attn_implementation == "eager"


class Look(TrainerCallback):
    """What is changed in a model at each step of its training."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(changed(kwargs["model"]))


@pytest.mark.parametrize("switch", [True, False])
def test_the_trainer_changes_the_model_while_it_trains_if_the_switch_is_on(
    switch: bool, tmp_path: Path
) -> None:
    model, look = make_model(dropout=0.1), Look()
    before = state_of(model.backbone)
    trainer = make_trainer(make_args(tmp_path, t5_on_cpu=switch), model, look)
    assert state_of(model.backbone) == before
    trainer.train()
    assert state_of(model.backbone) == before
    wanted = {"_T5", "_CheapDropout", "gflowgr_dense"} if switch else set()
    assert look.seen == [wanted] * 2
