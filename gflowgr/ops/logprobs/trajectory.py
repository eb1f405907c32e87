"""Trajectory log-probabilities from hidden states and the output head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gflowgr.ops import checks, transforms
from gflowgr.ops.inputs import HeadInputs, check_head_inputs
from gflowgr.ops.logprobs import reference
from gflowgr.ops.logprobs.children import children_logprobs
from gflowgr.ops.logprobs.dense import dense_logprobs
from gflowgr.ops.logprobs.reference import level_logprobs, logprobs_reference, vocab_logprobs

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

    Forward-mode derivatives and the transforms of ``torch.func`` run on the PyTorch reference,
    with all logits at once; "children" needs the same tokens and mask along all of a ``vmap``.

    Source: GFlowGR (arXiv 2506.16114), forward policy; children normalisation is the GFlowNet's
    policy on the prefix tree.
    """
    data = checks.DataChecks()
    inputs = check_head_inputs(
        hidden,
        weight,
        tokens,
        bias=bias,
        tree=tree,
        mask=mask,
        temperature=temperature,
        normalize=normalize,
        sparse_grad=sparse_grad,
        data=data,
    )
    data.run()
    return compute_logprobs(inputs, look_up=data.enabled)


def compute_logprobs(inputs: HeadInputs, *, look_up: bool) -> Tensor:
    """log_pf [B, N, L] of checked inputs, by the fastest backend that can.

    ``look_up``: raise ValueError where the walk to the children of each token's node finds a
    trajectory that is no identifier of the tree.
    """
    if inputs.normalize == "children":
        assert inputs.tree is not None
        if transforms.reference_only("children_logprobs"):
            return _transformed_children(inputs, inputs.tree, look_up=look_up)
        log_pf, invalid = children_logprobs(inputs, inputs.tree, sparse_grad=inputs.sparse_grad)
        if look_up and invalid.item() != 0:
            check_trajectories(inputs, inputs.tree)
        return log_pf
    transformed = transforms.reference_only("dense_logprobs")
    dense = reference.dense_logprobs if transformed else dense_logprobs
    if inputs.tree is None:
        return vocab_logprobs(inputs, dense)
    return level_logprobs(inputs, inputs.tree, dense)


def _transformed_children(inputs: HeadInputs, tree: PrefixTree, *, look_up: bool) -> Tensor:
    if transforms.is_batched(inputs.tokens) or transforms.is_batched(inputs.mask):
        raise RuntimeError(
            'normalize="children" must have the same tokens and mask along all of torch.func.vmap, '
            "since they decide which rows of the head compete; got batched ones"
        )
    if look_up:
        check_trajectories(inputs, tree)
    return logprobs_reference(inputs)


def check_trajectories(inputs: HeadInputs, tree: PrefixTree) -> None:
    """Raise the error for a mask or tokens that a walk down the tree refuses."""
    data = checks.DataChecks()
    shape, device = inputs.tokens.shape, inputs.tokens.device
    checks.check_mask(inputs.mask, shape, device, "hidden", data)
    checks.check_tokens(inputs.tokens, inputs.full_mask, inputs.weight.shape[0], data)
    checks.check_in_tree(inputs.tokens, inputs.mask, tree, data)
    data.run()
