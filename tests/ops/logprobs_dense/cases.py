"""Cases of the dense head and of losses through it, what they give in float64, and comparisons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gflowgr
from gflowgr.ops.logprobs import reference

GRADIENT_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@dataclass
class Case:
    """Flat rows: hidden [T, d] with NaN where masked, weight [V, d], bias [V] or None, targets."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    temperature: float = 0.8

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.hidden, self.weight, self.bias, self.targets, self.temperature

    def on(self, device: str) -> Case:
        """The same rows on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        hidden, weight, targets = (x.to(device) for x in (self.hidden, self.weight, self.targets))
        return Case(hidden, weight, bias, targets, self.temperature)


def make_case(
    rows: int,
    width: int,
    vocabulary: int,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    scale: float = 1.0,
    masked: bool = True,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(rows, width, generator=g)
    targets = torch.randint(0, vocabulary, (rows,), generator=g)
    offset = torch.randn(vocabulary, generator=g)
    if masked:
        targets[torch.rand(rows, generator=g) < 0.2] = -1
    hidden[targets < 0] = math.nan
    weight = torch.randn(vocabulary, width, generator=g) / math.sqrt(width)
    return Case(hidden.to(dtype), weight.to(dtype), offset.to(dtype) if bias else None, targets)


def exact(case: Case, grad: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """log_pf, lse and the gradients of (grad * log_pf).sum() by autograd in float64."""
    leaves = [
        x.detach().double().requires_grad_()
        for x in (case.hidden, case.weight, case.bias)
        if x is not None
    ]
    bias = leaves[2] if case.bias is not None else None
    log_pf, lse = reference.dense_logprobs(*leaves[:2], bias, case.targets, case.temperature)
    gradients = torch.autograd.grad(log_pf, leaves, grad.double(), allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves)]  # noqa: B905
    return log_pf.detach(), lse.detach(), filled


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to `tolerance` times the largest element expected, or 0.1 if that is less."""
    scale = max(float(expected.abs().max()) if expected.numel() else 0.0, 0.1)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * scale)


def check(case: Case, backend: str, *, tolerance: float | None = None, device: str = "cpu") -> None:
    """Values, gradients and Jacobian of one backend, computed on a device."""
    dtype = case.hidden.dtype
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(len(case.targets), generator=g)
    expected, lse, gradients = exact(case, grad)
    bound = tolerance or GRADIENT_TOLERANCE[dtype]
    here = case.on(device)
    with gflowgr.backend(backend):
        log_pf, log_sum, slopes = torch.ops.gflowgr.dense_logprobs(*here.arguments, True)
        found = torch.ops.gflowgr.dense_backward(
            *(grad.to(device), *here.arguments[:4], log_pf, log_sum, case.temperature),
            *(True, True, True),
        )
    log_pf, log_sum, slopes = log_pf.cpu(), log_sum.cpu(), slopes.cpu()
    found = [gradient.cpu() for gradient in found]
    assert log_pf.dtype == log_sum.dtype == torch.float32
    assert_close(log_pf, expected, tolerance or 1e-5)
    assert_close(log_sum, lse, tolerance or 1e-5)
    valid = case.targets >= 0
    assert backend == "torch" or (log_pf <= 0).all() or (case.targets >= len(case.weight)).any()
    assert_close(slopes * grad.masked_fill(~valid, 0.0)[:, None], gradients[0], bound)
    for actual, wanted, like in zip(found, gradients, case.arguments, strict=False):
        assert actual.dtype == like.dtype
        assert_close(actual, wanted, bound)
    assert not found[0][~valid].any()


def joint_inputs(
    kind: str,
    dtype: torch.dtype,
    seed: int,
    *,
    prompts: int = 7,
    width: int = 16,
    size: int = 90,
    length: int = 4,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Floating inputs (bf16 or float32 states and head, float32 targets) and keywords."""
    g = torch.Generator().manual_seed(seed)
    shape = (prompts, 3, length)
    lengths = torch.randint(0, length + 1, shape[:2], generator=g)
    mask = torch.arange(length) < lengths[..., None]
    inputs = {
        "hidden": torch.randn(*shape, width, generator=g).to(dtype),
        "weight": (torch.randn(size, width, generator=g) / 4).to(dtype),
        "bias": torch.randn(size, generator=g),
        # Rewards from e^-30 to e^30.
        "log_reward": torch.linspace(-30, 30, prompts * 3).view(prompts, 3),
    }
    if kind != "vargrad":
        target = torch.randn(shape[:1] if kind == "tb" else shape, generator=g)
        inputs["log_z" if kind == "tb" else "log_flow"] = target
    inputs["hidden"] = inputs["hidden"].masked_fill(~mask[..., None], math.nan)
    tokens = torch.randint(0, size, shape, generator=g).masked_fill(~mask, -7)
    return inputs, {"tokens": tokens, "mask": mask}
