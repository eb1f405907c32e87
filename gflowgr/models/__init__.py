"""Backbones, and what a GFlowNet adds to them."""

from .causal import CausalConfig
from .gflow_model import GFlowModel
from .lora import LoraSettings, add_lora
from .packed import (
    PromptState,
    TrajectoryStates,
    encode_prompt,
    output_head,
    trajectory_hidden_states,
)
from .partition import PartitionHead
from .prompts import TIGER_PROMPT, PromptLayout, prompt_tokens
from .settings import FlowSettings
from .state_flow import StateFlow
from .tiger import TigerConfig, build_tiger
from .vocabulary import EOS_TOKEN, PAD_TOKEN, IdentifierVocabulary

__all__ = [
    "EOS_TOKEN",
    "PAD_TOKEN",
    "TIGER_PROMPT",
    "CausalConfig",
    "FlowSettings",
    "GFlowModel",
    "IdentifierVocabulary",
    "LoraSettings",
    "PartitionHead",
    "PromptLayout",
    "PromptState",
    "StateFlow",
    "TigerConfig",
    "TrajectoryStates",
    "add_lora",
    "build_tiger",
    "encode_prompt",
    "output_head",
    "prompt_tokens",
    "trajectory_hidden_states",
]
