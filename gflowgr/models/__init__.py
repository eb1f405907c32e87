"""Backbones, and the flow heads, objectives and checkpoints that a GFlowNet adds to them."""

from .backbone import output_head
from .causal import CausalConfig
from .decoder import DecoderConfig, build_decoder, decoder_prompt
from .gflow_model import GFlowModel
from .heads import PartitionHead, StateFlow
from .lora import LoraSettings, add_lora
from .packed import (
    PromptState,
    TrajectoryStates,
    encode_prompt,
    trajectory_hidden_states,
)
from .prompts import TIGER_PROMPT, PromptLayout, prompt_tokens
from .sequences import SequencePrompts, sequence_hidden_states, sequence_prompts
from .settings import FlowSettings
from .tiger import TigerConfig, build_tiger
from .vocabulary import EOS_TOKEN, PAD_TOKEN, IdentifierVocabulary

__all__ = [
    "EOS_TOKEN",
    "PAD_TOKEN",
    "TIGER_PROMPT",
    "CausalConfig",
    "DecoderConfig",
    "FlowSettings",
    "GFlowModel",
    "IdentifierVocabulary",
    "LoraSettings",
    "PartitionHead",
    "PromptLayout",
    "PromptState",
    "SequencePrompts",
    "StateFlow",
    "TigerConfig",
    "TrajectoryStates",
    "add_lora",
    "build_decoder",
    "build_tiger",
    "decoder_prompt",
    "encode_prompt",
    "output_head",
    "prompt_tokens",
    "sequence_hidden_states",
    "sequence_prompts",
    "trajectory_hidden_states",
]
