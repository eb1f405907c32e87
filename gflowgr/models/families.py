"""Which decoder-only models of ``transformers`` run set-wise and stepwise."""

from __future__ import annotations

from typing import Any

__all__ = ["is_known_class", "why_unsupported_causal"]

_FAMILIES = frozenset(
    ("gemma", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")
)
"""Values of ``model_type`` whose models take positions from ``position_ids`` only and compute
logits as ``lm_head(hidden)``."""
_HOMES = ("transformers.models.", "gflowgr.models.bare")


def is_known_class(module: Any) -> bool:
    """Whether the class of ``module`` is one of transformers, or of :mod:`.bare`, and no
    subclass."""
    return type(module).__module__.startswith(_HOMES)


def why_unsupported_causal(model: Any) -> str | None:
    """Why ``model`` does not take its attention and positions from outside; None if it does.

    Args:
        model: a decoder-only model with its language modelling head.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family not in _FAMILIES:
        return f"model_type = {family!r} is none of {', '.join(sorted(_FAMILIES))}"
    base = model.base_model
    for part in (model, base):
        if not type(part).__module__.startswith("transformers.models."):
            return f"{type(part).__name__} is no class of transformers"
    if base is model or model.get_output_embeddings() is None:
        return f"{type(model).__name__} has no language modelling head"
    if getattr(config, "add_cross_attention", False):
        return "it has cross-attention"
    if _slides(config):
        return "its attention has a sliding window"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        return f"its rotary frequencies ({rope['rope_type']}) change with the length"
    return None


def _slides(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None
