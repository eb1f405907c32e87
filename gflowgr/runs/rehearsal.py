"""Rehearsals: run four steps of every cell of an experiment, to find errors early."""

from __future__ import annotations

from dataclasses import replace

from .spec import ExperimentSpec, Values, merge

__all__ = ["rehearsal_of"]

_TRAINING: Values = {
    "max_steps": 4,
    "num_train_epochs": 1,
    "warmup_steps": 1,
    "per_device_train_batch_size": 8,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "eval_max_users": 32,
}
_SHRUNK: Values = {
    "collaborative": {"epochs": 1},
    "sft": _TRAINING,
    "finetune": _TRAINING,
    "evaluation": {"max_users": 4},  # the exact catalogue is computed for each
}


def rehearsal_of(spec: ExperimentSpec) -> ExperimentSpec:
    """The same datasets, identifiers and methods with the first seed, four steps and few users."""
    return replace(
        spec,
        seeds=spec.seeds[:1],
        # Over the datasets' and the methods' own values, which come after the base's.
        datasets={name: merge(values, _SHRUNK) for name, values in spec.datasets.items()},
        methods=[
            replace(method, settings=merge(method.settings, {"finetune": _TRAINING}))
            for method in spec.methods
        ],
        caveats=["A rehearsal of four steps: that it ends is all that it tells."],
    )
