"""The configuration of ``gflowgr quickstart``: the whole job in a few minutes on two cores."""

from __future__ import annotations

from typing import Any

from ..models.gflow_model import FlowSettings
from ..models.tiger import TigerConfig
from .config import CollaborativeConfig, DataConfig, RunConfig

__all__ = ["quickstart_config"]


def quickstart_config(
    output_dir: str, *, data: str | None = None, identifiers: str | None = None, seed: int = 42
) -> RunConfig:
    """A small generator, trained briefly.

    Args:
        output_dir: where everything goes.
        data: folder of a dataset; none: the built-in one.
        identifiers: name of the identifiers, if the dataset has several.
        seed: seeds everything.
    """
    shared: dict[str, Any] = {
        "per_device_train_batch_size": 128,
        "lr_scheduler_type": "cosine",
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_max_users": 1000,
        "eval_beams": 10,
    }
    caveats = [
        "This is the quickstart: a generator of half TIGER's width and depth, trained for minutes. "
        "It shows that everything works together; its numbers say little about the method.",
        "lambda 0.1 and beta 4 were chosen on this simulated dataset, by validation N@10. With "
        "lambda 1 and beta 1 (the paper's; beta: the reward's exponent) TB is below continued SFT "
        "here (examples/simulated_paper.yaml): the rewards of a positive and a random item lie "
        "closer together than their probabilities under SFT, and TB then flattens the model.",
        "One seed. Differences of a few per cent are within the spread between seeds.",
    ]
    return RunConfig(
        output_dir=output_dir,
        seed=seed,
        data=DataConfig(path=data, identifiers=identifiers),
        collaborative=CollaborativeConfig(epochs=20, patience=3),
        model=TigerConfig(d_model=64, d_ff=256, d_kv=16, num_heads=4, num_layers=2),
        flow=FlowSettings(objective="tb", gfn_weight=0.1, beta=4.0),
        sft={
            **shared,
            "learning_rate": 3e-3,
            "max_steps": 1600,
            "eval_steps": 200,
            "save_steps": 200,
            "warmup_steps": 100,
            "early_stopping_patience": 3,
        },
        finetune={
            **shared,
            "learning_rate": 5e-4,
            "max_steps": 300,
            "eval_steps": 100,
            "save_steps": 100,
            "warmup_steps": 20,
            "num_trajectories": 4,
        },
        caveats=caveats,
    )
