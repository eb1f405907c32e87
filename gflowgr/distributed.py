"""Values exchanged between processes (``torchrun``), and models sharded over them (FSDP2).

FSDP2 gathers parameters in the hooks of ``forward``; other code that reads them, such as decoding
and the flow's start, would read shards. :func:`whole_parameters` gathers them for a block of code.
With one process, or a model that is not sharded, everything here costs nothing and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

__all__ = [
    "announce_sharding",
    "first_process_finds",
    "gathered",
    "is_shard",
    "is_sharded",
    "load_whole_state",
    "process",
    "sum_over_processes",
    "whole_parameters",
    "whole_state",
]

T = TypeVar("T")


def process() -> tuple[int, int]:
    """Rank of this process, and the number of processes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gathered(value: T) -> list[T]:
    """What each process passed, in the order of their ranks; all must call it together."""
    _, count = process()
    if count == 1:
        return [value]
    values: list[T | None] = [None] * count
    torch.distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def first_process_finds(work: Callable[[], T]) -> T:
    """What ``work`` gives the first process, in all of them; its ValueError is raised in all."""
    found: tuple[T | None, ValueError | None] = (None, None)
    if process()[0] == 0:
        try:
            found = work(), None
        except ValueError as error:
            found = None, error
    value, failure = gathered(found)[0]
    if failure is not None:
        raise failure
    return cast(T, value)


def sum_over_processes(
    values: Mapping[str, tuple[float, float]],
) -> dict[str, tuple[float, float]]:
    """Sums and weights by name, over all processes; a name may be missing in some of them."""
    total: dict[str, tuple[float, float]] = {}
    for part in gathered(values):
        for name, (value, count) in part.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = before[0] + value, before[1] + count
    return total


# ------------------------------------------------------------------ sharded models (FSDP2)

_RESHARDS = "_gflowgr_reshards_blocks"


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 (``fully_shard``) was applied to ``model`` itself."""
    # By name: importing FSDP to ask for its class takes seconds.
    return any(each.__name__ == "FSDPModule" for each in type(model).__mro__)


def is_shard(parameter: Tensor) -> bool:
    """Whether this process has a part of ``parameter`` only (a ``DTensor``)."""
    return any(each.__name__ == "DTensor" for each in type(parameter).__mro__)


def announce_sharding(model: nn.Module, *, reshards_blocks: bool) -> None:
    """Prepare a model for :func:`whole_parameters`, after it was sharded and before its first use.

    Args:
        model: the root of the sharded modules.
        reshards_blocks: whether they free their parameters after a forward pass.
    """
    if not is_sharded(model) or hasattr(model, _RESHARDS):
        return
    from torch.distributed.fsdp import register_fsdp_forward_method

    # FSDP makes the first module that runs its root; it must not be one of the blocks.
    register_fsdp_forward_method(model, "extra_repr")
    model.extra_repr()
    del model.extra_repr
    setattr(model, _RESHARDS, reshards_blocks)


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """In this block all parameters of ``model`` are ordinary tensors, in the forward's precision.

    All processes must enter it together; within it none waits for another, so that each may run
    other batches, and other numbers of them. What is written to parameters is lost. Each process
    holds the whole model for that time. Not to be nested.
    """
    if not is_sharded(model):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    parts: list[Any] = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            again = part is not model and getattr(model, _RESHARDS)
            part.set_reshard_after_forward(again, recurse=False)


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The whole state of a sharded model on the CPU of the first process ({} on the others).

    All processes must call it together. None for a model that is not sharded.
    """
    if not is_sharded(model):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    # Tied weights are gathered one by one; as one tensor they are saved once.
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same = first.setdefault(id(parameter), name)
        if same in state:
            state[name] = state[same]
    return state


def load_whole_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a part of the state, the same in all processes, into the model, sharded or not."""
    if not is_sharded(model):
        model.load_state_dict(state, strict=False)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, dict(state), options=options)
