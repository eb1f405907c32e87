"""Training: the GFlowGR trainer and the collaborative model's.

``transformers`` is imported when one of the names is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints import last_complete_checkpoint as last_complete_checkpoint
    from .config import GFlowGRConfig as GFlowGRConfig
    from .sasrec import train_sasrec as train_sasrec
    from .trainer import GFlowGRTrainer as GFlowGRTrainer

_MODULE_OF = {
    "GFlowGRConfig": "config",
    "GFlowGRTrainer": "trainer",
    "last_complete_checkpoint": "checkpoints",
    "train_sasrec": "sasrec",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
