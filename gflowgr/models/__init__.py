"""Backbones, and what a GFlowNet adds to them."""

from .backbone import (
    PromptState,
    branch_hidden_states,
    encode_prompt,
    output_head,
    trajectory_hidden_states,
)
from .gflow_model import FlowSettings, GFlowModel
from .partition import PartitionHead
from .prompts import prompt_tokens
from .tiger import TigerConfig, build_tiger
from .vocabulary import EOS_TOKEN, PAD_TOKEN, IdentifierVocabulary

__all__ = [
    "EOS_TOKEN",
    "PAD_TOKEN",
    "FlowSettings",
    "GFlowModel",
    "IdentifierVocabulary",
    "PartitionHead",
    "PromptState",
    "TigerConfig",
    "branch_hidden_states",
    "build_tiger",
    "encode_prompt",
    "output_head",
    "prompt_tokens",
    "trajectory_hidden_states",
]
