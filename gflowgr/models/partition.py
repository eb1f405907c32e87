"""log Z(U): the log partition function of a prompt, in three modes."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..full_precision import FullPrecision, at_least_float32, in_float32

__all__ = ["PartitionHead", "PartitionMode"]

PartitionMode = Literal["learned", "scalar", "vargrad"]


class PartitionHead(FullPrecision):
    """Estimates log Z(U) from the pooled prompt state.

    ``learned`` is a small MLP whose last layer starts at zero, so that log Z starts as one
    constant; ``scalar`` is that constant alone. :meth:`initialise` sets it to the group estimate
    (:func:`gflowgr.vargrad_log_z`) of the first batch: started at zero, the first
    trajectory-balance step of a fine-tuned model would push every trajectory up, negatives
    included.
    ``vargrad`` has no parameter, and no head is made for it. Parameters and arithmetic are float32,
    whatever the backbone's precision.

    Args:
        hidden_size: width d of the pooled prompt state.
        mode: ``"learned"`` or ``"scalar"``.
    """

    initialised: Tensor

    def __init__(self, hidden_size: int, mode: PartitionMode = "learned") -> None:
        super().__init__()
        if mode not in get_args(PartitionMode) or mode == "vargrad":
            raise ValueError(f"mode must be 'learned' or 'scalar'; got {mode!r}")
        self.mode = mode
        self.constant = nn.Parameter(torch.zeros(1))  # FSDP2 cannot shard a scalar
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))
        self.mlp: nn.Sequential | None = None
        if mode == "learned":
            last = nn.Linear(hidden_size, 1, bias=False)
            nn.init.zeros_(last.weight)
            self.mlp = nn.Sequential(
                nn.LayerNorm(hidden_size), nn.Linear(hidden_size, hidden_size), nn.GELU(), last
            )

    def forward(self, pooled: Tensor) -> Tensor:
        """log Z [B], in float32 or wider, from the pooled prompt states [B, d]."""
        log_z = at_least_float32(self.constant).expand(pooled.shape[0])
        if self.mlp is not None:
            log_z = log_z + in_float32(self.mlp, pooled).squeeze(-1)
        return log_z

    @torch.no_grad()
    def initialise(self, log_z: Tensor) -> None:
        """Start at ``log_z`` (a scalar): the first residuals are then near zero on average."""
        self.constant.copy_(log_z.reshape(1))
        self.initialised.fill_(True)
