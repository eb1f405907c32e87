"""Random trees and trajectories for the log-probabilities among children, and the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gflowgr.ops.inputs import HeadInputs
from gflowgr.ops.logprobs import children
from gflowgr.ops.logprobs.reference import logprobs_reference
from gflowgr.tree import PrefixTree

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Relative to 1 + |value|: one rounding of the 16-bit types; some hundred of float32 in a sum."""


@dataclass
class Case:
    """Arguments of the log-probabilities and a gradient to send back."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    tokens: Tensor
    mask: Tensor | None
    tree: PrefixTree
    temperature: float
    upstream: Tensor

    def inputs(self, *parameters: Tensor) -> HeadInputs:
        hidden, weight, *bias = parameters or self.parameters()
        given_bias = bias[0] if bias else None
        return HeadInputs(
            hidden,
            weight,
            self.tokens,
            given_bias,
            self.mask,
            self.tree,
            self.temperature,
            "children",
        )

    def parameters(self) -> list[Tensor]:
        given_bias = [] if self.bias is None else [self.bias]
        return [self.hidden, self.weight, *given_bias]

    def on(self, device: str) -> Case:
        """The same case on a device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, tree=self.tree.to(device), **moved)

    def to(self, *dtypes: torch.dtype) -> Case:
        """Hidden, weight and bias rounded to these dtypes."""
        hidden, weight, bias = dtypes
        return replace(
            self,
            hidden=self.hidden.to(hidden),
            weight=self.weight.to(weight),
            bias=None if self.bias is None else self.bias.to(bias),
        )


def random_identifiers(
    items: int, steps: int, codes: int, first: int, g: torch.Generator
) -> Tensor:
    """[items, steps] tokens from `first` on, some shorter (-1); a few may end inside others."""
    tokens = torch.randint(first, first + codes, (items, steps), generator=g)
    length = torch.randint(1, steps + 1, (items, 1), generator=g)
    length = torch.where(torch.rand(items, 1, generator=g) < 0.7, steps, length)
    return tokens.where(torch.arange(steps) < length, -1)


def make_case(
    *,
    prompts: int = 3,
    branches: int = 3,
    width: int = 8,
    items: int = 40,
    steps: int = 3,
    codes: int = 6,
    first: int = 2,
    bias: bool = True,
    padding: bool = True,
    temperature: float = 0.7,
    seed: int = 0,
) -> Case:
    """Trajectories that are identifiers of a random tree (or padding), in float64."""
    g = torch.Generator().manual_seed(seed)
    identifiers = random_identifiers(items, steps, codes, first, g)
    vocabulary = first + codes + 2
    pick = torch.randint(0, items, (prompts, branches), generator=g)
    tokens = identifiers[pick]
    mask = tokens >= 0
    if padding:
        mask &= (torch.rand(prompts, branches, 1, generator=g) < 0.8).expand_as(mask)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return Case(
        hidden=normal(prompts, branches, steps, width),
        weight=normal(vocabulary, width) / max(1.0, width**0.5),
        bias=normal(vocabulary) if bias else None,
        tokens=tokens,
        mask=mask,
        tree=PrefixTree.from_identifiers(identifiers),
        temperature=temperature,
        upstream=normal(prompts, branches, steps),
    )


def run(case: Case, *, sparse_grad: bool = False) -> list[Tensor]:
    """log_pf and the gradients of hidden, weight and bias."""
    parameters = [x.detach().clone().requires_grad_() for x in case.parameters()]
    inputs = case.inputs(*parameters)
    assert inputs.tree is not None
    log_pf, _ = children.children_logprobs(inputs, inputs.tree, sparse_grad=sparse_grad)
    log_pf.backward(case.upstream.to(log_pf.dtype))
    return [log_pf.detach(), *(x.grad for x in parameters)]


def define(case: Case) -> list[Tensor]:
    """The same from the reference, with autograd, on the same numbers in float64."""
    parameters = [x.detach().double().requires_grad_() for x in case.parameters()]
    log_pf = logprobs_reference(case.inputs(*parameters))
    log_pf.backward(case.upstream)
    return [log_pf.detach(), *(x.grad for x in parameters)]


def check(case: Case, device: str = "cpu", *, sparse_grad: bool = False) -> None:
    """Against the reference, computed on the CPU."""
    dtypes = [torch.float32, *(x.dtype for x in case.parameters())]
    if torch.float64 in dtypes:
        dtypes[0] = torch.float64
    found = run(case.on(device), sparse_grad=sparse_grad)
    for actual, expected, dtype in zip(found, define(case), dtypes, strict=True):
        assert actual.dtype == dtype
        actual = (actual.to_dense() if actual.is_sparse else actual).cpu()
        tolerance = TOLERANCE[dtype] * max([1.0, *expected.abs().flatten().tolist()])
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
