"""Functions for any backbone: its output head, prompts in its form, evaluation mode."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .wrapped import unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE_ATTENTION = "gflowgr_dense"
"""Name of the attention of :mod:`gflowgr.models.t5_on_cpu`, which takes the masks of SDPA."""

__all__ = ["DENSE_ATTENTION", "evaluating", "output_head", "real_prompt", "without_peft"]


def real_prompt(
    model: PreTrainedModel | Any, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Prompts in the form that models take, with any value as padding.

    Args:
        model: its ``pad_token_id`` tells whether prompts without a mask look padded.
        input_ids: prompts [B, S]; padding may be on either side and hold any value, also one that
            is no token of the model.
        attention_mask: 1 or true for real tokens [B, S]; None: every token is real, as it is for
            the models of ``transformers``. As there, a warning says where a prompt begins or ends
            with the model's token of padding nevertheless.

    Returns:
        Prompts [B, S] with token 0 as padding, which is masked, and the mask int64 [B, S].

    Raises:
        ValueError: a shape is wrong.
    """
    if input_ids.dim() != 2 or (
        attention_mask is not None and attention_mask.shape != input_ids.shape
    ):
        other = None if attention_mask is None else tuple(attention_mask.shape)
        raise ValueError(
            "input_ids and attention_mask must both be [B, S] (or attention_mask None); got "
            f"{tuple(input_ids.shape)} and {other}"
        )
    if attention_mask is not None:
        real: Tensor = attention_mask != 0
        return input_ids.masked_fill(~real, 0), real.long()
    pad: int | None = getattr(getattr(model, "config", None), "pad_token_id", None)
    looks = input_ids.numel() > 0 and not torch.compiler.is_compiling()
    if pad is not None and looks and bool(input_ids[:, [0, -1]].eq(pad).any()):
        warnings.warn(
            f"a prompt begins or ends with the model's pad_token_id = {pad}, and without "
            "attention_mask it counts as a real token; pass attention_mask if it is padding",
            stacklevel=3,
        )
    return input_ids, torch.ones_like(input_ids, dtype=torch.long)


def output_head(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """The output head's weight [V, d] and bias [V] or None.

    Raises:
        TypeError: the head has an adapter of its own, so that its weight does not make the logits;
            or gradients are recorded and the model is wrapped in data parallelism.
    """
    head: Any = without_peft(unwrapped(model)).get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise TypeError(
            f"model's output head is a {type(head).__name__} with an adapter of its own: leave the "
            "head out of the adapters' target modules"
        )
    return head.weight, getattr(head, "bias", None)


def without_peft(model: Any) -> Any:
    """The model of ``transformers`` in a ``peft.PeftModel``; it has the adapters in its modules."""
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise TypeError(
            f"model has adapters of the kind {model.active_peft_config.peft_type.value}, which add "
            "tokens to the prompt; use adapters that change its layers, such as LoRA"
        )
    return model.get_base_model()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) within, every module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
