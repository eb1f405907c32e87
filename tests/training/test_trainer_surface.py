"""Every argument and public method of ``transformers.Trainer`` is honoured, or refused by name."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.tiny_shop import make_args, make_model, shop
from support.tiny_trainer import make_trainer, steps
from transformers import Trainer, TrainingArguments

from gflowgr.data import LeaveOneOut, generate_builtin
from gflowgr.models import GFlowModel
from gflowgr.training.trainer_surface import (
    HONOURED_ARGUMENTS,
    HONOURED_METHODS,
    REFUSED_ARGUMENTS,
    REFUSED_METHODS,
)

ADVICE = (
    "transformers %s has %s that gflowgr/training/trainer_surface.py does not name: %s; find out "
    "whether GFlowGRTrainer honours them, and put them into one of its lists"
)


def test_every_argument_is_in_one_of_the_lists() -> None:
    assert not HONOURED_ARGUMENTS & REFUSED_ARGUMENTS.keys()
    known = HONOURED_ARGUMENTS | REFUSED_ARGUMENTS.keys()
    new = {field.name for field in fields(TrainingArguments)} - known
    assert not new, ADVICE % (transformers.__version__, "arguments", sorted(new))


def test_every_public_method_is_in_one_of_the_lists() -> None:
    assert not HONOURED_METHODS & REFUSED_METHODS.keys()
    methods = {name for name, _ in inspect.getmembers(Trainer) if not name.startswith("_")}
    new = methods - HONOURED_METHODS - REFUSED_METHODS.keys()
    assert not new, ADVICE % (transformers.__version__, "methods", sorted(new))


OTHER_VALUES: dict[str, Any] = {
    "label_smoothing_factor": 0.1,
    "label_names": ["labels"],
    "average_tokens_across_devices": False,
    "neftune_noise_alpha": 5.0,
    "liger_kernel_config": {"rope": True},
    "eval_do_concat_batches": False,
    "eval_accumulation_steps": 2,
    "include_for_metrics": ["loss"],
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "size",
    "accelerator_config": {"split_batches": True},
    "optim_target_modules": "all-linear",
    "parallelism_config": {"tp_size": 2},
    "hub_strategy": "end",
    "hub_revision": "dev",
    "deepspeed": {"zero_optimization": {"stage": 3}},
}


@pytest.mark.parametrize("name", sorted(REFUSED_ARGUMENTS))
def test_a_refused_argument_is_named(name: str, tmp_path: Path) -> None:
    if name not in {field.name for field in fields(TrainingArguments)}:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with pytest.raises(ValueError, match=rf"^{name} must be .*; got "):
        make_args(tmp_path, **{name: OTHER_VALUES.get(name, True)})


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_trainer(make_args(tmp_path_factory.mktemp("surface")), make_model(objective="sft"))


@pytest.mark.parametrize("name", sorted(REFUSED_METHODS))
def test_a_refused_method_says_what_to_do_instead(name: str, trainer: Any) -> None:
    with pytest.raises(NotImplementedError, match=rf"^GFlowGRTrainer has no {name}\(\): \w+"):
        getattr(trainer, name)(shop().train)


def test_another_split_can_be_evaluated_and_nothing_else(trainer: Any) -> None:
    other = LeaveOneOut(generate_builtin(seed=7, num_users=40, num_items=200), max_history=8)
    assert trainer.evaluate(eval_dataset=other)["eval_num_users"] == 30
    assert (
        trainer.evaluate(other, metric_key_prefix="x")["x_N@10"] != trainer.evaluate()["eval_N@10"]
    )
    with pytest.raises(ValueError, match=r"eval_dataset must be None or a Split .*; got list"):
        trainer.evaluate(eval_dataset=[1, 2, 3])
    few = LeaveOneOut(generate_builtin(seed=7, num_users=40, num_items=210), max_history=8)
    with pytest.raises(ValueError, match="eval_dataset must have 200 items; got 210"):
        trainer.evaluate(eval_dataset=few)


def test_a_model_card_is_written(trainer: Any) -> None:
    trainer.create_model_card(model_name="the shop's", tags=["gflowgr"])
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "the shop's" in card
    assert "- gflowgr" in card


def test_a_push_is_the_models_own(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the arguments' repository, token and privacy, and nothing of the output folder."""
    pushed: list[tuple[str, dict[str, Any]]] = []

    def push(model: GFlowModel, repo_id: str, **options: Any) -> str:
        assert model is trainer.model
        pushed.append((repo_id, options))
        return "the commit"

    monkeypatch.setattr(GFlowModel, "push_to_hub", push)
    assert trainer.push_to_hub() == "the commit"
    monkeypatch.setattr(trainer.args, "hub_model_id", "me/shop")
    monkeypatch.setattr(trainer.args, "hub_token", "secret")
    monkeypatch.setattr(trainer.args, "hub_private_repo", True)
    trainer.push_to_hub()
    trainer.push_to_hub("done", token="other", private=False, card="mine")
    one = {"message": "End of training", "card": None, "private": None, "token": None}
    two = {**one, "private": True, "token": "secret"}
    three = {"message": "done", "card": "mine", "private": False, "token": "other"}
    state = {"state": None}  # that of a sharded model
    assert pushed == [
        (Path(trainer.args.output_dir).name, one | state),
        ("me/shop", two | state),
        ("me/shop", three | state),
    ]
    for options in ({"blocking": False}, {"revision": "dev"}, {"tags": ["shop"]}):
        with pytest.raises(ValueError, match=rf"^{next(iter(options))} must be .* push_to_hub\(\)"):
            trainer.push_to_hub(**options)


def test_a_batch_that_fits_is_found(tmp_path: Path) -> None:
    """And a step's examples are then those of a training with that batch size."""
    seen: dict[bool, list[list[int]]] = {}
    for finds, size in ((True, 100), (False, 90)):
        args = make_args(tmp_path, auto_find_batch_size=finds, per_device_train_batch_size=size)
        trainer = make_trainer(args, make_model(objective="sft"))
        own, batches = trainer.compute_loss, seen.setdefault(finds, [])

        def loss(
            model: Any, inputs: Any, own: Any = own, batches: Any = batches, **options: Any
        ) -> Any:
            if len(inputs["example"]) > 95:
                raise RuntimeError("CUDA out of memory. (simulated: above 95)")
            batches.append(inputs["example"].tolist())
            return own(model, inputs, **options)

        trainer.compute_loss = loss
        trainer.train()
        assert [entry["step"] for entry in steps(trainer)] == [1, 2]
    assert [len(batch) for batch in seen[False]] == [90, 90]
    assert seen[True] == seen[False]


def test_several_processes_cannot_each_find_a_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = make_args(tmp_path, auto_find_batch_size=True)
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(ValueError, match="auto_find_batch_size must be False with several"):
        make_trainer(args)


def test_data_seed_chooses_the_order_alone(tmp_path: Path) -> None:
    orders = [
        list(make_trainer(make_args(tmp_path, seed=seed, data_seed=data_seed))._order)
        for seed, data_seed in ((3, None), (5, 3), (3, 5))
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
