"""A training step on a GPU does not synchronise, except to read the items of a curriculum."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_shop import make_args, make_model, make_scorer, shop

from gflowgr.training import GFlowGRTrainer
from gflowgr.transfer import to_device


@pytest.fixture
def noticed_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("warn")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.usefixtures("noticed_waits")
@pytest.mark.parametrize(("objective", "waits"), [("sft", 0), ("tb", 1), ("db", 1)])
def test_a_step_waits_only_for_the_items_of_the_curriculum(
    tmp_path: Path, objective: str, waits: int
) -> None:
    model = make_model(objective=objective)
    trainer = GFlowGRTrainer(
        model, make_args(tmp_path, max_steps=9), shop(), collaborative=make_scorer()
    )
    trainer.model.to("cuda").train()
    trainer.create_optimizer_and_scheduler(9)
    batches = iter(trainer.get_train_dataloader())
    for step in range(4):
        batch = next(batches)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trainer.training_step(trainer.model, batch)
            trainer.optimizer.step()
        found = [str(w.message) for w in seen if "synchronizing" in str(w.message)]
        if step:  # the first one checks values, and starts log Z
            assert len(found) == waits, found


def test_a_batch_stays_on_the_host_but_for_its_prompts(tmp_path: Path) -> None:
    """On the meta device, which no value comes back from."""
    trainer = GFlowGRTrainer(make_model(), make_args(tmp_path), shop(), collaborative=make_scorer())
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.args), "device", torch.device("meta"))
        held = trainer._prepare_inputs(batch)
    on = {name: value.device.type for name, value in held.items()}
    assert on.pop("input_ids") == on.pop("attention_mask") == "meta"
    assert set(on) >= {"histories", "example", "user", "target", "behaviour"}
    assert set(on.values()) == {"cpu"}


def test_arrays_and_tensors_are_moved_alike() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    for given in (values, torch.from_numpy(values)):
        assert torch.equal(to_device(given, "cpu"), torch.from_numpy(values))
        assert to_device(given, torch.device("meta")).shape == (2, 3)
