"""Leave-one-out evaluation by full ranking, with the rules written beside the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gflowgr.data import Split
from gflowgr.evaluation import metrics as m
from gflowgr.evaluation.recommender import Recommender
from gflowgr.integers import integer_array
from gflowgr.progress import progress_bar


@dataclass(frozen=True)
class Evaluation:
    """The outcome of :func:`evaluate`.

    Attributes:
        name: the recommender's name.
        which: "valid" or "test".
        metrics: "R@k" and "N@k" for each k, "V@k" when the targets' values were given, "coverage",
            "entropy" (nats), "num_users", and "utility@K" and "unbiased R@K" when the true
            utilities were given (K = the largest k).
        rules: what the numbers mean, as text; print them wherever a number is printed.
        users: int64 [n], the evaluated users.
        ranks: int64 [n], 0-based rank of the target in the list, -1 = not among the largest k.
        items: int64 [n, K], the lists that were scored, -1 = nothing.
        values: float64 [n], of the targets, where they were given.
    """

    name: str
    which: str
    metrics: dict[str, float]
    rules: dict[str, str]
    users: np.ndarray = field(repr=False)
    ranks: np.ndarray = field(repr=False)
    items: np.ndarray = field(repr=False)
    values: np.ndarray | None = field(default=None, repr=False)


def evaluate(
    recommender: Recommender,
    split: Split,
    which: str,
    *,
    ks: Sequence[int] = (5, 10),
    collision: str = "item",
    leaf_of: np.ndarray | None = None,
    mask_seen: bool = False,
    batch_size: int = 256,
    max_users: int | None = None,
    seed: int = 42,
    progress: bool = True,
    truth: np.ndarray | None = None,
    target_values: np.ndarray | None = None,
) -> Evaluation:
    """Rank the full catalogue for the users of ``split`` and score their held-out items.

    Args:
        recommender: what is evaluated.
        split: the data.
        which: "valid" or "test".
        ks: cut-offs of Recall and NDCG; the largest one is the length of the lists.
        collision: "item" compares item ids (items that share an identifier hold consecutive
            places, in ascending order of their ids); "string" compares identifiers, as LETTER
            does: a repeated identifier is dropped before ranks are taken.
        leaf_of: int64 [num_items], the identifier of each item; needed for "string".
        mask_seen: exclude the items of all the user's events before the target from the lists.
        batch_size: users per call of the recommender.
        max_users: evaluate a random subset of this size, the same for the same seed.
        seed: of that subset; left alone, all evaluations are of the same users.
        progress: show a progress bar.
        truth: [num_users, num_items], true utilities where they are known.
        target_values: what each target is worth [n], >= 0, in the order of ``split.eval_users``,
            such as stars: then the NDCG weighted by it is measured as well, "V@k".

    Raises:
        ValueError: an argument out of range, or a recommender that repeats or invents items.
    """
    ks = sorted(set(ks))
    _check_arguments(split, ks, collision, leaf_of, batch_size, max_users, truth)
    targets, histories = split.targets(which), split.histories(which)
    users = split.eval_users(which)
    if target_values is not None and target_values.shape != users.shape:
        raise ValueError(
            f"target_values must have shape ({len(users)},), one entry per user with a target; got "
            f"{target_values.shape}"
        )
    chosen = np.arange(len(users))
    if max_users is not None and max_users < len(users):
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, max_users, replace=False))
    length, lists = ks[-1], []
    for rows in _batches(chosen, batch_size, progress, f"{recommender.name}, {which}"):
        past = [histories[row] for row in rows.tolist()]
        exclude = _seen(split, which, rows) if mask_seen else None
        if collision == "string":
            assert leaf_of is not None
            lists.append(_distinct_identifiers(recommender, past, length, exclude, leaf_of))
        else:
            found = recommender.recommend(past, length, exclude)[0]
            lists.append(_checked(found, recommender.name, len(rows), length, split.num_items))
    items = np.concatenate(lists) if lists else np.empty((0, length), np.int64)
    users, targets = users[chosen], targets[chosen]
    if collision == "string":
        assert leaf_of is not None
        compared, wanted = np.where(items >= 0, leaf_of[items], -1), leaf_of[targets]
        catalogue = len(np.unique(leaf_of))
    else:
        compared, wanted, catalogue = items, targets, split.num_items
    ranks = m.ranks_in_lists(compared, wanted)
    values: dict[str, float] = {}
    for k in ks:
        values[f"R@{k}"] = m.recall(ranks, k)
    for k in ks:
        values[f"N@{k}"] = m.ndcg(ranks, k)
    worth = None if target_values is None else np.asarray(target_values, np.float64)[chosen]
    if worth is not None:
        for k in ks:
            values[f"V@{k}"] = float(m.value_weighted_gains(ranks, worth, k).mean())
    values["coverage"] = m.coverage(compared, catalogue)
    values["entropy"] = m.entropy(compared)
    if truth is not None:
        values[f"utility@{length}"] = _utility(items, users, truth)
        values[f"unbiased R@{length}"] = _unbiased_recall(items, users, truth)
    values["num_users"] = float(len(users))
    rules = _rules(split, which, collision, mask_seen, len(users), length, truth is not None)
    if worth is not None:
        rules["V@k"] = (
            "NDCG in which each user counts by what their target is worth (the value of its "
            f"behaviour, {worth.min():g} to {worth.max():g}, mean {worth.mean():.3g})"
        )
    return Evaluation(recommender.name, which, values, rules, users, ranks, items, worth)


def _check_arguments(
    split: Split,
    ks: Sequence[int],
    collision: str,
    leaf_of: np.ndarray | None,
    batch_size: int,
    max_users: int | None,
    truth: np.ndarray | None,
) -> None:
    if not ks or ks[0] < 1:
        raise ValueError(f"ks must hold positive integers; got {ks!r}")
    for name, value in (("batch_size", batch_size), ("max_users", max_users)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if collision not in ("item", "string"):
        raise ValueError(f"collision must be 'item' or 'string'; got {collision!r}")
    if collision == "string" and leaf_of is None:
        raise ValueError("collision='string' needs leaf_of, the identifier of each item")
    if leaf_of is not None and leaf_of.shape != (split.num_items,):
        raise ValueError(
            f"leaf_of must have shape ({split.num_items},), one entry per item; got {leaf_of.shape}"
        )
    expected = (split.num_users, split.num_items)
    if truth is not None and truth.shape != expected:
        raise ValueError(f"truth must have shape {expected}; got {truth.shape}")


def _batches(
    chosen: np.ndarray, batch_size: int, progress: bool, title: str
) -> Sequence[np.ndarray]:
    batches = [chosen[at : at + batch_size] for at in range(0, len(chosen), batch_size)]
    bar: Sequence[np.ndarray] = progress_bar(
        batches, desc=title, unit="batch", disable=not progress, leave=False
    )
    return bar


def _seen(split: Split, which: str, rows: np.ndarray) -> list[np.ndarray]:
    """All items before the target, of which a history may be only the last ones."""
    end = split.target_events(which)[rows]
    past = split.dataset.sequences.slices(end - split.past_lengths(which)[rows], end)
    return [np.unique(items).astype(np.int64) for items in past]


def _checked(items: np.ndarray, name: str, rows: int, length: int, num_items: int) -> np.ndarray:
    if items.shape != (rows, length):
        raise ValueError(f"the items of {name} must have shape {(rows, length)}; got {items.shape}")
    items = integer_array(items, f"{name}: recommended items")
    if items.size and (items.min() < -1 or items.max() >= num_items):
        raise ValueError(
            f"{name} recommended item {items.max()} (lowest {items.min()}), which is not in the "
            f"catalogue of {num_items} items"
        )
    ordered = np.sort(items, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if repeated.any():
        row, column = np.argwhere(repeated)[0]
        raise ValueError(f"{name} recommended item {ordered[row, column]} twice in one list")
    return items


def _distinct_identifiers(
    recommender: Recommender,
    histories: Sequence[np.ndarray],
    length: int,
    exclude: Sequence[np.ndarray] | None,
    leaf_of: np.ndarray,
) -> np.ndarray:
    """Lists [B, length] that hold one item per identifier: the identifier's first in the list."""
    num_items = len(leaf_of)
    result = np.full((len(histories), length), -1, np.int64)
    open_rows, asked = np.arange(len(histories)), min(length, num_items)
    # Dropping repeats makes a list too short: the recommender runs again for those users only,
    # for longer lists, until they are full or there is nothing more.
    while len(open_rows):
        rows = open_rows.tolist()
        barred = None if exclude is None else [exclude[row] for row in rows]
        found = recommender.recommend([histories[row] for row in rows], asked, barred)[0]
        found = _checked(found, recommender.name, len(open_rows), asked, num_items)
        kept = m.drop_repeats(np.where(found >= 0, leaf_of[found], -1))
        for place in range(min(length, asked)):
            at = (np.where(found >= 0, leaf_of[found], -1) == kept[:, place : place + 1]).argmax(1)
            item = found[np.arange(len(found)), at]
            result[open_rows, place] = np.where(kept[:, place] >= 0, item, -1)
        full = (kept >= 0).sum(1) >= length
        exhausted = (found < 0).any(1) | (asked >= num_items)
        open_rows = open_rows[~(full | exhausted)]
        asked = min(2 * asked, num_items)
    return result


