"""SPRec and IPA: which steps are supervised, against which model, and resume within a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_shop import make_args, make_model
from support.tiny_trainer import Killed, StopAt, assert_equal_weights, make_trainer, steps, weights
from transformers import TrainerCallback

from gflowgr.training.rounds import Rounds

OPTIONS: dict[str, dict[str, Any]] = {
    "sprec": {
        "num_trajectories": 2,
        "sampler": "on_policy",
        "sampler_options": {"refresh_steps": 1, "num_proposals": 1},  # greedy
        "round_steps": 4,
    },
    "ipa": {
        "num_trajectories": 5,
        "sampler": "on_policy",
        "sampler_options": {"refresh_steps": 2},
        "round_steps": 4,
    },
}
# Of steps 0 to 7: those with a preference term, and those before which the reference is made.
PREFERENCE = {"sprec": [2, 3, 6, 7], "ipa": [0, 2, 4, 6]}
FROZEN = {"sprec": [2, 6], "ipa": [0, 4]}


def args(objective: str, folder: Path, **changes: Any) -> Any:
    options = {"max_steps": 8, "per_device_train_batch_size": 64, "learning_rate": 1e-2}
    return make_args(folder, **{**options, **OPTIONS[objective], **changes})


class Watch(TrainerCallback):
    """Keeps what the model and its reference were before each step."""

    def __init__(self) -> None:
        self.models: list[dict[str, torch.Tensor]] = []
        self.references: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        named = model.backbone.named_parameters()
        self.models.append({name: value.detach().clone() for name, value in named})
        self.references.append(model.reference.weights)


@pytest.mark.parametrize("objective", OPTIONS)
def test_rounds(objective: str, tmp_path: Path) -> None:
    watch = Watch()
    trainer = make_trainer(args(objective, tmp_path), make_model(objective=objective), watch)
    trainer.train()
    log = steps(trainer)
    assert len(log) == 8
    with_pairs = [step for step, entry in enumerate(log) if "preference_margin" in entry]
    assert with_pairs == PREFERENCE[objective]
    assert all("loss_gr" in entry for entry in log)
    for step in range(8):
        frozen = max((s for s in FROZEN[objective] if s <= step), default=0)
        assert_equal_weights(watch.references[step], watch.models[frozen])
    for step in with_pairs:
        apart = log[step]["reference_divergence"]
        assert (apart > 1e-4) == (step not in FROZEN[objective])


@pytest.mark.parametrize("objective", OPTIONS)
def test_resumed_within_a_round(objective: str, tmp_path: Path) -> None:
    """Bit for bit; the checkpoint of step 3 has the reference of the round."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}

    def model(seed: int = 0) -> Any:
        return make_model(objective=objective, dropout=0.2, seed=seed)

    whole = make_trainer(args(objective, tmp_path / "whole", **options), model())
    whole.train()
    cut = make_trainer(args(objective, tmp_path / "cut", **options), model(), StopAt(4))
    with pytest.raises(Killed):
        cut.train()
    resumed = make_trainer(args(objective, tmp_path / "cut", **options), model(seed=7))
    resumed.train(resume_from_checkpoint=True)
    assert resumed._initial_global_step == 3
    assert_equal_weights(weights(resumed), weights(whole))


def test_ipa_on_one_percent_of_the_samples_is_one_round_by_default() -> None:
    rounds = Rounds("ipa", None, 100)
    assert sum(not rounds.is_supervised(step) for step in range(1000)) == 10
    assert [step for step in range(1000) if rounds.freezes_reference(step)] == [0]


def test_other_objectives_have_no_rounds() -> None:
    assert not any(Rounds("tb", None, 10).is_supervised(step) for step in range(20))


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("sprec", {"round_steps": None}, "round_steps must be even for objective 'sprec'.*None"),
        ("sprec", {"round_steps": 3}, "half of it SFT and half DPO; got 3"),
        ("sprec", {"num_trajectories": 3}, "num_trajectories must be 2 for objective 'sprec'"),
        ("sprec", {"sampler": "random"}, "'sprec' needs trajectories of the present model"),
        ("ipa", {"num_trajectories": 2}, "num_trajectories must be >= 3 for objective 'ipa'"),
        ("ipa", {"sampler": "random"}, "'ipa' needs trajectories of the present model"),
    ],
)
def test_arguments_that_make_no_rounds(
    objective: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(args(objective, tmp_path, **options), make_model(objective=objective))


def test_rounds_are_refused_by_other_objectives(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"round_steps is of the objectives 'sprec' and 'ipa'"):
        make_trainer(make_args(tmp_path, round_steps=4), make_model(objective="tb"))
