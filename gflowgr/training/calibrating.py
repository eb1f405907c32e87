"""Flow calibration during evaluation: P(item | prompt) against R(item), over all items."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..collaborative import CollaborativeModel
from ..data import LeaveOneOut, pad_histories
from ..decoding import flow_calibration, item_logprobs
from ..models.gflow_model import GFlowModel
from ..models.prompts import prompt_tokens
from ..rewards import BehaviourAwareReward, SignalContext
from .config import GFlowGRConfig
from .sharing import gathered, process

__all__ = ["catalogue_calibration"]

_BATCH = 16


@torch.no_grad()
def catalogue_calibration(
    model: GFlowModel,
    reward: BehaviourAwareReward,
    split: LeaveOneOut,
    collaborative: CollaborativeModel | None,
    args: GFlowGRConfig,
) -> dict[str, float]:
    """How close the generator is to its target on ``args.eval_calibration_users`` validation users.

    The probabilities are exact, of every item; the reward is that of training, with the validation
    item as the positive. Several processes divide the users. Rewards of items whose probability is
    shared count as :func:`gflowgr.decoding.flow_calibration` says.

    Returns:
        Means over users of ``calibration_pearson`` and ``calibration_spearman`` (log P with log R),
        ``calibration_tv`` (total variation) and ``calibration_invalid`` (probability of token
        sequences that are no item).
    """
    rows = np.arange(len(split.eval_users("valid")))
    count = args.eval_calibration_users
    if count < len(rows):
        rows = np.sort(np.random.default_rng(args.seed).choice(rows, count, replace=False))
    rank, processes = process()
    rows = rows[rank::processes]
    histories, targets = split.histories("valid"), split.targets("valid")
    behaviours = _behaviours(split)
    leaf_of = model.tree.leaf_of(torch.arange(model.tree.num_items, device=model.device))
    item_tokens = model.item_tokens()
    parts: list[Tensor] = []
    for at in range(0, len(rows), _BATCH):
        chosen = rows[at : at + _BATCH]
        past = [histories[row] for row in chosen.tolist()]
        padded = pad_histories(past, max_length=model.settings.max_history).to(model.device)
        log_probs = item_logprobs(
            model.backbone,
            *prompt_tokens(padded, item_tokens, model.prompt),
            model.tree,
            normalize=model.settings.normalize,
        )
        scores = None if collaborative is None else collaborative.score(padded, None)
        log_reward = _catalogue_log_reward(
            reward,
            item_tokens,
            torch.from_numpy(targets[chosen]).to(model.device),
            torch.from_numpy(behaviours[chosen]).to(model.device),
            None if scores is None else scores.to(model.device),
            log_probs,
        )
        shaped = model.settings.beta * log_reward
        if model.settings.log_reward_floor is not None:
            shaped = shaped.clamp_min(model.settings.log_reward_floor)
        measured = flow_calibration(log_probs, shaped, leaf_of=leaf_of)
        names = ("pearson", "spearman", "total_variation", "invalid_mass")
        parts.append(torch.stack([getattr(measured, name) for name in names]))
    everyone = [part.cpu() for of_process in gathered(parts) for part in of_process]
    means = torch.cat(everyone, dim=1).nanmean(dim=1).tolist()
    return dict(
        zip(
            (f"calibration_{name}" for name in ("pearson", "spearman", "tv", "invalid")),
            means,
            strict=True,
        )
    )


def _catalogue_log_reward(
    reward: BehaviourAwareReward,
    item_tokens: Tensor,
    targets: Tensor,
    behaviours: Tensor,
    scores: Tensor | None,
    log_probs: Tensor,
) -> Tensor:
    """log R of every item [B, items], given each prompt's positive [B] and its behaviour."""
    batch, num_items = len(targets), len(item_tokens)
    # Rewards are relative to trajectory 0: the positive stands there, before the catalogue.
    everything = torch.arange(num_items, device=targets.device).expand(batch, -1)
    items = torch.cat([targets[:, None], everything], dim=1)
    tokens = item_tokens[items]
    mask = tokens >= 0
    codes = torch.full_like(items, -2)
    codes[:, 0] = behaviours
    of_identifier = torch.cat([log_probs.gather(1, targets[:, None]), log_probs], dim=1)
    context = SignalContext(
        tokens.masked_fill(~mask, 0), mask, items, codes, scores, lambda: of_identifier
    )
    log_reward = reward(context).log_reward
    return log_reward[:, 1:].scatter(1, targets[:, None], log_reward[:, :1])


def _behaviours(split: LeaveOneOut) -> np.ndarray:
    """Behaviour code of each validation item [n], -1 where none is recorded."""
    users = split.eval_users("valid")
    if split.dataset.behaviours is None:
        return np.full(len(users), -1)
    at = split.dataset.sequences.offsets[users + 1] - 2
    return split.dataset.behaviours[at].astype(np.int64)
