"""Prompts for the decoders in C++, steps through a decoder, and how near two walks must be."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowgr.decoding.decoders import StepDecoder
from support.small_models import VOCAB


def prompts(batch: int, size: int) -> tuple[Tensor, Tensor]:
    """Prompts with holes; the last of several has no token at all."""
    generator = torch.Generator().manual_seed(size)
    ids = torch.randint(3, VOCAB, (batch, size), generator=generator)
    mask = (torch.rand(batch, size, generator=generator) < 0.8).long()
    if batch > 1:
        mask[-1] = 0
    return ids, mask


@torch.no_grad()
def walk(decoder: StepDecoder, widths: tuple[int, ...] = (5, 17, 70, 2)) -> list[Tensor]:
    """Logits of some steps, with crossing parents."""
    generator = torch.Generator().manual_seed(1)
    out, previous = [decoder.logits(decoder.first())], 1
    for beams in widths:
        tokens = torch.randint(3, VOCAB, (decoder.batch, beams), generator=generator)
        parents = torch.randint(-1, previous, (decoder.batch, beams), generator=generator)
        out.append(decoder.logits(decoder.advance(tokens, parents)))
        previous = beams
    return out


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
