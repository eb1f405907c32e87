"""Trajectory log-probabilities from hidden states and the output head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gflowgr.ops import checks, transforms
from gflowgr.ops.logprobs import dense as head
from gflowgr.ops.logprobs.children import children_logprobs
from gflowgr.ops.logprobs.reference import (
    HeadInputs,
    as_autocast,
    dense_logprobs,
    level_logprobs,
    logprobs_definition,
    vocab_logprobs,
)

if TYPE_CHECKING:
    from gflowgr.tree import PrefixTree


def trajectory_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    tree: PrefixTree | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    normalize: str | None = None,
    sparse_grad: bool = False,
) -> Tensor:
    """Log-probability of every token of N trajectories per prompt, log P_F(t_{l+1} | U, s_l).

    ``log softmax((hidden @ weight.T + bias) / temperature)`` at the given tokens, where the softmax
    runs over the whole vocabulary or over the tokens that continue the prefix in the tree.

    Args:
        hidden: [B, N, L, d] decoder states; ``hidden[b, n, l]`` predicts ``tokens[b, n, l]``.
        weight: [V, d] output head.
        tokens: [B, N, L] integer token ids.
        bias: [V] added to the logits; -inf forbids a token (a valid forbidden token has
            log-probability -inf and no usable gradient).
        tree: a PrefixTree on the device of `hidden`; every trajectory must be an identifier of it.
        mask: [B, N, L] bool, a prefix of each row (true = real token); None = all true.
        temperature: divides the logits, bias included; > 0.
        normalize: over what the probabilities sum to 1: "vocab"; "children" = the children of the
            token's prefix node; "level" = the codebook of the token's position, the slice of the
            head from the smallest to the largest token that the tree has there (both need `tree`).
            None means "children" with a tree and "vocab" without one. Where one identifier is the
            prefix of another, stopping there has no probability of its own.
        sparse_grad: give the gradient of `weight` as a sparse tensor of the rows that competed, as
            torch.gather and torch.nn.Embedding do; only for "children".

    Returns:
        log_pf [B, N, L] in nats, float32 (float64 if any floating input is). Exactly 0 under a
        false mask, where hidden states and tokens may hold anything (NaN, out-of-range ids) and get
        zero gradient.

    float16 and bfloat16 inputs are multiplied exactly and accumulated in float32; their gradients
    are accumulated in float32 and rounded once. Under autocast the inputs are rounded to its dtype
    first, as those of any output head are.

    Cost, with T valid tokens, over the vocabulary: one matrix product of 2 T V d FLOPs forward and
    three backward, two forward and none backward where only `hidden` wants a gradient. Memory: as
    the module :mod:`gflowgr.ops.flow_loss.fused` states it; plain PyTorch forms the logits in
    blocks of max(256, 2^24 // V) rows instead. "level" is the same on slices of the head.

    "children": 2 d FLOPs forward and 4 backward per row of the head that competes for a token, and
    nothing at nodes with one child. Memory: one number per candidate and the walk's 4 T + 8
    integers; the head's dense gradient is the only thing of size V.

    Raises:
        TypeError: an argument is no tensor or number, or has the wrong dtype.
        ValueError: wrong shape, device or option; on valid positions a token outside the vocabulary
            or a trajectory that is not an identifier of the tree; a mask that is not a prefix of
            its rows.

    Forward-mode derivatives and the transforms of ``torch.func`` run on the PyTorch definition,
    with all logits at once; "children" needs the same tokens and mask along all of a ``vmap``.

    Source: GFlowGR (arXiv 2506.16114), forward policy; children normalisation is the GFlowNet's
    policy on the prefix tree.
    """
    data = checks.DataChecks()
    inputs = check_head_inputs(
        hidden, weight, tokens, bias, tree, mask, temperature, normalize, sparse_grad, data
    )
    return checked_logprobs(inputs, tree, data)


def checked_logprobs(
    inputs: HeadInputs, tree: PrefixTree | None, data: checks.DataChecks
) -> Tensor:
    """log_pf [B, N, L] of inputs whose values are checked here, by the fastest backend that can."""
    if inputs.tree is None or inputs.normalize != "children":
        run_data_checks(inputs, tree, data)
        transformed = transforms.definition_only("head_logprobs")
        dense = dense_logprobs if transformed else head.head_logprobs
        if inputs.tree is None:
            return vocab_logprobs(inputs, dense)
        return level_logprobs(inputs, inputs.tree, dense)
    data.run()
    if transforms.definition_only("children_logprobs"):
        return _transformed_children(inputs, inputs.tree, data)
    log_pf, invalid = children_logprobs(inputs, inputs.tree, sparse_grad=inputs.sparse_grad)
    if data.enabled and invalid.item() != 0:
        _check_trajectories(inputs, inputs.tree)
    return log_pf


def _transformed_children(inputs: HeadInputs, tree: PrefixTree, data: checks.DataChecks) -> Tensor:
    if transforms.is_batched(inputs.tokens) or transforms.is_batched(inputs.mask):
        raise RuntimeError(
            'normalize="children" must have the same tokens and mask along all of torch.func.vmap, '
            "since they decide which rows of the head compete; got batched ones"
        )
    if data.enabled:
        _check_trajectories(inputs, tree)
    return logprobs_definition(inputs)


def _check_trajectories(inputs: HeadInputs, tree: PrefixTree) -> None:
    """Say what is wrong with mask or tokens that a walk down the tree refuses."""
    data = checks.DataChecks()
    shape, device = inputs.tokens.shape, inputs.tokens.device
    checks.check_mask(inputs.mask, shape, device, "hidden", data)
    checks.check_tokens(inputs.tokens, inputs.full_mask, inputs.weight.shape[0], data)
    run_data_checks(inputs, tree, data)


def check_head_inputs(
    hidden: object,
    weight: object,
    tokens: object,
    bias: object,
    tree: PrefixTree | None,
    mask: object,
    temperature: object,
    normalize: object,
    sparse_grad: object,
    data: checks.DataChecks,
) -> HeadInputs:
    """Check types, shapes, dtypes, devices and options; register the checks on values."""
    floating = checks.FLOAT_DTYPES
    hidden = checks.check_tensor("hidden", hidden, (None,) * 4, "BNLd", dtypes=floating)
    *batch, width = hidden.shape
    device = hidden.device
    weight = checks.check_tensor(
        "weight", weight, (None, width), "Vd", dtypes=floating, device=device, source="hidden"
    )
    vocab_size = weight.shape[0]
    if vocab_size == 0:
        raise ValueError(f"weight must have at least one row, got shape {list(weight.shape)}")
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
    if tree is None:
        if normalize != "vocab":
            raise ValueError(f'normalize="{normalize}" needs a tree, got tree=None')
    else:
        checks.check_tree(tree, vocab_size, device, "hidden")
    if not isinstance(sparse_grad, bool):
        raise TypeError(f"sparse_grad must be a bool, got {type(sparse_grad).__name__}")
    if sparse_grad and normalize != "children":
        raise ValueError(f'sparse_grad=True needs normalize="children", got {normalize!r}')
    if normalize == "children":
        # Walking the tree finds what is wrong with mask or tokens: checked_logprobs.
        data = checks.DataChecks(enabled=False)
    full_mask = checks.check_mask(mask, batch, device, "hidden", data)
    checks.check_tokens(tokens, full_mask, vocab_size, data)
    return HeadInputs(
        hidden=as_autocast(hidden),
        weight=as_autocast(weight),
        tokens=tokens,
        bias=None if bias is None else as_autocast(bias),
        mask=None if mask is None else full_mask,
        tree=None if normalize == "vocab" else tree,
        temperature=temperature,
        normalize=normalize,
        sparse_grad=sparse_grad,
        looked_at=data.enabled,
    )


def run_data_checks(inputs: HeadInputs, tree: PrefixTree | None, data: checks.DataChecks) -> None:
    """Run the registered checks on values, then look every trajectory up in the tree."""
    data.run()
    if tree is not None and data.enabled:
        tree.validate(inputs.tokens, mask=inputs.mask, name="tokens")
