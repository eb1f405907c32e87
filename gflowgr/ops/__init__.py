"""Operations on trajectories of item identifiers: log-probabilities and losses (flow, preference).

They know nothing of recommenders: tensors in, tensors out, with gradients. Notation is shared by
all: B prompts, N trajectories each, L tokens, width d, vocabulary V.
"""

from __future__ import annotations

from gflowgr.ops.checks import set_validation, validation, validation_enabled
from gflowgr.ops.fused import fused_db_loss, fused_subtb_loss, fused_tb_loss, fused_vargrad_loss
from gflowgr.ops.fused_preference import fused_dpo_loss, fused_grpo_loss
from gflowgr.ops.logits import logprobs_from_logits
from gflowgr.ops.logprobs import trajectory_logprobs
from gflowgr.ops.losses import db_loss, subtb_loss, tb_loss, vargrad_log_z, vargrad_loss
from gflowgr.ops.preference import dpo_loss, grpo_loss, sdpo_loss

__all__ = [
    "db_loss",
    "dpo_loss",
    "fused_db_loss",
    "fused_dpo_loss",
    "fused_grpo_loss",
    "fused_subtb_loss",
    "fused_tb_loss",
    "fused_vargrad_loss",
    "grpo_loss",
    "logprobs_from_logits",
    "sdpo_loss",
    "set_validation",
    "subtb_loss",
    "tb_loss",
    "trajectory_logprobs",
    "validation",
    "validation_enabled",
    "vargrad_log_z",
    "vargrad_loss",
]
