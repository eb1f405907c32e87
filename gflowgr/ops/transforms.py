"""Forward-mode derivatives and transforms of ``torch.func``: run on references, or refused.

A kernel has a reverse-mode derivative and no other: under ``torch.func.jvp`` PyTorch would take it
for a constant. So whatever has a differentiable reference is left to it there, and gives what
every other PyTorch function gives (``grad``, ``vmap``, ``jvp``, ``jacrev``, ``jacfwd``, ``hessian``
and their compositions); the rest is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _functorch
from torch.autograd import forward_ad

from gflowgr import backends

__all__ = [
    "active",
    "batched",
    "is_batched",
    "reference_only",
    "refuse",
    "refuse_forward_mode",
    "refuse_second_order",
]


def active() -> bool:
    """Whether a ``torch.func`` transform or a level of forward-mode derivatives is on."""
    return forward_ad._current_level >= 0 or _are_functorch_transforms_active()


def batched() -> bool:
    """Whether ``torch.func.vmap`` is on, where values cannot steer Python."""
    if not _are_functorch_transforms_active():
        return False
    stack = _functorch.get_interpreter_stack() or []
    return any(level.key() == _functorch.TransformType.Vmap for level in stack)


def is_batched(tensor: Tensor | None) -> bool:
    """Whether ``vmap`` hides a dimension of the tensor."""
    while tensor is not None and _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def reference_only(op: str) -> bool:
    """Whether a call of ``op`` is left to its reference because of a transform.

    Raises BackendError where another backend is forced (not seen while ``torch.compile`` traces).
    """
    if not active():
        return False
    name = None if torch.compiler.is_compiling() else backends.forced_backend()
    if name not in (None, "torch"):
        raise backends.BackendError(
            f"gflowgr::{op} cannot run on backend {name!r}: forward-mode derivatives and the "
            "transforms of torch.func are left to the reference, backend 'torch'"
        )
    return True


def refuse(op: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if a transform or a forward-mode derivative reaches an op without any."""
    if not active():
        return
    if any(t is not None and _functorch.is_functorch_wrapped_tensor(t) for t in tensors):
        raise RuntimeError(
            f"gflowgr::{op} knows no transform of torch.func (grad, vmap, jvp, jacrev, ...): call "
            "it outside of them"
        )
    if forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        refuse_forward_mode(op)


def refuse_forward_mode(op: str) -> None:
    """Raise RuntimeError inside a level of forward-mode derivatives.

    For implementations of ops: these are not shown which tensors carry such a derivative.
    """
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            f"gflowgr::{op} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, "
            "torch.autograd.forward_ad): its result would count as a constant"
        )


def refuse_second_order(op: str, instead: str) -> Callable[..., NoReturn]:
    """The derivative of a gradient: RuntimeError, saying what to differentiate ``instead``."""

    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(
            f"gflowgr::{op} has no second derivative: it was reached by a backward pass through a "
            f"backward pass (create_graph=True); use {instead} for that"
        )

    return backward
