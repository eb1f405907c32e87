"""How close a generator's distribution over the whole catalogue is to the reward's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gflowgr.collaborative.base import CollaborativeModel
from gflowgr.data import Split, pad_histories
from gflowgr.decoding import flow_calibration, item_logprobs
from gflowgr.decoding.calibration import log_group_size
from gflowgr.evaluation.first_level import FirstLevel, first_level
from gflowgr.models.gflow_model import GFlowModel
from gflowgr.models.prompts import prompt_tokens
from gflowgr.progress import progress_bar
from gflowgr.rewards import BehaviourAwareReward, CatalogueReward, SignalContext

__all__ = ["Calibration", "catalogue_flow", "catalogue_log_reward", "measure_calibration"]

_BATCH = 16
_DIGITS = 4
_FIRST_LEVEL_USERS = 4


@dataclass(frozen=True)
class Calibration:
    """The outcome of :func:`measure_calibration`.

    Attributes:
        users: number of users.
        pearson: correlation of log P and log R over the catalogue, mean over users; None if no user
            has one.
        spearman: the same of their ranks.
        log_p: log P of a random sample of (user, item) pairs, in nats, minus the user's mean over
            the catalogue; 4 decimals.
        log_r: log R of the same pairs, likewise.
        first_level: policies over the first token, of the first few of the users.
    """

    users: int
    pearson: float | None
    spearman: float | None
    log_p: list[float]
    log_r: list[float]
    first_level: FirstLevel

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def measure_calibration(
    model: GFlowModel,
    split: Split,
    reward: BehaviourAwareReward | CatalogueReward,
    collaborative: CollaborativeModel | None,
    *,
    which: str = "test",
    users: int = 64,
    points: int = 2000,
    seed: int = 42,
    progress: bool = True,
) -> Calibration:
    """Compare exact log P(item | history) with log R(item) over the whole catalogue.

    Methods compare fairly if all are given the same ``reward`` (whatever they were trained with),
    ``collaborative``, number of users and seed: then users, pairs and log R are the same. Neither
    exponent nor floor of a model's own training enters.

    Args:
        model: any generator, trained by supervision or a flow objective.
        split: data and histories; the held-out item is the reward's positive.
        reward: R, of signals that do not depend on the generator, or of the collaborative scores.
        collaborative: what ``r_yhat``, or the latter, is computed from.
        which: "valid" or "test".
        users: size of the random subset of users; all if there are fewer.
        points: largest sample of (user, item) pairs.
        seed: of both samples.
        progress: show a progress bar.

    Raises:
        ValueError: ``users`` or ``points`` below 1; ``r_yhat`` without a collaborative model, which
            would be 0 throughout, or a reward of its scores; ``r_generation``, which would make the
            reward the model's own.
    """
    for name, number in (("users", users), ("points", points)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1; got {number}")
    names = reward.signals if isinstance(reward, CatalogueReward) else reward.names
    scored = {"r_yhat", "r_cm"}.intersection(names)
    if collaborative is None and scored:
        raise ValueError(f"collaborative is None, but the reward has the signal {min(scored)!r}")
    if "r_generation" in names:
        raise ValueError(
            f"reward has the signals {names}; 'r_generation' is the model's own probability"
        )
    everyone = len(split.eval_users(which))
    if everyone == 0:
        raise ValueError(f"split: no user of {split.dataset.name} has a held-out item")
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(everyone, min(users, everyone), replace=False))
    parts = progress_bar(
        catalogue_flow(model, reward, split, which, rows, collaborative),
        desc="calibration",
        unit="batch",
        total=math.ceil(len(rows) / _BATCH),
        disable=not progress,
        leave=False,
    )
    log_p, log_r = (torch.cat(of_kind).double() for of_kind in zip(*parts, strict=True))
    measured = flow_calibration(log_p, log_r)
    both = (log_p.isfinite() & log_r.isfinite()).numpy()
    pairs = np.flatnonzero(both)
    pairs = np.sort(rng.choice(pairs, min(points, len(pairs)), replace=False))

    def sampled(values: Tensor) -> list[float]:
        kept: list[float] = _centred(values.numpy(), both).ravel()[pairs].round(_DIGITS).tolist()
        return kept

    return Calibration(
        users=len(rows),
        pearson=_mean(measured.pearson),
        spearman=_mean(measured.spearman),
        log_p=sampled(log_p),
        log_r=sampled(log_r),
        first_level=first_level(
            split.eval_users(which)[rows[:_FIRST_LEVEL_USERS]].tolist(),
            log_p[:_FIRST_LEVEL_USERS],
            log_r[:_FIRST_LEVEL_USERS],
            model.item_tokens()[:, 0].cpu(),
        ),
    )


def _mean(values: Tensor) -> float | None:
    mean = float(values.nanmean())
    return None if math.isnan(mean) else mean


def _centred(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """``values`` [B, items] minus the mean of each row's ``kept`` ones; 0 for the others."""
    values = np.where(kept, values, 0.0)
    mean = values.sum(1, keepdims=True) / np.maximum(1, kept.sum(1, keepdims=True))
    return np.where(kept, values - mean, 0.0)


@torch.no_grad()
def catalogue_flow(
    model: GFlowModel,
    reward: BehaviourAwareReward | CatalogueReward,
    split: Split,
    which: str,
    rows: np.ndarray,
    collaborative: CollaborativeModel | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probability and log-reward of every item, batch by batch.

    Args:
        model: the generator.
        reward: R; the held-out item is the positive, with its recorded behaviour.
        split: data and histories.
        which: "valid" or "test".
        rows: int64 [n], places in ``split.eval_users(which)``.
        collaborative: scores the catalogue for the reward.

    Yields:
        log P and log R, float [b, items] on the CPU, rows in their order. The probability of an
        identifier is split evenly among its items; -inf for items without an identifier.
    """
    histories, targets = split.histories(which), split.targets(which)
    behaviours = _behaviours(split, which)
    leaf_of = model.tree.leaf_of(torch.arange(model.tree.num_items, device=model.tree.device))
    sharing = log_group_size(leaf_of).to(model.device)
    item_tokens = model.item_tokens()
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
        scores = None if scores is None else scores.to(model.device)
        observed, codes = (
            torch.from_numpy(each[chosen]).to(model.device) for each in (targets, behaviours)
        )
        if isinstance(reward, CatalogueReward):
            assert scores is not None
            log_reward = reward(scores, padded, observed, reward.target_values(codes))
        else:
            log_reward = catalogue_log_reward(
                reward, item_tokens, observed, codes, scores, log_probs
            )
        yield (log_probs - sharing).cpu(), log_reward.cpu()


def catalogue_log_reward(
    reward: BehaviourAwareReward,
    item_tokens: Tensor,
    targets: Tensor,
    behaviours: Tensor,
    scores: Tensor | None,
    log_probs: Tensor,
) -> Tensor:
    """log R of every item [B, items], given each prompt's positive [B] and its behaviour.

    Args:
        reward: R.
        item_tokens: identifiers [items, L], right-padded with -1.
        targets: the positives [B].
        behaviours: their behaviour codes [B], -1 where none is recorded.
        scores: of a collaborative model [B, items].
        log_probs: the generator's log P of every item's identifier [B, items].
    """
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


def _behaviours(split: Split, which: str) -> np.ndarray:
    """Behaviour code of each held-out item [n], -1 where none is recorded."""
    users = split.eval_users(which)
    if split.dataset.behaviours is None:
        return np.full(len(users), -1)
    return split.dataset.behaviours[split.target_events(which)].astype(np.int64)
