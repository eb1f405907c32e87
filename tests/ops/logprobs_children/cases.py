"""Cases of the log-probabilities among children, and what they give in float64.

``Case`` is for the op, on whichever backend is chosen; ``ChildrenCase`` is for the raw ops of one
backend, with its own float64 values that share no code with the package.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
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


# ------------------------------------------------------------------ the raw ops of a backend


def shop(items: int, codes: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    """Identifiers [items, L] at random; each level has tokens of its own."""
    random = np.random.default_rng(seed)
    offsets = np.cumsum([0, *codes[:-1]])
    return np.stack([random.integers(0, n, items) for n in codes], 1) + offsets


@dataclass(frozen=True)
class ChildrenCase:
    """Arguments of ``children_logprobs`` on the CPU; poisoned where the mask is false."""

    hidden: Tensor  # [B, N, L, d]
    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    tokens: Tensor  # [B, N, L]
    mask: Tensor | None  # [B, N, L]
    tree: PrefixTree
    grad: Tensor  # [B, N, L]
    temperature: float = 1.0

    @classmethod
    def make(
        cls,
        identifiers: np.ndarray[Any, Any],
        batch: tuple[int, int],
        width: int,
        *,
        vocabulary: int | None = None,
        dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
        bias: bool = False,
        padded: bool = False,
        temperature: float = 1.0,
        scale: float = 1.0,
        seed: int = 0,
    ) -> ChildrenCase:
        """Trajectories are identifiers [items, L] (padded with -1), drawn at random."""
        random = np.random.default_rng(seed)
        tree = PrefixTree.from_identifiers(identifiers)
        tokens = identifiers[random.integers(0, len(identifiers), batch)]
        mask = tokens >= 0
        if padded:
            mask &= random.random((*batch, 1)) < 0.8
        rows = int(identifiers.max()) + 1 if vocabulary is None else vocabulary
        generator = torch.Generator().manual_seed(seed)
        hidden = scale * torch.randn((*tokens.shape, width), generator=generator)
        weight = torch.randn((rows, width), generator=generator) / width**0.5
        keep = torch.from_numpy(mask)
        return cls(
            hidden.masked_fill(~keep[..., None], torch.nan).to(dtypes[0]),
            weight.to(dtypes[1]),
            torch.randn(rows, generator=generator) if bias else None,
            torch.from_numpy(np.where(mask, tokens, -7)),
            None if bool(keep.all()) else keep,
            tree,
            torch.randn(tokens.shape, generator=generator).masked_fill(~keep, torch.nan),
            temperature,
        )

    def full_mask(self) -> Tensor:
        """The mask, all true where there is none."""
        if self.mask is None:
            return torch.ones(self.tokens.shape, dtype=torch.bool)
        return self.mask

    def expected(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """log_pf and the gradients to hidden, weight and bias in float64, row after row."""
        hidden = self.hidden.double().nan_to_num().requires_grad_()
        weight = self.weight.double().requires_grad_()
        bias = None if self.bias is None else self.bias.double().requires_grad_()
        mask = self.full_mask()
        values = []
        none = torch.zeros(0, dtype=torch.int64)
        for place in np.ndindex(*self.tokens.shape[:2]):
            node = 0
            for level in range(self.tokens.shape[2]):
                token = int(self.tokens[(*place, level)])
                if not mask[(*place, level)]:
                    values.append(hidden.new_zeros(()))
                    node = -1
                    continue
                children, nodes = self.tree.children(node) if node >= 0 else (none, none)
                chosen = (children == token).nonzero().flatten()
                if len(chosen) == 0:
                    values.append(hidden.new_full((), -torch.inf))
                    node = -1
                    continue
                node = int(nodes[chosen])
                logits = weight[children] @ hidden[(*place, level)]
                if bias is not None:
                    logits = logits + bias[children]
                value = (logits / self.temperature).log_softmax(0)[chosen[0]]
                forbidden = bias is not None and bool(bias[token] == -torch.inf)
                # A forbidden token has no gradient.
                values.append(hidden.new_full((), -torch.inf) if forbidden else value)
        log_pf = torch.stack(values).view(self.tokens.shape)
        grad = self.grad.double().masked_fill(~mask | (log_pf == -torch.inf), 0.0)
        total = (torch.where(log_pf == -torch.inf, 0.0, log_pf) * grad).sum()
        leaves = [hidden, weight] if bias is None else [hidden, weight, bias]
        gradients = (
            torch.autograd.grad(total, leaves, allow_unused=True)
            if total.requires_grad
            else (None,) * len(leaves)
        )
        filled = [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(leaves, gradients, strict=True)
        ]
        return log_pf.detach(), filled[0], filled[1], filled[2] if len(filled) == 3 else None

    def saved(self) -> int:
        """Slopes kept for the backward pass."""
        batch, count, length = self.tokens.shape
        return batch * count * sum(self.tree.layout.max_children[:length])

    def run(
        self, namespace: Any, device: str = "cpu", *, recompute: bool = False, sparse: bool = False
    ) -> dict[str, Tensor]:
        """All outputs of a raw backend."""

        def to(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        inputs = (
            *(to(self.hidden), to(self.weight), to(self.bias), to(self.tokens), to(self.mask)),
            *(to(self.tree.buffer), self.temperature),
        )
        log_pf, slopes, plan, invalid = namespace.children_logprobs(
            *inputs, 0 if recompute else self.saved()
        )
        dense = None if sparse else torch.zeros_like(self.weight, device=device)
        d_hidden, rows, values, d_bias = namespace.children_backward(
            *(to(self.grad), *inputs, log_pf, slopes, plan, True, dense),
            *(self.bias is not None, sparse),
        )
        if sparse:
            dense = torch.zeros_like(self.weight, device=device)
            dense[rows] = values
        assert dense is not None
        results = {"log_pf": log_pf, "hidden": d_hidden, "weight": dense, "bias": d_bias}
        results |= {"invalid": invalid, "rows": rows}
        return {name: value.cpu() for name, value in results.items()}


def check_raw_op(
    namespace: Any,
    case: ChildrenCase,
    device: str = "cpu",
    *,
    recompute: bool = False,
    sparse: bool = False,
    valid: bool = True,
) -> None:
    """Compare ``namespace.children_logprobs`` and its backward with float64."""
    log_pf, d_hidden, d_weight, d_bias = case.expected()
    got = case.run(namespace, device, recompute=recompute, sparse=sparse)
    # Float32 sums of d products; what is stored in 16 bits has one rounding more.
    coarse = {torch.float32: 3e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
    torch.testing.assert_close(got["log_pf"].double(), log_pf, rtol=3e-5, atol=3e-5)
    assert bool((got["log_pf"] <= 0).all())
    assert bool(got["invalid"] == 0) == valid
    for name, expected, dtype in (
        ("hidden", d_hidden, case.hidden.dtype),
        ("weight", d_weight, case.weight.dtype),
        ("bias", d_bias, torch.float32 if case.bias is None else case.bias.dtype),
    ):
        if expected is None:
            assert got[name].numel() == 0
            continue
        assert got[name].dtype == dtype
        tolerance = {"rtol": coarse[dtype], "atol": 5e-5 * max(1.0, float(expected.abs().amax()))}
        torch.testing.assert_close(got[name].double(), expected, **tolerance)
    assert bool((got["hidden"][~case.full_mask()] == 0).all())
    if sparse:
        used = (d_weight != 0).any(1).nonzero().squeeze(1)
        assert bool((got["rows"].diff() > 0).all())
        assert set(used.tolist()) <= set(got["rows"].tolist())
