"""Divergence from the exact flows' policy to the model's, from hidden states."""

from __future__ import annotations

from .fused import FusedFlowKL, fused_flow_kl, fused_flow_kl_loss

__all__ = ["FusedFlowKL", "fused_flow_kl", "fused_flow_kl_loss"]
