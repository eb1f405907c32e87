"""Log-probabilities of trajectories' tokens, from hidden states and the head or from logits."""

from __future__ import annotations

from .logits import logprobs_from_logits
from .trajectory import trajectory_logprobs
from .vocab_parallel import partial_logprobs, vocab_parallel_logprobs

__all__ = [
    "logprobs_from_logits",
    "partial_logprobs",
    "trajectory_logprobs",
    "vocab_parallel_logprobs",
]
