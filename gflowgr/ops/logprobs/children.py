"""``gflowgr::children_logprobs``: log-probabilities among the children of each token's tree node.

The definition is ``gflowgr.ops.logprobs.reference._children_logprobs``; the fast backends are
in ``csrc/logprobs_children``. Work is proportional to the sum, over the rows, of the children of
the row's node; a node with one child costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gflowgr import backends
from gflowgr.ops import transforms
from gflowgr.ops.logprobs import children_reference as children_torch
from gflowgr.ops.logprobs.reference import HeadInputs
from gflowgr.tree.facts import check_head

if TYPE_CHECKING:
    from gflowgr.tree import PrefixTree

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
        or masked as a whole (always 0 from the definition while data checks are off).
    """
    batch, branches, steps = inputs.tokens.shape
    saved = 0
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (inputs.hidden, inputs.weight, inputs.bias)
    ):
        saved = batch * branches * sum(tree.layout.max_children[:steps])
        if saved > SAVED_LIMIT:
            saved = 0
    log_pf, _, _, invalid = torch.ops.gflowgr.children_logprobs(
        inputs.hidden,
        inputs.weight,
        inputs.bias,
        inputs.tokens,
        inputs.mask,
        tree.buffer,
        inputs.temperature,
        saved,
        sparse_grad,
    )
    return log_pf, invalid


# ------------------------------------------------------------------ the definition as a backend


def _definition_inputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    tree: Tensor,
    temperature: float,
) -> tuple[HeadInputs, PrefixTree]:
    from gflowgr.tree import PrefixTree

    found = PrefixTree(tree)
    inputs = HeadInputs(hidden, weight, tokens, bias, mask, found, temperature, "children")
    return inputs, found


def _forward_torch(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, slopes, plan, invalid = _forward_fake(*given)
    log_pf, wrong = children_torch.forward(*_definition_inputs(*given[:7]))
    return log_pf, slopes.zero_(), plan.zero_(), invalid.fill_(wrong)


def _backward_torch(grad: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, _, tokens = given[:4]
    log_pf, _, _, need_hidden, need_weight, need_bias, sparse = given[7:]
    inputs, tree = _definition_inputs(*given[:7])
    d_hidden, d_weight, d_bias, used = children_torch.backward(
        grad, inputs, tree, log_pf, need_hidden, need_weight, need_bias
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


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out: tuple[Tensor, Tensor, Tensor, Tensor] = namespace.children_logprobs(
        hidden.contiguous(),
        weight.contiguous(),
        _contiguous(bias),
        tokens.contiguous(),
        _contiguous(mask),
        tree,
        temperature,
        saved,
    )
    return out


def _backward_compiled(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dense = _zeros_like(weight) if need_weight and not sparse else None
    d_hidden, rows, values, d_bias = namespace.children_backward(
        grad.contiguous(),
        hidden.contiguous(),
        weight.contiguous(),
        _contiguous(bias),
        tokens.contiguous(),
        _contiguous(mask),
        tree,
        temperature,
        log_pf.contiguous(),
        slopes.contiguous(),
        plan.contiguous(),
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


def _namespace(name: str) -> Any:
    return torch.ops.gflowgr_cpp if name == "cpp" else torch.ops.gflowgr_cuda


# ------------------------------------------------------------------ registration


def _accumulator(*tensors: Tensor | None) -> torch.dtype:
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    transforms.refuse_forward_mode("children_logprobs")
    check_head(tree, weight.shape[0], "the rows of weight")
    given = (hidden, weight, bias, tokens, mask, tree, temperature, saved)
    name = backends.resolve("children_logprobs", hidden.device, _accumulator(hidden, weight, bias))
    if name == "torch":
        return _forward_torch(*given, sparse_grad)
    return _forward_compiled(_namespace(name), *given)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        tokens.new_empty(tokens.shape, dtype=_accumulator(hidden, weight, bias)),
        tokens.new_empty(saved, dtype=torch.float32),
        tokens.new_empty(4 * tokens.numel() + 8),
        tokens.new_empty(1),
    )


def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_head(rest[2], weight.shape[0], "the rows of weight")
    name = backends.resolve("children_backward", hidden.device, _accumulator(hidden, weight, bias))
    if name == "torch":
        return _backward_torch(grad, hidden, weight, bias, *rest)
    return _backward_compiled(_namespace(name), grad, hidden, weight, bias, *rest)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows: Any = 0
    d_weight = weight.new_empty(weight.shape if need_weight else 0)
    if sparse:
        rows = torch.library.get_ctx().new_dynamic_size()
        d_weight = weight.new_empty(rows, weight.shape[1])
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        d_weight,
        weight.new_empty(0) if bias is None or not need_bias else bias.new_empty(bias.shape),
        tokens.new_empty(rows),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, tokens, mask, tree, ctx.temperature, _, ctx.sparse = inputs
    log_pf, slopes, plan, invalid = output
    ctx.mark_non_differentiable(slopes, plan, invalid)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, tokens, mask, tree, log_pf, slopes, plan)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    nothing: tuple[None, ...] = (None,) * 6
    if grad is None:
        return None, None, None, *nothing
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
        *nothing,
    )


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError("gflowgr::children_backward has no second derivative")


_library = torch.library.Library("gflowgr", "FRAGMENT")
_HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? mask, Tensor tree, "
    "float temperature"
)
_library.define(
    f"children_logprobs({_HEAD}, SymInt saved, bool sparse_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"children_backward(Tensor grad, {_HEAD}, Tensor log_pf, Tensor slopes, Tensor plan, "
    "bool need_hidden, bool need_weight, bool need_bias, bool sparse)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("children_logprobs", _forward, "CompositeExplicitAutograd")
_library.impl("children_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("gflowgr::children_logprobs", _forward_fake, lib=_library)
torch.library.register_fake("gflowgr::children_backward", _backward_fake, lib=_library)
torch.library.register_autograd(
    "gflowgr::children_logprobs", _differentiate, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("gflowgr::children_backward", _refuse, lib=_library)


for _op in ("children_logprobs", "children_backward"):
    backends.register(_op, "torch", backends.probe_torch)
    backends.register(_op, "cpp", backends.float32_only(backends.probe_cpp))
    backends.register(_op, "cuda", backends.float32_only(backends.probe_cuda))
