"""Flow-matching losses straight from hidden states and the output head.

Each is ``loss(trajectory_logprobs(hidden, weight, tokens, ...), ...)`` in one call, with the
supervised term of the joint objective on request. All inputs are checked before anything is
computed.

Joint objective: ``nll_weight`` adds the token-summed negative log-likelihood NLL_b of each prompt's
observed positive, trajectory n = 0, from the same log-probabilities (so with the same temperature
and normalisation). It combines with ``reduction`` as

- ``"prompt"``: + nll_weight * mean of NLL_b over the prompts that the flow loss counts, those with
  a valid trajectory. This is GFlowGR's joint objective ``L_GR + lambda * L_GFN`` over lambda, with
  ``nll_weight`` = 1 / lambda;
- ``"mean"``: + the same mean, over prompts and not over trajectories;
- ``"sum"``: + nll_weight * sum of NLL_b over prompts;
- ``"none"``: + nll_weight * NLL_b at element [b, 0], so that the sum over [B, N] is ``"sum"``.

A prompt whose trajectory 0 is padding adds nothing.

Cost, with T valid tokens and a head [V, d]: over the vocabulary and for a reduction other than
"none", three matrix products of 2 T V d FLOPs for loss and gradients together (two where the head
wants no gradient, one without gradients), the gradients being made in the forward pass. With
reduction "none" it is :func:`gflowgr.ops.trajectory_logprobs` and its backward pass: four.

Memory besides inputs and gradients, in C++ with elements of s bytes (2 for bfloat16 inputs, else 4)
and blocks of R = min(T, max(512, 256 * threads)) tokens: V R s for the block's scores, nothing for
them where T <= d (they lie in the memory of the head's gradient) or where the head wants none;
V R / 16 for their references; V d 4 to sum a bfloat16 gradient of the head where T > R;
R d (4 + s) for the states. On a GPU: the block's scores, at most 256 MiB where one prompt's fit in
that, and V d 4 to sum a 16-bit gradient over blocks.

Errors: those of :func:`gflowgr.ops.trajectory_logprobs` and of the loss; besides, ValueError for a
valid token that the bias forbids (-inf), since its loss would be infinite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from gflowgr.ops import checks, transforms
from gflowgr.ops.flow_loss.dense_op import dense_flow_loss
from gflowgr.ops.flow_loss.losses import check_options
from gflowgr.ops.flow_loss.op import flow_loss
from gflowgr.ops.inputs import check_allowed, check_head_inputs
from gflowgr.ops.logprobs.trajectory import compute_logprobs

if TYPE_CHECKING:
    from gflowgr.tree import PrefixTree

__all__ = [
    "FusedLoss",
    "fused_db_loss",
    "fused_flow_loss",
    "fused_subtb_loss",
    "fused_tb_loss",
    "fused_vargrad_loss",
]

KINDS = ("tb", "db", "subtb", "vargrad")


class FusedLoss(NamedTuple):
    """A fused loss and the log-probabilities that it was made of.

    Attributes:
        loss: a scalar, or [B, N] for reduction "none".
        log_pf: [B, N, L] token log-probabilities, nats, detached.
    """

    loss: Tensor
    log_pf: Tensor


def fused_flow_loss(
    kind: str,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    log_reward: Tensor,
    balance: Tensor | None,
    *,
    lam: float = 0.9,
    bias: Tensor | None = None,
    tree: PrefixTree | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    normalize: str | None = None,
    beta: float = 1.0,
    log_reward_floor: float | None = None,
    residual_clip: float | None = None,
    reduction: str = "prompt",
    nll_weight: float = 0.0,
    sparse_grad: bool = False,
) -> FusedLoss:
    """Any of the fused losses, with log_pf beside the loss: for trainers that log it.

    Args:
        kind: "tb", "db", "subtb" or "vargrad".
        balance: log_z for "tb", log_flow for "db" and "subtb", None for "vargrad".
        residual_clip: None for "subtb".

    The other arguments are those of :func:`fused_tb_loss` and :func:`fused_subtb_loss`.

    Raises:
        ValueError: an unknown kind, a balance for "vargrad", or a clip for "subtb"; besides, what
            the losses raise.
    """
    kind = checks.check_choice("kind", kind, KINDS)
    flow = check_options(
        kind,
        beta,
        log_reward_floor,
        reduction,
        lam=checks.check_number("lam", lam, above=0.0),
        nll_weight=checks.check_number("nll_weight", nll_weight, least=0.0),
        residual_clip=residual_clip,
    )
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
    like = inputs.tokens if inputs.mask is None else inputs.mask
    log_reward = checks.check_log_reward(log_reward, like, flow.floor, "hidden", data)
    check_allowed("bias", inputs.bias, inputs.tokens, inputs.mask, data)
    if kind == "tb":
        balance = checks.check_log_z(balance, like, "hidden")
    elif kind != "vargrad":
        balance = checks.check_log_flow(balance, like, "hidden")
    elif balance is not None:
        raise ValueError(f'balance must be None for "vargrad"; got {type(balance).__name__}')
    data.run()
    in_one_op = inputs.normalize == "vocab" and flow.reduction != "none"
    if in_one_op and not transforms.reference_only("dense_flow_loss"):
        return FusedLoss(*dense_flow_loss(inputs, log_reward, balance, flow))
    log_pf = compute_logprobs(inputs, look_up=data.enabled)
    loss = flow_loss(flow, log_pf, log_reward, balance, inputs.mask)
    return FusedLoss(loss, log_pf.detach())


def fused_tb_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    log_reward: Tensor,
    log_z: Tensor,
    *,
    bias: Tensor | None = None,
    tree: PrefixTree | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    normalize: str | None = None,
    beta: float = 1.0,
    log_reward_floor: float | None = None,
    residual_clip: float | None = None,
    reduction: str = "prompt",
    nll_weight: float = 0.0,
    sparse_grad: bool = False,
) -> Tensor:
    """Trajectory balance from hidden states: :func:`gflowgr.ops.tb_loss` with log_pf computed here.

    Args:
        hidden: [B, N, L, d]; ``hidden[b, n, l]`` predicts ``tokens[b, n, l]``.
        weight: [V, d] output head.
        tokens: [B, N, L] integer token ids; trajectory n = 0 is the observed positive.
        log_reward: [B, N], nats, before shaping.
        log_z: [B] log partition function of each prompt, nats, or a zero-dimensional tensor for
            all.
        bias, tree, mask, temperature, normalize, sparse_grad: as in
            :func:`gflowgr.ops.trajectory_logprobs`.
        beta, log_reward_floor, residual_clip, reduction: as in :func:`gflowgr.ops.tb_loss`.
        nll_weight: weight >= 0 of the supervised term; see the module's docstring.

    Returns:
        A scalar, or [B, N] for reduction "none"; float32, or float64 if any floating input is.
        For log_pf beside the loss: :func:`fused_flow_loss`.

    Source: GFlowGR (arXiv 2506.16114), trajectory balance and joint objective.
    """
    return fused_flow_loss(
        "tb",
        hidden,
        weight,
        tokens,
        log_reward,
        log_z,
        bias=bias,
        tree=tree,
        mask=mask,
        temperature=temperature,
        normalize=normalize,
        beta=beta,
        log_reward_floor=log_reward_floor,
        residual_clip=residual_clip,
        reduction=reduction,
        nll_weight=nll_weight,
        sparse_grad=sparse_grad,
    ).loss


def fused_db_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    log_reward: Tensor,
    log_flow: Tensor,
    *,
    bias: Tensor | None = None,
    tree: PrefixTree | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    normalize: str | None = None,
    beta: float = 1.0,
    log_reward_floor: float | None = None,
    residual_clip: float | None = None,
    reduction: str = "prompt",
    nll_weight: float = 0.0,
    sparse_grad: bool = False,
) -> Tensor:
    """Detailed balance from hidden states: :func:`gflowgr.ops.db_loss` with log_pf computed here.

    ``log_flow`` [B, N, L] is the log-flow of the state before each token, nats. Other arguments,
    the result and errors as in :func:`fused_tb_loss`.

    Source: GFlowGR (arXiv 2506.16114), detailed balance and joint objective.
    """
    return fused_flow_loss(
        "db",
        hidden,
        weight,
        tokens,
        log_reward,
        log_flow,
        bias=bias,
        tree=tree,
        mask=mask,
        temperature=temperature,
        normalize=normalize,
        beta=beta,
        log_reward_floor=log_reward_floor,
        residual_clip=residual_clip,
        reduction=reduction,
        nll_weight=nll_weight,
        sparse_grad=sparse_grad,
    ).loss


def fused_subtb_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    log_reward: Tensor,
    log_flow: Tensor,
    *,
    lam: float = 0.9,
    bias: Tensor | None = None,
    tree: PrefixTree | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    normalize: str | None = None,
    beta: float = 1.0,
    log_reward_floor: float | None = None,
    reduction: str = "prompt",
    nll_weight: float = 0.0,
    sparse_grad: bool = False,
) -> Tensor:
    """SubTB(lambda) from hidden states: :func:`gflowgr.ops.subtb_loss` with log_pf computed here.

    ``log_flow`` [B, N, L] is the log-flow of the state before each token, nats; ``lam`` > 0. Other
    arguments, the result and errors as in :func:`fused_tb_loss`.
    """
    return fused_flow_loss(
        "subtb",
        hidden,
        weight,
        tokens,
        log_reward,
        log_flow,
        lam=lam,
        bias=bias,
        tree=tree,
        mask=mask,
        temperature=temperature,
        normalize=normalize,
        beta=beta,
        log_reward_floor=log_reward_floor,
        reduction=reduction,
        nll_weight=nll_weight,
        sparse_grad=sparse_grad,
    ).loss


def fused_vargrad_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    log_reward: Tensor,
    *,
    bias: Tensor | None = None,
    tree: PrefixTree | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    normalize: str | None = None,
    beta: float = 1.0,
    log_reward_floor: float | None = None,
    residual_clip: float | None = None,
    reduction: str = "prompt",
    nll_weight: float = 0.0,
    sparse_grad: bool = False,
) -> Tensor:
    """VarGrad-TB from hidden states: :func:`gflowgr.ops.vargrad_loss` with log_pf computed here.

    Log Z is estimated from each prompt's own valid trajectories. Other arguments, the result and
    errors as in :func:`fused_tb_loss`.
    """
    return fused_flow_loss(
        "vargrad",
        hidden,
        weight,
        tokens,
        log_reward,
        None,
        bias=bias,
        tree=tree,
        mask=mask,
        temperature=temperature,
        normalize=normalize,
        beta=beta,
        log_reward_floor=log_reward_floor,
        residual_clip=residual_clip,
        reduction=reduction,
        nll_weight=nll_weight,
        sparse_grad=sparse_grad,
    ).loss
