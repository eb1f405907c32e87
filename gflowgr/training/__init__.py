"""Training: the GFlowGR trainer and the collaborative model's.

``transformers`` is imported when one of the names is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints import last_complete_checkpoint as last_complete_checkpoint
    from .config import GFlowGRConfig as GFlowGRConfig
    from .cross_fitting import Calibration as Calibration
    from .cross_fitting import calibrate_temperature as calibrate_temperature
    from .cross_fitting import train_average as train_average
    from .cross_fitting import train_cross_fitted as train_cross_fitted
    from .sasrec import train_sasrec as train_sasrec
    from .trainer import GFlowGRTrainer as GFlowGRTrainer

_MODULE_OF = {
    "Calibration": "cross_fitting",
    "GFlowGRConfig": "config",
    "GFlowGRTrainer": "trainer",
    "calibrate_temperature": "cross_fitting",
    "last_complete_checkpoint": "checkpoints",
    "train_average": "cross_fitting",
    "train_cross_fitted": "cross_fitting",
    "train_sasrec": "sasrec",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
