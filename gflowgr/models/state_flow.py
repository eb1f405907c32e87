"""log F(s): the log-flow of each prefix, for detailed balance and SubTB."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..full_precision import FullPrecision, at_least_float32, in_float32

__all__ = ["StateFlow", "partial_log_reward"]


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
        last = nn.Linear(hidden_size, 1, bias=False)
        nn.init.zeros_(last.weight)
        self.mlp = nn.Sequential(
            nn.LayerNorm(hidden_size), nn.Linear(hidden_size, hidden_size), nn.GELU(), last
        )

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
