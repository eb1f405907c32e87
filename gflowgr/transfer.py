"""Non-blocking copies from the host to a device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(values: Tensor | npt.NDArray[np.generic], device: torch.device | str) -> Tensor:
    """``values`` on ``device``; a copy from the host to a CUDA device does not synchronise.

    A plain ``.to(device)`` makes the host wait until the device has done all its work so far. A
    copy from pinned memory does not, and PyTorch keeps that memory until the copy is done. A copy
    to the host synchronises, since the host could otherwise read memory not yet written.

    Args:
        values: any shape and dtype; what is on ``device`` already is returned as it is.
        device: where to.
    """
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
