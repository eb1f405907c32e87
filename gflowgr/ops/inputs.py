"""The checked inputs that log-probabilities and fused losses share: states, head, tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gflowgr.ops import checks
from gflowgr.ops.precision import as_autocast, compute_dtype

if TYPE_CHECKING:
    from gflowgr.tree import PrefixTree

__all__ = ["HeadInputs", "check_allowed", "check_head_inputs"]


@dataclass(frozen=True)
class HeadInputs:
    """Checked arguments of :func:`gflowgr.ops.trajectory_logprobs`."""

    hidden: Tensor  # [B, N, L, d]
    weight: Tensor  # [V, d]
    tokens: Tensor  # [B, N, L]
    bias: Tensor | None  # [V]
    mask: Tensor | None  # [B, N, L]; None = all true
    tree: PrefixTree | None  # given only where it normalises
    temperature: float
    normalize: str  # "vocab", "level" or "children"
    sparse_grad: bool = False  # a row-sparse gradient of the head, for "children"
    looked_at: bool = False  # whether the data checks have seen tokens and mask

    @property
    def full_mask(self) -> Tensor:
        """The mask, all true where none was given."""
        if self.mask is None:
            return torch.ones(self.tokens.shape, dtype=torch.bool, device=self.tokens.device)
        return self.mask

    @property
    def marked_tokens(self) -> Tensor:
        """The tokens [B, N, L] as the ops take them; see :func:`checks.mark_tokens`."""
        size = self.weight.shape[0]
        return checks.mark_tokens(self.tokens, self.mask, size, looked_at=self.looked_at)

    @property
    def dtype(self) -> torch.dtype:
        """float64 if any floating input is float64, float32 otherwise."""
        return compute_dtype(self.hidden, self.weight, self.bias)


def check_head_inputs(
    hidden: object,
    weight: object,
    tokens: object,
    *,
    bias: object,
    tree: PrefixTree | None,
    mask: object,
    temperature: object,
    normalize: object,
    sparse_grad: object,
    data: checks.DataChecks,
) -> HeadInputs:
    """Check types, shapes, dtypes, devices and options; add the checks on values to `data`.

    For "children" tokens and mask get no check here: the op's walk down the tree finds their
    errors.
    """
    floating = checks.FLOAT_DTYPES
    hidden = checks.check_tensor("hidden", hidden, (None,) * 4, "BNLd", dtypes=floating)
    *batch, width = hidden.shape
    device = hidden.device
    weight = checks.check_tensor(
        "weight", weight, (None, width), "Vd", dtypes=floating, device=device, source="hidden"
    )
    vocab_size = weight.shape[0]
    if vocab_size == 0:
        raise ValueError(f"weight must have at least one row; got shape {list(weight.shape)}")
    tokens = checks.check_tensor(
        "tokens",
        tokens,
        batch,
        "BNL",
        dtypes=checks.INTEGER_DTYPES,
        device=device,
        source="hidden",
    ).long()
    if bias is not None:
        bias = checks.check_tensor(
            "bias", bias, (vocab_size,), "V", dtypes=floating, device=device, source="weight"
        )
    temperature = checks.check_number("temperature", temperature, above=0.0)
    if normalize is None:
        normalize = "vocab" if tree is None else "children"
    normalize = checks.check_choice("normalize", normalize, checks.NORMALIZERS)
    if tree is not None:
        checks.check_tree(tree, vocab_size, device, "hidden")
    elif normalize != "vocab":
        raise ValueError(f'normalize="{normalize}" needs a tree; got tree=None')
    if not isinstance(sparse_grad, bool):
        raise TypeError(f"sparse_grad must be a bool; got {type(sparse_grad).__name__}")
    if sparse_grad and normalize != "children":
        raise ValueError(f'sparse_grad=True needs normalize="children"; got {normalize!r}')
    values = data if normalize != "children" else checks.DataChecks(enabled=False)
    full_mask = checks.check_mask(mask, batch, device, "hidden", values)
    given_mask = None if mask is None else full_mask
    checks.check_tokens(tokens, full_mask, vocab_size, values)
    if tree is not None:
        checks.check_in_tree(tokens, given_mask, tree, values)
    return HeadInputs(
        hidden=as_autocast(hidden),
        weight=as_autocast(weight),
        tokens=tokens,
        bias=None if bias is None else as_autocast(bias),
        mask=given_mask,
        tree=None if normalize == "vocab" else tree,
        temperature=temperature,
        normalize=normalize,
        sparse_grad=sparse_grad,
        looked_at=values.enabled,
    )


def check_allowed(
    name: str,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    data: checks.DataChecks,
) -> None:
    """Register the check that the bias, called `name`, forbids no valid token."""
    if bias is None:
        return

    def forbidden() -> Tensor:
        found = bias[tokens.clamp(0, len(bias) - 1)] == -math.inf
        return found if mask is None else mask & found

    data.add(
        forbidden,
        lambda i: (
            f"{checks.at('tokens', i)} = {tokens[i].item()} is forbidden, "
            f"{name}[{tokens[i].item()}] = -inf: its log-probability is -inf, no loss is finite"
        ),
    )
