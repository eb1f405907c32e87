"""One step of a beam search down a prefix tree, from logits or from hidden states."""

from __future__ import annotations

from .op import beam_step, beam_step_hidden

__all__ = ["beam_step", "beam_step_hidden"]
