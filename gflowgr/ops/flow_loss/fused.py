"""Flow-matching losses straight from hidden states and the output head.

Each is ``loss(trajectory_logprobs(hidden, weight, tokens, ...), ...)`` in one call, with the
supervised term of the joint objective on request. All inputs are checked before anything is
computed.

Joint objective: ``sft_weight`` adds the token-summed negative log-likelihood NLL_b of each prompt's
observed positive, trajectory n = 0, from the same log-probabilities (so with the same temperature
and normalisation). It combines with ``reduction`` as

- ``"prompt"``: + sft_weight * mean of NLL_b over the prompts that the flow loss counts, those with
  a valid trajectory. This is GFlowGR's joint objective ``L_GR + lambda * L_GFN`` over lambda, with
  ``sft_weight`` = 1 / lambda;
- ``"mean"``: + the same mean, over prompts and not over trajectories;
- ``"sum"``: + sft_weight * sum of NLL_b over prompts;
- ``"none"``: + sft_weight * NLL_b at element [b, 0], so that the sum over [B, N] is ``"sum"``.

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

from typing import TYPE_CHECKING, Literal, TypedDict, overload

from torch import Tensor

from gflowgr.ops import checks
from gflowgr.ops.flow_loss.joint import JointCall

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from gflowgr.tree import PrefixTree


class _Options(TypedDict, total=False):
    """Keyword arguments of every fused loss, for the overloads on `return_log_pf`."""

    bias: Tensor | None
    tree: PrefixTree | None
    mask: Tensor | None
    temperature: float
    normalize: str | None
    beta: float
    log_reward_floor: float | None
    reduction: str
    sft_weight: float
    sparse_grad: bool


class _SubTBOptions(_Options, total=False):
    lam: float


@overload
def fused_tb_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    log_reward: Tensor,
    log_z: Tensor,
    *,
    return_log_pf: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def fused_tb_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    log_reward: Tensor,
    log_z: Tensor,
    *,
    return_log_pf: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...


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
    reduction: str = "prompt",
    sft_weight: float = 0.0,
    sparse_grad: bool = False,
    return_log_pf: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
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
        beta, log_reward_floor, reduction: as in :func:`gflowgr.ops.tb_loss`.
        sft_weight: weight >= 0 of the supervised term; see the module's docstring.
        return_log_pf: return ``(loss, log_pf)``, log_pf [B, N, L] detached, for logs.

    Returns:
        A scalar, or [B, N] for reduction "none"; float32, or float64 if any floating input is.

    Source: GFlowGR (arXiv 2506.16114), trajectory balance and joint objective.
    """
    call = JointCall(
        hidden,
        weight,
        tokens,
        log_reward,
        bias=bias,
        tree=tree,
        mask=mask,
        temperature=temperature,
        normalize=normalize,
        beta=beta,
        log_reward_floor=log_reward_floor,
        reduction=reduction,
        sft_weight=sft_weight,
        sparse_grad=sparse_grad,
    )
    log_z = checks.check_log_z(log_z, call.mask, "hidden")
    return call.run("tb", log_z, return_log_pf=return_log_pf)


@overload
def fused_db_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    log_reward: Tensor,
    log_flow: Tensor,
    *,
    return_log_pf: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def fused_db_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    log_reward: Tensor,
    log_flow: Tensor,
    *,
    return_log_pf: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...


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
    reduction: str = "prompt",
    sft_weight: float = 0.0,
    sparse_grad: bool = False,
    return_log_pf: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Detailed balance from hidden states: :func:`gflowgr.ops.db_loss` with log_pf computed here.

    ``log_flow`` [B, N, L] is the log-flow of the state before each token, nats. Other arguments,
    the result and errors as in :func:`fused_tb_loss`.

    Source: GFlowGR (arXiv 2506.16114), detailed balance and joint objective.
    """
    call = JointCall(
        hidden,
        weight,
        tokens,
        log_reward,
        bias=bias,
        tree=tree,
        mask=mask,
        temperature=temperature,
        normalize=normalize,
        beta=beta,
        log_reward_floor=log_reward_floor,
        reduction=reduction,
        sft_weight=sft_weight,
        sparse_grad=sparse_grad,
    )
    log_flow = checks.check_log_flow(log_flow, call.mask, "hidden")
    return call.run("db", log_flow, return_log_pf=return_log_pf)


@overload
def fused_subtb_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    log_reward: Tensor,
    log_flow: Tensor,
    *,
    return_log_pf: Literal[False] = False,
    **options: Unpack[_SubTBOptions],
) -> Tensor: ...


@overload
def fused_subtb_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    log_reward: Tensor,
    log_flow: Tensor,
    *,
    return_log_pf: Literal[True],
    **options: Unpack[_SubTBOptions],
) -> tuple[Tensor, Tensor]: ...


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
    sft_weight: float = 0.0,
    sparse_grad: bool = False,
    return_log_pf: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """SubTB(lambda) from hidden states: :func:`gflowgr.ops.subtb_loss` with log_pf computed here.

    ``log_flow`` [B, N, L] is the log-flow of the state before each token, nats; ``lam`` > 0. Other
    arguments, the result and errors as in :func:`fused_tb_loss`.
    """
    lam = checks.check_number("lam", lam, above=0.0)
    call = JointCall(
        hidden,
        weight,
        tokens,
        log_reward,
        bias=bias,
        tree=tree,
        mask=mask,
        temperature=temperature,
        normalize=normalize,
        beta=beta,
        log_reward_floor=log_reward_floor,
        reduction=reduction,
        sft_weight=sft_weight,
        sparse_grad=sparse_grad,
    )
    log_flow = checks.check_log_flow(log_flow, call.mask, "hidden")
    return call.run("subtb", log_flow, lam=lam, return_log_pf=return_log_pf)


@overload
def fused_vargrad_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    log_reward: Tensor,
    *,
    return_log_pf: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def fused_vargrad_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    log_reward: Tensor,
    *,
    return_log_pf: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...


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
    reduction: str = "prompt",
    sft_weight: float = 0.0,
    sparse_grad: bool = False,
    return_log_pf: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """VarGrad-TB from hidden states: :func:`gflowgr.ops.vargrad_loss` with log_pf computed here.

    Log Z is estimated from each prompt's own valid trajectories. Other arguments, the result and
    errors as in :func:`fused_tb_loss`.
    """
    call = JointCall(
        hidden,
        weight,
        tokens,
        log_reward,
        bias=bias,
        tree=tree,
        mask=mask,
        temperature=temperature,
        normalize=normalize,
        beta=beta,
        log_reward_floor=log_reward_floor,
        reduction=reduction,
        sft_weight=sft_weight,
        sparse_grad=sparse_grad,
    )
    return call.run("vargrad", None, return_log_pf=return_log_pf)
