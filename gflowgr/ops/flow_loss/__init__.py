"""Flow-matching losses TB, DB, SubTB and VarGrad-TB, from log-probabilities or hidden states."""

from __future__ import annotations

from .fused import (
    FusedLoss,
    fused_db_loss,
    fused_flow_loss,
    fused_subtb_loss,
    fused_tb_loss,
    fused_vargrad_loss,
)
from .losses import db_loss, subtb_loss, tb_loss, vargrad_log_z, vargrad_loss

__all__ = [
    "FusedLoss",
    "db_loss",
    "fused_db_loss",
    "fused_flow_loss",
    "fused_subtb_loss",
    "fused_tb_loss",
    "fused_vargrad_loss",
    "subtb_loss",
    "tb_loss",
    "vargrad_log_z",
    "vargrad_loss",
]
