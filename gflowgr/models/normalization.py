"""Over what a token's probability is normalised: what a model was trained with, and the default."""

from __future__ import annotations

import warnings
from typing import Any, cast

from .settings import Normalize

__all__ = ["chosen_normalize", "record_normalize"]

_RECORD = "gflowgr_normalize"
"""In the model's configuration, so that it is saved and loaded with any checkpoint of it."""


def record_normalize(model: Any, normalize: Normalize) -> None:
    """Write into the configuration of ``model`` what it is trained with."""
    setattr(model.config, _RECORD, normalize)


def chosen_normalize(model: Any, normalize: Normalize | None) -> Normalize:
    """What a call with ``normalize`` uses: with None what the model was trained with, where it
    says so, else ``"children"``, the default wherever there is a tree.

    Warns where the model says one thing and the call another: they rank differently.
    """
    trained = getattr(getattr(model, "config", None), _RECORD, None)
    if normalize is None:
        return cast("Normalize", trained or "children")
    if trained not in (None, normalize):
        warnings.warn(
            f"model was trained with normalize={trained!r}, and is used with {normalize!r}, which "
            "ranks differently; leave normalize out to use it as it was trained",
            stacklevel=3,
        )
    return normalize
