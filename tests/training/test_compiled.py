"""``torch_compile`` of the trainer's arguments: the same training, the same files."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from support.tiny_shop import make_args, make_model
from support.tiny_trainer import make_trainer, reproducible

from gflowgr.models import GFlowModel
from gflowgr.training import GFlowGRTrainer


def trained(folder: Path, objective: str, backend: str | None) -> GFlowGRTrainer:
    torch._dynamo.reset()
    args = make_args(
        folder,
        torch_compile_backend=backend,  # with one, torch_compile is on
        save_strategy="steps",
        save_steps=2,
    )
    trainer = make_trainer(args, make_model(objective=objective))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*alias.*")
        trainer.train()
    return trainer


@pytest.mark.parametrize("objective", [pytest.param("sft", marks=pytest.mark.slow), "tb"])
def test_compiled_training_is_the_same(objective: str, tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", objective, None)
    compiled = trained(tmp_path / "compiled", objective, "aot_eager")
    assert compiled.args.torch_compile
    for wanted, found in zip(reproducible(plain), reproducible(compiled), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    saved = [
        GFlowModel.from_pretrained(tmp_path / name / "checkpoint-2")
        for name in ("plain", "compiled")
    ]
    for wanted, found in zip(*(model.state_dict().values() for model in saved), strict=True):
        torch.testing.assert_close(found, wanted)
