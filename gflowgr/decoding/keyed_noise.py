"""Random numbers for sampling: a hash of seed and keys, computed on the tensors' device.

As in :mod:`gflowgr.samplers.keyed_random`: a prompt's numbers depend neither on the other prompts
in the batch nor on the order of the draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["keyed_gumbel", "keyed_uniform", "prompt_keys"]

_WORD = 2**64
_GOLDEN = 0x9E3779B97F4A7C15


def keyed_uniform(seed: int, first: Tensor, *keys: Tensor | int) -> Tensor:
    """Uniform numbers strictly between 0 and 1, float64, of the keys' broadcast shape.

    Args:
        seed: any integer; only its lowest 64 bits count.
        first: int64, says what each number is for.
        keys: say so, too; int64 tensors or integers.
    """
    # Integers stay on the host: a tensor made of one would wait for a copy to the device.
    bits = _mix(first * _signed(_GOLDEN) + _mix_integer(seed))
    for key in keys:
        step = key * _signed(_GOLDEN)
        bits = _mix(bits + (_signed(step) if isinstance(step, int) else step))
    # 52 bits and a half: with one bit more the largest number would round to 1.
    return (_shift(bits, 12).double() + 0.5) * 2.0**-52


def keyed_gumbel(seed: int, first: Tensor, *keys: Tensor | int) -> Tensor:
    """Standard Gumbel noise, float64; see :func:`keyed_uniform`."""
    return -(-keyed_uniform(seed, first, *keys).log()).log()


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


def _mix_integer(bits: int) -> int:
    """:func:`_mix` of one number."""
    bits %= _WORD
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % _WORD
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % _WORD
    return _signed(bits ^ (bits >> 31))


def _shift(bits: Tensor, count: int) -> Tensor:
    """Logical shift to the right (that of int64 repeats the sign)."""
    return (bits >> count) & (2 ** (64 - count) - 1)


def _signed(value: int) -> int:
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value
