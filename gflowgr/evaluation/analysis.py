"""Analysis of an evaluation: diversity, metrics per group of users, calibration.

The figures are of item ids, whatever the evaluation's collision rule; ``analysis.json`` holds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gflowgr.data import Split
from gflowgr.evaluation import metrics as m
from gflowgr.evaluation.calibration import Calibration
from gflowgr.evaluation.evaluate import Evaluation

__all__ = [
    "BY_HISTORY",
    "BY_INTERACTIONS",
    "BY_POPULARITY",
    "Analysis",
    "Diversity",
    "UserGroup",
    "analyse",
    "cold_start_groups",
]

BY_POPULARITY = (
    "Popularity of the target (interactions in training; new: none; of the other items, "
    "head: the 20 % most popular, mid: the next 30 %, tail: the rest; equal counts stay together)"
)
BY_INTERACTIONS = "Cold start: interactions of the target in training"
BY_HISTORY = "Length of the user's history (all events before the target)"

_POPULARITY_GROUPS = ("new", "tail", "mid", "head")
_HEAD, _HEAD_AND_MID = 0.2, 0.5
_PLACES = 10  # of each list that diversity is measured of, however long the lists are
_INTERACTION_GROUPS = ("none", "1 to 4", "5 to 19", "20 or more")
_INTERACTION_EDGES = (1, 5, 20)
_HISTORY_GROUPS = ("up to 4", "5 to 9", "10 to 19", "20 or more")
_HISTORY_EDGES = (5, 10, 20)


@dataclass(frozen=True)
class Diversity:
    """How varied the first 10 places of the recommended lists are; 0 where all are empty.

    Attributes:
        coverage: share of all items that occur in any list.
        item_entropy: of the distribution of recommended items, nats.
        gini: Gini coefficient of how often each item of the catalogue is recommended; 0: all
            equally often, towards 1: always the same few.
        code_entropy: of the distribution of the recommended items' tokens at each position of their
            identifiers, nats; None without identifiers.
        intra_list_distance: mean over lists of the mean over a list's pairs of items of the share
            of identifier positions at which they differ, in [0, 1]; of the longer identifier's
            positions if they are of unequal length; lists of fewer than two items are left out.
            None without identifiers.
        mean_popularity: mean over recommended places of the item's interactions in training.
    """

    coverage: float
    item_entropy: float
    gini: float
    code_entropy: list[float] | None
    intra_list_distance: float | None
    mean_popularity: float


@dataclass(frozen=True)
class UserGroup:
    """Metrics of some users.

    Attributes:
        name: which.
        users: how many.
        metrics: "R@k" and "N@k" for every cut-off k of the evaluation.
    """

    name: str
    users: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Analysis:
    """The outcome of :func:`analyse`.

    Attributes:
        diversity: of the recommended lists.
        breakdown: groups of users by title; each user is in exactly one group of a title.
        calibration: of the generator, where it was measured.
    """

    diversity: Diversity
    breakdown: dict[str, list[UserGroup]]
    calibration: Calibration | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def analyse(
    evaluation: Evaluation,
    split: Split,
    item_tokens: np.ndarray | None,
    calibration: Calibration | None = None,
) -> Analysis:
    """Analyse an evaluation.

    Args:
        evaluation: of a recommender on ``split``.
        split: the data; popularity counts its training part only.
        item_tokens: int [items, L], the items' identifiers, as codes or tokens, right-padded with
            -1; None for a recommender without.
        calibration: kept with the rest, see :func:`~gflowgr.evaluation.measure_calibration`.

    Raises:
        ValueError: ``item_tokens`` is not one row per item, or the evaluation is of other data.
    """
    if item_tokens is not None and (
        item_tokens.ndim != 2 or len(item_tokens) != split.num_items or item_tokens.shape[1] == 0
    ):
        raise ValueError(
            f"item_tokens must be [items, L] with {split.num_items} items; got {item_tokens.shape}"
        )
    rows = _rows(evaluation, split)
    if evaluation.items.max(initial=-1) >= split.num_items:
        raise ValueError(
            f"evaluation.items holds {evaluation.items.max()}; {split.dataset.name} has "
            f"{split.num_items} items"
        )
    targets = split.targets(evaluation.which)[rows]
    events = split.past_lengths(evaluation.which)[rows]
    breakdown = {
        BY_POPULARITY: _groups(
            evaluation, _popularity_group(split.item_counts)[targets], _POPULARITY_GROUPS
        ),
        BY_INTERACTIONS: cold_start_groups(evaluation, split),
        BY_HISTORY: _groups(evaluation, np.digitize(events, _HISTORY_EDGES), _HISTORY_GROUPS),
    }
    first = evaluation.items[:, :_PLACES]
    return Analysis(_diversity(first, split, item_tokens), breakdown, calibration)


def cold_start_groups(
    evaluation: Evaluation, split: Split, trained_items: int | None = None
) -> list[UserGroup]:
    """Metrics by the interactions of the target in training: none, few, and more.

    Args:
        evaluation: of a recommender on ``split``.
        split: the data; its training part is counted.
        trained_items: items from this number on came after the training, and count none; None: no
            item did.

    Returns:
        "none", "1 to 4", "5 to 19" and "20 or more", without the empty ones.

    Raises:
        ValueError: the evaluation is of other data, or ``trained_items`` is out of range.
    """
    if trained_items is not None and not 0 <= trained_items <= split.num_items:
        raise ValueError(f"trained_items must be 0 to {split.num_items}; got {trained_items}")
    counts = split.item_counts.copy()
    counts[split.num_items if trained_items is None else trained_items :] = 0
    targets = split.targets(evaluation.which)[_rows(evaluation, split)]
    return _groups(
        evaluation, np.digitize(counts[targets], _INTERACTION_EDGES), _INTERACTION_GROUPS
    )


def _rows(evaluation: Evaluation, split: Split) -> np.ndarray:
    """Places of the evaluated users among those of the split."""
    everyone = split.eval_users(evaluation.which)
    if not np.isin(evaluation.users, everyone).all():
        other = evaluation.users[~np.isin(evaluation.users, everyone)][0]
        raise ValueError(
            f"evaluation.users holds {other}, for whom {split.dataset.name} has no target"
        )
    return np.searchsorted(everyone, evaluation.users)


def _popularity_group(counts: np.ndarray) -> np.ndarray:
    """Place in ``_POPULARITY_GROUPS`` of each item [items], given its interactions."""
    known = np.sort(counts[counts > 0])
    # An item belongs to the head if fewer than 20 % of the items are more popular.
    ahead = len(known) - np.searchsorted(known, counts, side="right")
    group = 1 + (ahead < _HEAD_AND_MID * len(known)).astype(int) + (ahead < _HEAD * len(known))
    return np.where(counts > 0, group, 0)


def _groups(evaluation: Evaluation, group: np.ndarray, names: Sequence[str]) -> list[UserGroup]:
    """Groups of the evaluated users, whose places in ``names`` are ``group`` [n]; no empty one."""
    ks = [int(name[2:]) for name in evaluation.metrics if name.startswith("R@")]
    found = []
    for place, name in enumerate(names):
        ranks = evaluation.ranks[group == place]
        if len(ranks):
            metrics = {f"R@{k}": m.recall(ranks, k) for k in ks}
            metrics |= {f"N@{k}": m.ndcg(ranks, k) for k in ks}
            found.append(UserGroup(name, len(ranks), metrics))
    return found


def _diversity(lists: np.ndarray, split: Split, item_tokens: np.ndarray | None) -> Diversity:
    recommended = lists[lists >= 0]
    code_entropy = distance = None
    if item_tokens is not None:
        code_entropy = [m.entropy(tokens) for tokens in item_tokens[recommended].T]
        distance = intra_list_distance(lists, item_tokens)
    popularity = split.item_counts[recommended]
    return Diversity(
        coverage=m.coverage(lists, split.num_items),
        item_entropy=m.entropy(lists),
        gini=_gini(np.bincount(recommended, minlength=split.num_items)),
        code_entropy=code_entropy,
        intra_list_distance=distance,
        mean_popularity=float(popularity.mean()) if len(popularity) else 0.0,
    )


def intra_list_distance(lists: np.ndarray, item_tokens: np.ndarray) -> float:
    """Mean distance of a list's items by their identifiers, see :class:`Diversity`.

    Args:
        lists: int64 [n, k], -1 = nothing.
        item_tokens: int [items, L], right-padded with -1.
    """
    tokens = np.where((lists >= 0)[..., None], item_tokens[lists], -1)
    lengths = (item_tokens >= 0).sum(1).clip(1)[lists]
    total, pairs = np.zeros(len(lists)), np.zeros(len(lists))
    # All pairs that are `gap` places apart at a time: memory as for the lists themselves.
    for gap in range(1, lists.shape[1]):
        both = (lists[:, gap:] >= 0) & (lists[:, :-gap] >= 0)
        differing = (tokens[:, gap:] != tokens[:, :-gap]).sum(2)
        shares = differing / np.maximum(lengths[:, gap:], lengths[:, :-gap])
        total += np.where(both, shares, 0.0).sum(1)
        pairs += both.sum(1)
    paired = pairs > 0
    return float((total[paired] / pairs[paired]).mean()) if paired.any() else 0.0


def _gini(counts: np.ndarray) -> float:
    """Mean absolute difference of two counts over twice their mean; 0 if all are 0."""
    if not counts.any():
        return 0.0
    places = 2 * np.arange(1, len(counts) + 1) - len(counts) - 1
    return float((places * np.sort(counts)).sum() / (len(counts) * counts.sum()))
