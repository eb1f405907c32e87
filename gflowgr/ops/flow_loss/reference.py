"""Flow-matching losses and their gradients in plain PyTorch: the reference.

It computes in float32 or float64 on any device. The tests compare every faster backend with it,
and calls that no other backend supports run it. Arguments: :mod:`gflowgr.ops.flow_loss.losses`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gflowgr.ops import checks


class FlowOptions(NamedTuple):
    """The checked options of a flow loss, in the order of the registered ops' arguments.

    Attributes:
        kind: "tb", "db", "subtb" or "vargrad".
        lam: lambda of "subtb", > 0.
        beta: reward temper, > 0.
        floor: least shaped log-reward, nats; None = none.
        reduction: "none", "sum", "mean" or "prompt".
        nll_weight: weight >= 0 of the NLL of trajectory 0, reduced over prompts; 0 = without.
        clip: residual > 0 up to which the loss is quadratic, nats, linear beyond; None = no end.
            Not of "subtb".
    """

    kind: str
    lam: float = 1.0
    beta: float = 1.0
    floor: float | None = None
    reduction: str = "prompt"
    nll_weight: float = 0.0
    clip: float | None = None


@dataclass(frozen=True)
class Trajectories:
    """Clean inputs of a loss: one floating dtype, zeros wherever the mask is false.

    ``whole``: there is no padding, so nothing need be replaced by zeros.
    """

    log_pf: Tensor  # [B, N, L]
    log_reward: Tensor  # [B, N], shaped
    mask: Tensor  # [B, N, L]
    valid: Tensor  # [B, N]
    whole: bool = False

    def divisor(self, reduction: str) -> Tensor | int:
        """What "prompt" and "mean" divide the sum by, at least 1."""
        batch, count = self.valid.shape
        if self.whole:
            return max(1, batch if reduction == "prompt" else batch * count)
        counted = self.valid if reduction == "mean" else self.valid.any(-1)
        return counted.sum().clamp(min=1)

    def reduced(self, losses: Tensor, reduction: str) -> Tensor:
        """:func:`reduce_trajectories` of losses [B, N], or of tokens [B, N, L]."""
        if self.whole and reduction in ("prompt", "mean") and self.valid.numel() > 0:
            return losses.sum() / self.divisor(reduction)
        if losses.dim() == 3:
            losses = losses.sum(-1)
        return reduce_trajectories(losses, self.valid, reduction)

    def zeroed(self, x: Tensor) -> Tensor:
        """``x`` [B, N, L] with zeros at padding tokens."""
        return x if self.whole else x.masked_fill(~self.mask, 0.0)

    def zeroed_rows(self, x: Tensor) -> Tensor:
        """``x`` [B, N] with zeros at padding trajectories."""
        return x if self.whole else x.masked_fill(~self.valid, 0.0)


def full_mask(log_pf: Tensor, mask: Tensor | None) -> Tensor:
    """The mask, all true where none was given."""
    if mask is None:
        return torch.ones(log_pf.shape, dtype=torch.bool, device=log_pf.device)
    return mask


def prepare(
    log_pf: Tensor,
    log_reward: Tensor,
    mask: Tensor | None,
    *,
    beta: float,
    floor: float | None,
    dtype: torch.dtype,
) -> Trajectories:
    """Clean checked inputs and shape the reward.

    Padding is replaced BEFORE anything is computed from it: `0 * NaN` in a backward pass would
    otherwise carry the NaN of a masked position into the gradient.

    A row whose mask is no prefix counts as one of L tokens with the reward NaN: without data
    checks its loss is then NaN, and not a number that looks right.
    """
    if mask is None and log_pf.shape[-1] > 0:
        # Nine passes over the trajectories less, and the plain formula has none of them.
        mask = log_pf.new_ones((), dtype=torch.bool).expand(log_pf.shape)
        valid = mask[..., 0]
        reward = log_reward.to(dtype)
        if beta != 1.0:
            reward = beta * reward
        reward = _floored(reward, floor)
        return Trajectories(log_pf.to(dtype), reward, mask, valid, whole=True)
    mask = full_mask(log_pf, mask)
    valid = mask.any(-1)
    broken = checks.mask_rises(mask).any(-1)
    mask = mask | broken[..., None]
    reward = beta * log_reward.to(dtype).masked_fill(~valid, 0.0)
    reward = _floored(reward, floor)
    if floor is not None:
        reward = reward.masked_fill(~valid, 0.0)
    reward = reward.masked_fill(broken, math.nan)
    return Trajectories(log_pf.to(dtype).masked_fill(~mask, 0.0), reward, mask, valid)


def _floored(reward: Tensor, floor: float | None) -> Tensor:
    # A comparison with NaN is false, so NaN is floored too.
    return reward if floor is None else reward.masked_fill(~(reward > floor), floor)


def reduce_trajectories(losses: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """Reduce losses [B, N] that are zero at padding trajectories."""
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    counted = valid if reduction == "mean" else valid.any(-1)
    return total / counted.sum().clamp(min=1)


def huber(residual: Tensor, clip: float | None) -> Tensor:
    """``r^2`` up to the clip, and the tangent of that beyond: ``clip * (2 |r| - clip)``.

    Twice the usual Huber loss (Huber 1964), since the losses' squares have no factor 1/2.
    """
    if clip is None:
        return residual.square()
    size = residual.abs()
    return torch.where(size <= clip, residual.square(), clip * (2 * size - clip))


def _clipped(residual: Tensor, clip: float | None) -> Tensor:
    """Half of the derivative of :func:`huber`."""
    return residual if clip is None else residual.clamp(-clip, clip)


def tb_reference(t: Trajectories, log_z: Tensor, clip: float | None = None) -> Tensor:
    """Trajectory balance, squared residual of each trajectory [B, N]; see :func:`huber`."""
    return huber(tb_residual(t, log_z), clip)


def tb_residual(t: Trajectories, log_z: Tensor) -> Tensor:
    """Residual of every trajectory [B, N], zero at padding."""
    log_z = log_z.to(t.log_pf.dtype)[:, None]
    if not t.whole:
        log_z = t.zeroed_rows(log_z.expand_as(t.valid))
    return log_z + t.log_pf.sum(-1) - t.log_reward


def db_reference(t: Trajectories, log_flow: Tensor, clip: float | None = None) -> Tensor:
    """Detailed balance, squared residuals summed over each trajectory's tokens [B, N]."""
    return huber(db_residual(t, log_flow), clip).sum(-1)


