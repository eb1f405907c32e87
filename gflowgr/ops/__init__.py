"""Operations on trajectories of item identifiers: log-probabilities and losses (flow, preference).

They take and return tensors, with gradients, and depend on no recommender. All share one
notation: B prompts, N trajectories each, L tokens, width d, vocabulary V.
"""

from __future__ import annotations

from gflowgr.backends import available_backends

from .beam_step import beam_step, beam_step_hidden
from .checks import set_validation, validation, validation_enabled
from .flow_kl import FusedFlowKL, fused_flow_kl, fused_flow_kl_loss
from .flow_loss import (
    FusedLoss,
    db_loss,
    fused_db_loss,
    fused_flow_loss,
    fused_subtb_loss,
    fused_tb_loss,
    fused_vargrad_loss,
    subtb_loss,
    tb_loss,
    vargrad_log_z,
    vargrad_loss,
)
from .logprobs import (
    logprobs_from_logits,
    partial_logprobs,
    trajectory_logprobs,
    vocab_parallel_logprobs,
)
from .preference import (
    FusedPreferenceLoss,
    dpo_loss,
    fused_dpo_loss,
    fused_grpo_loss,
    fused_preference_loss,
    grpo_loss,
    sdpo_loss,
)

__all__ = [
    "FusedFlowKL",
    "FusedLoss",
    "FusedPreferenceLoss",
    "available_backends",
    "beam_step",
    "beam_step_hidden",
    "db_loss",
    "dpo_loss",
    "fused_db_loss",
    "fused_dpo_loss",
    "fused_flow_kl",
    "fused_flow_kl_loss",
    "fused_flow_loss",
    "fused_grpo_loss",
    "fused_preference_loss",
    "fused_subtb_loss",
    "fused_tb_loss",
    "fused_vargrad_loss",
    "grpo_loss",
    "logprobs_from_logits",
    "partial_logprobs",
    "sdpo_loss",
    "set_validation",
    "subtb_loss",
    "tb_loss",
    "trajectory_logprobs",
    "validation",
    "validation_enabled",
    "vargrad_log_z",
    "vargrad_loss",
    "vocab_parallel_logprobs",
]
