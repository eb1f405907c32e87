"""``gflowgr::children_logprobs``: log-probabilities among the children of each token's tree node.

The reference is ``gflowgr.ops.logprobs.reference._children_logprobs``; the fast backends are
in ``csrc/logprobs_children``. Work is proportional to the sum, over the rows, of the children of
the row's node; a node with one child costs nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gflowgr import backends
from gflowgr.ops import transforms
from gflowgr.ops.inputs import HeadInputs
from gflowgr.ops.logprobs import children_reference as children_torch
from gflowgr.ops.precision import compute_dtype
from gflowgr.tree import PrefixTree
from gflowgr.tree.facts import check_head

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]

SAVED_LIMIT = 2**28
"""Numbers kept for the backward pass at most (1 GiB); where more could be needed it recomputes."""

_LAZY_ZEROS_BYTES = 2**22


def children_logprobs(
    inputs: HeadInputs, tree: PrefixTree, *, sparse_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """log_pf [B, N, L] of checked inputs, normalised over children, with gradients.

    Semantics, dtypes and masked rows are those of :func:`gflowgr.ops.trajectory_logprobs`. A row
    whose log-probability is -inf (outside the tree, or forbidden by the bias) passes no gradient.
    With ``sparse_grad`` the gradient of ``weight`` is a coalesced sparse tensor holding the rows of
    the children of all visited nodes that have a choice.

    Memory besides inputs, outputs and gradients: 4 bytes for every product (row and child of its
    node), kept from the forward to the backward pass, of at most ``SAVED_LIMIT``, else recomputed
    there 2**24 at a time; 32 bytes a row; in the backward pass, for a head in 16 bits or a sparse
    gradient, one float32 row per distinct child. Nothing else grows with V or d.

    Returns:
        (log_pf, invalid): invalid [1] int64 is 0 if every trajectory is an identifier of the tree
        or masked as a whole (always 0 from the reference while data checks are off).
    """
    log_pf, _, _, invalid = torch.ops.gflowgr.children_logprobs(
        inputs.hidden,
        inputs.weight,
        inputs.bias,
        inputs.tokens,
        inputs.mask,
        tree.buffer,
        inputs.temperature,
        products_kept(inputs, tree),
        sparse_grad,
    )
    return log_pf, invalid


def products_kept(inputs: HeadInputs, tree: PrefixTree) -> int:
    """Numbers to keep for the backward pass, for what the rows could need at most.

    0 where nothing asks for a gradient, or where they could be more than ``SAVED_LIMIT``.
    """
    leaves = (inputs.hidden, inputs.weight, inputs.bias)
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in leaves):
        return 0
    batch, branches, steps = inputs.tokens.shape
    products = batch * branches * sum(tree.layout.max_children[:steps])
    return products if products <= SAVED_LIMIT else 0


# ------------------------------------------------------------------ the reference as a backend


def reference_inputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    tree: Tensor,
    temperature: float,
) -> tuple[HeadInputs, PrefixTree]:
    """The arguments of an op as the reference takes them."""
    found = PrefixTree(tree)
    inputs = HeadInputs(hidden, weight, tokens, bias, mask, found, temperature, "children")
    return inputs, found


def _forward_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    tree: Tensor,
    temperature: float,
    saved: int,
) -> Outputs:
    log_pf, slopes, plan, invalid = _empty_outputs(hidden, weight, bias, tokens, saved)
    inputs, found = reference_inputs(hidden, weight, bias, tokens, mask, tree, temperature)
    log_pf, wrong = children_torch.forward(inputs, found)
    return log_pf, slopes.zero_(), plan.zero_(), invalid.fill_(wrong)


def _backward_torch(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    tree: Tensor,
    temperature: float,
    log_pf: Tensor,
    slopes: Tensor,
    plan: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    sparse: bool,
) -> Outputs:
    inputs, found = reference_inputs(hidden, weight, bias, tokens, mask, tree, temperature)
    d_hidden, d_weight, d_bias, used = children_torch.backward(
        grad, inputs, found, log_pf, need_hidden, need_weight, need_bias
    )
    rows = used if sparse else tokens.new_empty(0)
    if d_weight is not None and sparse:
        d_weight = d_weight[used]
    return (
        hidden.new_empty(0) if d_hidden is None else d_hidden,
        weight.new_empty(0) if d_weight is None else d_weight,
        weight.new_empty(0) if d_bias is None else d_bias,
        rows,
    )


# ------------------------------------------------------------------ the compiled backends


def _forward_compiled(
    namespace: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    tree: Tensor,
    temperature: float,
    saved: int,
) -> Outputs:
    inputs = backends.contiguous(hidden, weight, bias, tokens, mask, tree)
    out: Outputs = namespace.children_logprobs(*inputs, temperature, saved)
    return out


def backward_compiled(
    namespace: Any,
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    tree: Tensor,
    temperature: float,
    log_pf: Tensor,
    slopes: Tensor,
    plan: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    sparse: bool,
) -> Outputs:
    """Gradients of hidden, weight and bias, and the rows of a sparse one, from the kept slopes."""
    dense = _zeros_like(weight) if need_weight and not sparse else None
    d_hidden, rows, values, d_bias = namespace.children_backward(
        *backends.contiguous(grad, hidden, weight, bias, tokens, mask, tree),
        temperature,
        *backends.contiguous(log_pf, slopes, plan),
        need_hidden,
        dense,
        need_bias,
        sparse,
    )
    return d_hidden, values if dense is None else dense, d_bias, rows


def _zeros_like(weight: Tensor) -> Tensor:
    """Zeros [V, d]; on the CPU from fresh pages, which the system hands out already zero.

    Of a large head only few rows get a gradient: the others need not be written.
    """
    shape, dtype = weight.shape, weight.dtype
    if weight.device.type != "cpu" or weight.nbytes < _LAZY_ZEROS_BYTES:
        return torch.zeros(shape, dtype=dtype, device=weight.device)
    return torch.from_numpy(np.zeros(weight.nbytes, np.uint8)).view(dtype).view(shape)


def compiled(name: str) -> Any:
    """The ops of a compiled backend."""
    return torch.ops.gflowgr_cpp if name == "cpp" else torch.ops.gflowgr_cuda


# ------------------------------------------------------------------ registration


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    tree: Tensor,
    temperature: float,
    saved: int,
    sparse_grad: bool,
) -> Outputs:
    transforms.refuse_forward_mode("children_logprobs")
    check_head(tree, weight.shape[0], "the rows of weight")
    if sparse_grad and backends.capturing():
        raise RuntimeError(
            "sparse_grad must be False while a CUDA graph is captured; got True: how many rows the "
            "gradient has is read from the GPU"
        )
    inputs = (hidden, weight, bias, tokens, mask, tree, temperature, saved)
    name = backends.resolve("children_logprobs", hidden.device, compute_dtype(hidden, weight, bias))
    if name == "torch":
        return _forward_torch(*inputs)
    return _forward_compiled(compiled(name), *inputs)


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    tree: Tensor,
    temperature: float,
    saved: int,
    sparse_grad: bool,
) -> Outputs:
    return _empty_outputs(hidden, weight, bias, tokens, saved)


def _empty_outputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, saved: int
) -> Outputs:
    return (
        tokens.new_empty(tokens.shape, dtype=compute_dtype(hidden, weight, bias)),
        tokens.new_empty(saved, dtype=torch.float32),
        tokens.new_empty(4 * tokens.numel() + 8),
        tokens.new_empty(1),
    )


def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    tree: Tensor,
    temperature: float,
    log_pf: Tensor,
    slopes: Tensor,
    plan: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    sparse: bool,
) -> Outputs:
    check_head(tree, weight.shape[0], "the rows of weight")
    inputs = (grad, hidden, weight, bias, tokens, mask, tree, temperature)
    saved = (log_pf, slopes, plan)
    needs = (need_hidden, need_weight, need_bias)
    name = backends.resolve("children_backward", hidden.device, compute_dtype(hidden, weight, bias))
    if name == "torch":
        return _backward_torch(*inputs, *saved, *needs, sparse)
    return backward_compiled(compiled(name), *inputs, *saved, *needs, sparse)


def _backward_fake(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    tree: Tensor,
    temperature: float,
    log_pf: Tensor,
    slopes: Tensor,
    plan: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    sparse: bool,
) -> Outputs:
    rows: Any = 0
    d_weight = weight.new_empty(weight.shape if need_weight else 0)
    if sparse:
        rows = torch.library.get_ctx().new_dynamic_size()
        d_weight = weight.new_empty(rows, weight.shape[1])
    d_hidden, _, d_bias = empty_gradients(hidden, weight, bias, need_hidden, False, need_bias)
    return d_hidden, d_weight, d_bias, tokens.new_empty(rows)


def empty_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors of the shapes of the dense gradients, of no elements where one is not needed."""
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(0) if bias is None or not need_bias else bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, tokens, mask, tree, ctx.temperature, _, ctx.sparse = inputs
    log_pf, slopes, plan, invalid = output
    ctx.mark_non_differentiable(slopes, plan, invalid)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, tokens, mask, tree, log_pf, slopes, plan)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    others = [None] * (len(ctx.needs_input_grad) - 3)
    if grad is None:
        return None, None, None, *others
    hidden, weight, bias, tokens, mask, tree, log_pf, slopes, plan = ctx.saved_tensors
    sparse = ctx.sparse and need_weight
    d_hidden, d_weight, d_bias, rows = torch.ops.gflowgr.children_backward(
        grad,
        hidden,
        weight,
        bias,
        tokens,
        mask,
        tree,
        ctx.temperature,
        log_pf,
        slopes,
        plan,
        need_hidden,
        need_weight,
        need_bias,
        sparse,
    )
    if sparse:
        d_weight = torch.sparse_coo_tensor(
            rows[None], d_weight, weight.shape, check_invariants=False, is_coalesced=True
        )
    return (
        d_hidden if need_hidden else None,
        d_weight if need_weight else None,
        d_bias if need_bias else None,
        *others,
    )


_PROBES = {
    "torch": backends.probe_torch,
    "cpp": backends.float32_only(backends.probe_cpp),
    "cuda": backends.float32_only(backends.probe_cuda),
}
backends.define_op(
    "children_logprobs",
    _forward,
    _forward_fake,
    probes=_PROBES,
    setup_context=_setup_context,
    backward=_differentiate,
)
backends.define_op(
    "children_backward",
    _backward,
    _backward_fake,
    probes=_PROBES,
    backward=transforms.refuse_second_order("children_backward", "gflowgr.ops.logprobs.reference"),
)
