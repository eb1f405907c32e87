"""Models in the wrappers of accelerate, torch.compile and data parallelism."""

from __future__ import annotations

import contextlib
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch

__all__ = ["accelerate_autocast", "unwrapped", "warn_if_compiled"]

# By name: importing FSDP or DeepSpeed to ask for their classes takes seconds.
_PARALLEL = {
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "DeepSpeedEngine",
}


def unwrapped(model: Any) -> Any:
    """The model inside ``torch.compile`` and, where no gradient is recorded, data parallelism.

    Raises:
        TypeError: the model is in a wrapper whose own forward pass averages or gathers what
            gradients need, and gradients are recorded.
    """
    while True:
        parallel = _parallel_name(model)
        if parallel is not None:
            if torch.is_grad_enabled():
                raise TypeError(
                    f"model must be the one inside {parallel}, called in its own forward; got the "
                    f"{parallel}, whose gradients are right only for what its forward runs: put "
                    "this call and the loss into the forward of a module, and wrap that module"
                )
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def warn_if_compiled(model: Any) -> None:
    """Warn that parts of a compiled model, called by themselves, are not compiled."""
    compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None)
    if compiled and not torch.compiler.is_compiling():
        name = type(getattr(model, "_orig_mod", model)).__name__
        warnings.warn(
            f"the compiled {name} runs uncompiled here, where its parts are called: compile the "
            "module whose forward makes this call",
            stacklevel=3,
        )


def accelerate_autocast(model: Any, device: torch.device) -> AbstractContextManager[Any] | None:
    """The autocast that accelerate put around the forward of ``model``; None where there is none.

    A function that calls parts of the model passes that forward by. None too where an autocast is
    on already, which then counts.
    """
    if "_original_forward" not in getattr(model, "__dict__", {}):
        return None
    if torch.is_autocast_enabled(device.type):
        return None
    from accelerate.utils import get_mixed_precision_context_manager

    context: AbstractContextManager[Any] = get_mixed_precision_context_manager(native_amp=True)
    return None if isinstance(context, contextlib.nullcontext) else context


def _parallel_name(model: Any) -> str | None:
    return next((c.__name__ for c in type(model).__mro__ if c.__name__ in _PARALLEL), None)
