"""Experiment trackers (TensorBoard, W&B, MLflow, ...): checked early, all stages in one folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_trackers", "tracked"]


def check_trackers(report_to: str | Sequence[str] | None) -> list[str]:
    """The trackers of ``report_to``, as :class:`transformers.TrainingArguments` has it.

    Args:
        report_to: names, ``"none"``, or ``"all"`` for those that are installed.

    Raises:
        ValueError: one is unknown or not installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    if names in ([], ["none"]):
        return []
    from transformers.integrations import integration_utils

    installed = integration_utils.get_available_reporting_integrations()
    if names == ["all"]:
        return list(installed)
    for name in names:
        if name in installed:
            continue
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            known = ", ".join(integration_utils.INTEGRATION_TO_CALLBACK)
            raise ValueError(f"report_to must be 'none', 'all' or of {known}; got {name!r}")
        raise ValueError(
            f"report_to must be trackers that are installed, which are {installed or 'none'}; got "
            f"{name!r}: pip install {name}"
        )
    return names


@contextmanager
def tracked(trackers: Sequence[str], logs: Path, stage: str) -> Iterator[None]:
    """Within the block, trackers of ``transformers`` write below ``logs``, a run per stage.

    TensorBoard writes to ``logs/<stage>``, W&B's files go to ``logs``, MLflow's to ``logs/mlruns``.
    What the environment says already (``TENSORBOARD_LOGGING_DIR``, ``WANDB_DIR``,
    ``MLFLOW_TRACKING_URI``) stays. A trainer must be made and run within the block.

    Args:
        trackers: their names; none: nothing is done.
        logs: made if it is not there.
        stage: of a run, such as ``"sft"``.
    """
    if not trackers:
        yield
        return
    logs.mkdir(parents=True, exist_ok=True)
    places = {
        "TENSORBOARD_LOGGING_DIR": str(logs / stage),
        "WANDB_DIR": str(logs),
        "WANDB_NAME": stage,
        "MLFLOW_TRACKING_URI": (logs / "mlruns").resolve().as_uri(),
        "MLFLOW_RUN_NAME": stage,
    }
    mine = {name: value for name, value in places.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            del os.environ[name]
        # Its run goes on beyond a training, and the next stage would be written into it.
        wandb = sys.modules.get("wandb")
        if "wandb" in trackers and getattr(wandb, "run", None) is not None:
            assert wandb is not None
            wandb.finish()
