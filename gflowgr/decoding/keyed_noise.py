"""Random numbers for sampling: a hash of seed and keys, computed on the tensors' device.

As in :mod:`gflowgr.samplers.keyed_random`: a prompt's numbers depend neither on the other prompts
in the batch nor on the order of the draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["keyed_gumbel", "keyed_uniform", "prompt_keys"]

_WORD = 2**64


def keyed_uniform(seed: int, *keys: Tensor) -> Tensor:
    """Uniform numbers strictly between 0 and 1, float64, of the keys' broadcast shape.

    Args:
        seed: any integer; only its lowest 64 bits count.
        *keys: int64 tensors that say what each number is for.
    """
    bits = _mix(torch.tensor(_signed(seed), device=keys[0].device))
    for key in keys:
        bits = _mix(bits + key * _signed(0x9E3779B97F4A7C15))
    # 52 bits and a half: with one bit more the largest number would round to 1.
    return (_shift(bits, 12).double() + 0.5) * 2.0**-52


def keyed_gumbel(seed: int, *keys: Tensor) -> Tensor:
    """Standard Gumbel noise, float64; see :func:`keyed_uniform`."""
    return -(-keyed_uniform(seed, *keys).log()).log()


def prompt_keys(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """A key of each prompt's real tokens [B], int64, independent of the padding around them."""
    real = attention_mask != 0
    place = real.long().cumsum(1)
    token = _mix(input_ids.long() + _mix(place * _signed(0xD1B54A32D192ED03)))
    return _mix(torch.where(real, token, 0).sum(1) + real.sum(1))


def _mix(bits: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014); int64 stands for uint64."""
    bits = (bits ^ _shift(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, count: int) -> Tensor:
    """Logical shift to the right (that of int64 repeats the sign)."""
    return (bits >> count) & (2 ** (64 - count) - 1)


def _signed(value: int) -> int:
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value
