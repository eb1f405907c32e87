"""Preference and policy-gradient losses, DPO, S-DPO and GRPO, against a reference policy."""

from __future__ import annotations

from .fused import (
    FusedPreferenceLoss,
    fused_dpo_loss,
    fused_grpo_loss,
    fused_preference_loss,
)
from .losses import dpo_loss, grpo_loss, sdpo_loss

__all__ = [
    "FusedPreferenceLoss",
    "dpo_loss",
    "fused_dpo_loss",
    "fused_grpo_loss",
    "fused_preference_loss",
    "grpo_loss",
    "sdpo_loss",
]
