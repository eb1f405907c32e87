"""Flow heads: log Z(U) of a prompt, and log F(s) of each prefix (detailed balance and SubTB)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..full_precision import FullPrecision, at_least_float32, in_float32

__all__ = ["PartitionHead", "PartitionMode", "StateFlow", "partial_log_reward"]

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
        self.mlp = _starts_at_zero(hidden_size) if mode == "learned" else None

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


class StateFlow(FullPrecision):
    """Estimates log F(U, s_l) from the decoder state that predicts the token after s_l.

    A small MLP whose last layer starts at zero, plus one constant per prefix length:
    :meth:`initialise` sets the constants so that the first residuals are near zero on average.
    Started at zero, the first step of a fine-tuned model would push every trajectory up.
    Parameters and arithmetic are float32, whatever the backbone's precision.

    Args:
        hidden_size: width d of the decoder states.
        max_length: longest identifier.
    """

    initialised: Tensor

    def __init__(self, hidden_size: int, max_length: int) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.zeros(max_length))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))
        self.mlp = _starts_at_zero(hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """log F [B, N, L], in float32 or wider, from decoder states [B, N, L, d]."""
        residual = in_float32(self.mlp, hidden).squeeze(-1)
        return residual + at_least_float32(self.constant[: hidden.shape[2]])

    @torch.no_grad()
    def initialise(self, log_flow: Tensor) -> None:
        """Start at ``log_flow`` [L], the log-flow of prefixes of each length, for all prompts."""
        self.constant[: len(log_flow)] = log_flow.to(self.constant)
        self.constant[len(log_flow) :] = log_flow[-1].to(self.constant)
        self.initialised.fill_(True)


def partial_log_reward(tokens: Tensor, mask: Tensor, beta: float) -> Tensor:
    """What a prefix has earned already: ``beta * log(1 + r_sim(s_l))`` [B, N, L].

    r_sim(s_l) counts the first l tokens that equal the positive's at their positions. It is the one
    signal that a prefix determines (r_a and r_yhat belong to whole items), and together with the
    prompt it makes a function of the state, as a flow must be: trajectories with a common prefix
    share its value. The 1 makes it 0 at the empty prefix, whose log-flow stays log Z.

    Args:
        tokens: [B, N, L]; n = 0 is the positive.
        mask: true for real tokens [B, N, L].
        beta: exponent of the reward.

    Source: forward-looking flows, Pan et al. 2023 (arXiv 2302.01687); this partial reward is ours.
    """
    same = (tokens == tokens[:, :1]) & mask & mask[:, :1]
    before = same.cumsum(-1) - same.long()
    return beta * torch.log1p(before.to(torch.float32))


def _starts_at_zero(width: int) -> nn.Sequential:
    """A small MLP [..., width] -> [..., 1] whose last layer starts at zero."""
    last = nn.Linear(width, 1, bias=False)
    nn.init.zeros_(last.weight)
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), last)
