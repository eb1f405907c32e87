"""What decoders in C++ ask of any model: a CPU, float32, no gradients, plain modules."""

from __future__ import annotations

from typing import Any

import torch

from ... import backends
from ...models.backbone import output_head
from ...ops.logprobs.dense import probe_cpp

__all__ = ["LANES", "does_no_more", "why_unsupported_fused"]

LANES = 16
"""Heads are a multiple of this wide, see ``kGroup`` in ``csrc/common/dtype.h``."""


def why_unsupported_fused(model: Any) -> str | None:
    """Why no decoder in C++ can run ``model`` here and now; None when its family's may."""
    weight = output_head(model)[0]
    if weight.dtype != torch.float32:
        return f"it computes in float32, the model in {weight.dtype}"
    forced = backends.forced_backend()
    if forced not in (None, "cpp"):
        return f"backend {forced!r} is asked for"
    missing = probe_cpp(weight.device, weight.dtype)
    if missing is not None:
        return missing
    if torch.is_grad_enabled():
        return "it has no gradient, and gradients are enabled"
    if model.training:
        return "it has no dropout, and the model is in training mode"
    if torch.is_autocast_enabled("cpu"):
        return "it computes in float32, and autocast is on"
    return None


def does_no_more(module: Any) -> bool:
    """Whether a call of ``module`` is its own class's forward and nothing beside."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