def _utility(items: np.ndarray, users: np.ndarray, truth: np.ndarray) -> float:
    """Mean true utility of a place in the list; an empty place counts as the user's worst item."""
    total = 0.0
    for row, user in enumerate(users):
        own = np.asarray(truth[user], np.float64)
        total += np.where(items[row] >= 0, own[items[row]], own.min()).mean()
    return total / max(1, len(users))


def _unbiased_recall(items: np.ndarray, users: np.ndarray, truth: np.ndarray) -> float:
    """Mean share of a user's true utility that their list holds; 0 for a user without any."""
    total = 0.0
    for row, user in enumerate(users):
        own = np.asarray(truth[user], np.float64)
        total += own[items[row][items[row] >= 0]].sum() / max(own.sum(), np.finfo(float).tiny)
    return total / max(1, len(users))


def _rules(
    split: Split,
    which: str,
    collision: str,
    mask_seen: bool,
    num_users: int,
    length: int,
    has_truth: bool,
) -> dict[str, str]:
    total = len(split.eval_users(which))
    unit = "identifiers" if collision == "string" else "items"
    rules = {
        "Split": f"{split.target_rule(which)}; histories hold at most {split.max_history} items",
        "Users": f"{num_users:,}" + (f" of {total:,}" if num_users < total else ", all of them"),
        "Candidates": f"the full catalogue of {split.num_items:,} items, no sampled negatives",
        "Collisions": {
            "item": "item: by item id; items that share an identifier hold consecutive places, "
            "in ascending order of their ids",
            "string": "string: by identifier equality; items that share an identifier count as "
            "one, repeats are dropped before ranks are taken",
        }[collision],
        "Seen items": "masked: the user's past items are not recommended"
        if mask_seen
        else "not masked: the user's past items may be recommended",
        "Diversity": f"coverage: share of all {unit} that occur in any top {length}; "
        f"entropy: of the distribution of {unit} recommended in the top {length}, in nats",
    }
    if has_truth:
        rules["Utility"] = (
            f"mean true utility of the top {length}; an empty place counts as the user's worst item"
        )
        rules["Unbiased recall"] = (
            f"share of the user's true utility that is in the top {length}: the expected recall of "
            "an item engaged with when all are shown alike, each event counted by its reward"
        )
    return rules