def db_residual(t: Trajectories, log_flow: Tensor) -> Tensor:
    """Residual of every token [B, N, L], zero at padding."""
    flow = t.zeroed(log_flow.to(t.log_pf.dtype))
    # The flow of the state each token leads to: R at the last one.
    if t.whole:
        after = torch.cat([flow[..., 1:], t.log_reward[..., None]], -1)
    else:
        after = torch.where(_last(t.mask), t.log_reward[..., None], _shift_left(flow))
    return flow + t.log_pf - after


def subtb_reference(t: Trajectories, log_flow: Tensor, lam: float) -> Tensor:
    """SubTB(lambda), weighted squared residuals over all sub-trajectories [B, N]."""
    weight, residual = _subtb_pairs(t, log_flow, lam)
    return (weight * residual.square()).sum((-2, -1))


def _subtb_pairs(t: Trajectories, log_flow: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Weights and residuals of all sub-trajectories (i, j), each [B, N, L+1, L+1].

    With potentials g_i = log F(s_i) - sum_{l<i} log_pf_l the residual of (i, j) is g_i - g_j, so
    all pairs come from one outer difference of L+1 numbers per trajectory. Where a forbidden token
    lies between them it is -inf, which that difference would make NaN beyond the token.
    """
    dtype, device = t.log_pf.dtype, t.log_pf.device
    steps = t.log_pf.shape[-1]
    zero = t.log_pf.new_zeros((*t.valid.shape, 1))
    length = t.mask.sum(-1)  # [B, N]
    position = torch.arange(steps + 1, device=device)

    flow = torch.cat([t.zeroed(log_flow.to(dtype)), zero], -1)
    flow = torch.where(position == length[..., None], t.log_reward[..., None], flow)
    forbidden = t.log_pf == -math.inf
    along = t.log_pf.masked_fill(forbidden, 0.0).cumsum(-1)
    potential = flow - torch.cat([zero, along], -1)
    before = torch.cat([zero, forbidden.to(dtype).cumsum(-1)], -1)

    # Weights lambda^(j-i) over their sum, in logs, so that no power under- or overflows.
    distance = position[None, :] - position[:, None]  # j - i
    pair = (distance > 0) & (position <= length[..., None])[..., None, :]
    log_power = distance.to(dtype) * math.log(lam)
    scale = _subtb_log_normaliser(steps, lam, dtype, device)[length]
    exponent = torch.where(pair, log_power - scale[..., None, None], -math.inf)
    crossed = pair & (before[..., :, None] != before[..., None, :])
    residual = potential[..., :, None] - potential[..., None, :]
    return exponent.exp(), torch.where(crossed, -math.inf, residual)


def _subtb_log_normaliser(
    steps: int, lam: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """log sum_{i<j<=K} lambda^(j-i) for every length K = 0..L [L+1]; 0 for K = 0.

    A trajectory of K tokens has K + 1 - d sub-trajectories of d tokens.
    """
    size = torch.arange(steps + 1, device=device)
    count = (size[:, None] + 1 - size[None, :]).clamp(min=1).to(dtype)
    present = (size[None, :] >= 1) & (size[None, :] <= size[:, None])
    terms = torch.where(present, count.log() + size.to(dtype) * math.log(lam), -math.inf)
    return torch.where(size > 0, torch.logsumexp(terms, -1), 0.0)


def vargrad_reference(t: Trajectories, clip: float | None = None) -> Tensor:
    """VarGrad-TB, squared residual of each trajectory against its prompt's own estimate [B, N]."""
    return huber(vargrad_residual(t), clip)


def vargrad_residual(t: Trajectories) -> Tensor:
    """Residual of every trajectory against its prompt's estimate [B, N], zero at padding."""
    gap = t.log_reward - t.log_pf.sum(-1)
    estimate = gap.mean(-1) if t.whole else valid_mean(gap, t.valid)
    return t.zeroed_rows(estimate[:, None] - gap)


def positive_nll(t: Trajectories) -> Tensor:
    """Token-summed NLL of trajectory 0, zero for the others [B, N]."""
    nll = -t.log_pf.sum(-1)
    return torch.cat([nll[:, :1], torch.zeros_like(nll[:, 1:])], -1)


def valid_mean(gap: Tensor, valid: Tensor) -> Tensor:
    """Mean over each prompt's valid trajectories [B] (`gap` is zero elsewhere); 0 without one."""
    return gap.sum(-1) / valid.sum(-1).clamp(min=1)


def _last(mask: Tensor) -> Tensor:
    """True at the last valid token of each row [B, N, L]."""
    return mask & ~_shift_left(mask)


def _shift_left(x: Tensor) -> Tensor:
    """x[..., 1:] followed by a zero."""
    return torch.cat([x[..., 1:], torch.zeros_like(x[..., :1])], -1)


def _shift_right(x: Tensor) -> Tensor:
    """A zero followed by x[..., :-1]."""
    return torch.cat([torch.zeros_like(x[..., :1]), x[..., :-1]], -1)


# ------------------------------------------------------------------ the registered op


def loss_reference(
    log_pf: Tensor,
    log_reward: Tensor,
    balance: Tensor | None,
    mask: Tensor | None,
    flow: FlowOptions,
) -> Tensor:
    """The reduced loss of one flow.kind plus ``nll_weight`` times the NLL of trajectory 0.

    Arguments and result: ``gflowgr::flow_loss`` in :mod:`gflowgr.ops.flow_loss.op`. The NLL is
    reduced over prompts for "mean" too.
    """
    t = prepare(log_pf, log_reward, mask, beta=flow.beta, floor=flow.floor, dtype=log_pf.dtype)
    if flow.kind == "vargrad":
        losses = vargrad_reference(t, flow.clip)
    else:
        assert balance is not None
        if flow.kind == "tb":
            losses = tb_reference(t, balance, flow.clip)
        elif flow.kind == "db":
            losses = huber(db_residual(t, balance), flow.clip)
        else:
            losses = subtb_reference(t, balance, flow.lam)
    loss = t.reduced(losses, flow.reduction)
    if flow.nll_weight > 0.0:
        over_prompts = "prompt" if flow.reduction == "mean" else flow.reduction
        loss = loss + flow.nll_weight * t.reduced(positive_nll(t), over_prompts)
    return loss


def gradient_reference(
    grad: Tensor,
    log_pf: Tensor,
    log_reward: Tensor,
    balance: Tensor | None,
    mask: Tensor | None,
    flow: FlowOptions,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`loss_reference` to log_pf, log_reward and balance, given its own.

    In closed form: an op's implementation runs below autograd.
    """
    t = prepare(log_pf, log_reward, mask, beta=flow.beta, floor=flow.floor, dtype=log_pf.dtype)
    divisor = t.divisor(flow.reduction) if flow.reduction in ("prompt", "mean") else 1
    scale = (2 * grad / divisor).expand_as(t.valid)  # of a residual, [B, N]
    to_balance: Tensor | None
    if flow.kind == "db":
        assert balance is not None
        to_pf = scale[..., None] * _clipped(db_residual(t, balance), flow.clip)
        to_balance = t.zeroed(to_pf - _shift_right(to_pf))
        to_reward = -to_pf.masked_fill(~_last(t.mask), 0.0).sum(-1)
    elif flow.kind == "subtb":
        assert balance is not None
        weight, residual = _subtb_pairs(t, balance, flow.lam)
        pairs = scale[..., None, None] * weight * residual
        to_potential = pairs.sum(-1) - pairs.sum(-2)  # of states 0..L
        to_pf = t.zeroed(to_potential[..., :-1].cumsum(-1))
        to_balance = t.zeroed(to_potential[..., :-1])
        length = t.mask.sum(-1, keepdim=True)
        to_reward = to_potential.gather(-1, length).squeeze(-1)
    else:
        if flow.kind == "tb":
            assert balance is not None
            slope = scale * _clipped(tb_residual(t, balance), flow.clip)
            to_balance = slope.sum(-1)
        else:
            slope = scale * _clipped(vargrad_residual(t), flow.clip)
            # The estimate is a mean over trajectories, so it passes a gradient to each of them.
            slope = slope - valid_mean(slope, t.valid)[:, None]
            to_balance = None
        to_pf = t.zeroed(slope[..., None].expand_as(t.mask))
        to_reward = -slope
    to_reward = t.zeroed_rows(flow.beta * to_reward)
    if flow.floor is not None:
        to_reward = to_reward.masked_fill(t.log_reward <= flow.floor, 0.0)
    if flow.nll_weight > 0.0:
        over = t.divisor("prompt") if flow.reduction in ("prompt", "mean") else 1
        first = (flow.nll_weight * grad / over).expand_as(t.valid)[:, :1, None]
        nll = torch.cat([first * t.mask[:, :1], torch.zeros_like(to_pf[:, 1:])], 1)
        to_pf = to_pf - nll
    return to_pf, to_reward, to_balance
