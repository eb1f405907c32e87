"""Groups of parameters for the optimiser."""

from __future__ import annotations

from typing import Any

from torch import nn

from .config import GFlowGRConfig

__all__ = ["parameter_groups"]

_GROUP_OF = {"partition": "flow", "state_flow": "flow", "fusion": "fusion"}


def parameter_groups(
    model: nn.Module, decayed: set[str], args: GFlowGRConfig
) -> list[dict[str, Any]]:
    """The trained parameters: log Z or log F, and a learned fusion, have rates of their own.

    Args:
        model: a :class:`~gflowgr.models.GFlowModel`, also wrapped by DDP.
        decayed: names of parameters that weight decay is for.
        args: rates and decay.
    """
    groups: dict[str, dict[str, Any]] = {
        "decayed": {"params": [], "weight_decay": args.weight_decay},
        "others": {"params": [], "weight_decay": 0.0},
        "flow": {"params": [], "weight_decay": 0.0, "lr": args.partition_learning_rate},
        "fusion": {"params": [], "weight_decay": 0.0, "lr": args.fusion_learning_rate},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.removeprefix("module.").partition(".")[0]
            group = _GROUP_OF.get(part, "decayed" if name in decayed else "others")
            groups[group]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
