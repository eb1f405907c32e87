"""Leave-one-out split and the checks that nothing of a user's future reaches training."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from gflowgr.data.dataset import Dataset
from gflowgr.data.examples import TrainingExamples
from gflowgr.data.ragged import Ragged
from gflowgr.errors import DataError

PARTS = ("valid", "test")


class LeaveOneOut:
    """Last item test, second-last validation, the rest training (method: leave-one-out).

    A user with fewer than 3 events only trains. Repeats: when a user's held-out item also occurs
    earlier in that user's own sequence, the earlier event is a real past event and stays; such
    users are counted in ``report()``, they are no leak.

    Ratings: a data set with ratings and no behaviours gets its stars as behaviours
    (``Dataset.with_stars_as_behaviours``), so that they decide the reward r_a; ``split.dataset`` is
    then the converted one. Ratings that are no stars are left out and counted in ``report()``.

    Args:
        dataset: the data.
        max_history: longest history given to a model; older events are cut.

    Raises:
        ValueError: ``max_history`` below 1.
        DataError: a check of ``report()`` failed (it runs once here).
    """

    def __init__(self, dataset: Dataset, *, max_history: int = 20) -> None:
        if max_history < 1:
            raise ValueError(f"max_history must be at least 1; got {max_history}")
        self.dataset = dataset = dataset.with_stars_as_behaviours()
        self.max_history = max_history
        offsets = dataset.sequences.offsets
        lengths = np.diff(offsets)
        self._users = np.flatnonzero(lengths >= 3)
        train_lengths = np.where(lengths >= 3, lengths - 2, lengths)
        begin = offsets[:-1]
        self.train_sequences = dataset.sequences.slices(begin, begin + train_lengths)
        behaviours = None
        if dataset.behaviours is not None:
            behaviours = (
                Ragged(offsets, dataset.behaviours).slices(begin, begin + train_lengths).values
            )
        self.train = TrainingExamples.build(self.train_sequences, max_history, behaviours)
        self._report = self._run_checks()

    @property
    def num_items(self) -> int:
        """Number of items of the data set."""
        return self.dataset.num_items

    @property
    def num_users(self) -> int:
        """Number of users of the data set, those who only train included."""
        return self.dataset.num_users

    def eval_users(self, which: str) -> np.ndarray:
        """int64 [n]: the users that have a target in ``which`` ("valid" or "test")."""
        _check_part(which)
        return self._users

    def targets(self, which: str) -> np.ndarray:
        """int64 [n]: the held-out items, in the order of ``eval_users``."""
        _check_part(which)
        _, valid, test = self.dataset.held_out()
        return valid if which == "valid" else test

    def histories(self, which: str) -> list[np.ndarray]:
        """n arrays int64, oldest first, the last ``max_history`` items before the target.

        "valid": of the training part; "test": of the training part and the validation item.
        """
        begin, end = self._history_bounds(which)
        values = self.dataset.sequences.values.astype(np.int64)
        return [values[b:e] for b, e in zip(begin.tolist(), end.tolist(), strict=True)]

    @cached_property
    def known(self) -> Ragged:
        """Ragged int32 [U rows]: per user, sorted and unique, EVERY item they ever touch: training,
        held out and side behaviours. What a sampler of unobserved items must exclude."""
        num_items = self.num_items
        parts = [self.dataset.sequences, *self.dataset.side.values()]
        pairs = np.unique(np.concatenate([p.row_of_values() * num_items + p.values for p in parts]))
        counts = np.bincount(pairs // num_items, minlength=self.num_users)
        return Ragged.from_lengths(counts, (pairs % num_items).astype(np.int32))

    @cached_property
    def item_counts(self) -> np.ndarray:
        """int64 [num_items]: occurrences in the training part only."""
        return np.bincount(self.train_sequences.values, minlength=self.num_items).astype(np.int64)

    def report(self) -> dict[str, object]:
        """The counts of the checks; all have passed, since construction raises otherwise."""
        return dict(self._report)

    def check_examples(self, examples: TrainingExamples) -> None:
        """Check that a store of examples belongs to this split and reaches no held-out event.

        For stores that were saved earlier, perhaps from other data. Compared by position: the items
        must be this split's training part, and each example must lie within its own user's part.

        Raises:
            DataError: naming the first example (or event) that does not.
        """
        train = self.train_sequences
        if len(examples.items) != len(train.values):
            raise DataError(
                f"training examples: {len(examples.items):,} events, but the training part of "
                f"{self.dataset.name} has {len(train.values):,}: held-out events or other data"
            )
        other = np.flatnonzero(examples.items != train.values)
        if len(other):
            at = int(other[0])
            raise DataError(
                f"training examples: event {at} is item {int(examples.items[at])}, "
                f"the training part of {self.dataset.name} has {int(train.values[at])} there"
            )
        if len(examples) == 0:
            return
        begin, end, user = (column.astype(np.int64) for column in np.asarray(examples.bounds).T)
        inside = (user >= 0) & (user < self.num_users)
        owner = np.where(inside, user, 0)
        bad = np.flatnonzero(
            ~inside
            | (begin < train.offsets[owner])
            | (end >= train.offsets[owner + 1])
            | (end <= begin)
        )
        if len(bad):
            row = int(bad[0])
            raise DataError(
                f"training examples: example {row} spans events {begin[row]}..{end[row]}, "
                f"outside the training part of its user {user[row]}"
            )

    def _history_bounds(self, which: str) -> tuple[np.ndarray, np.ndarray]:
        _check_part(which)
        offsets = self.dataset.sequences.offsets
        end = offsets[self._users + 1] - (2 if which == "valid" else 1)
        return np.maximum(offsets[self._users], end - self.max_history), end

    def _run_checks(self) -> dict[str, object]:
        data, users = self.dataset, self._users
        offsets = data.sequences.offsets
        self.check_examples(self.train)

        # Independent count of the examples: a user's training part of n events has n - 1 of them.
        expected = int(np.maximum(self.train_sequences.lengths - 1, 0).sum())
        if len(self.train) != expected:
            raise DataError(
                f"{data.name}: there must be {expected} training examples; got {len(self.train)}"
            )
        for which in PARTS:
            begin, end = self._history_bounds(which)
            target_at = offsets[users + 1] - (2 if which == "valid" else 1)
            leak = np.flatnonzero((end > target_at) | (begin < offsets[users]) | (end <= begin))
            if len(leak):
                raise DataError(
                    f"{data.name}: the {which} history of user {users[leak[0]]} holds its target"
                )
        _, valid, test = data.held_out()
        held = np.concatenate([users * data.num_items + valid, users * data.num_items + test])
        for name, rows in data.side.items():
            pairs = rows.row_of_values() * data.num_items + rows.values
            leaks = np.flatnonzero(np.isin(pairs, held))
            if len(leaks):
                user, item = divmod(int(pairs[leaks[0]]), data.num_items)
                raise DataError(
                    f"{data.name}: side {name} of user {user} holds their held-out item {item}"
                )
        if int(self.item_counts.sum()) != data.num_interactions - 2 * len(users):
            raise DataError(f"{data.name}: item counts include events outside the training part")

        train_pairs = np.unique(
            self.train_sequences.row_of_values() * data.num_items + self.train_sequences.values
        )
        in_train = self.item_counts > 0
        return {
            "training events": len(self.train_sequences.values),
            "training examples": len(self.train),
            "users evaluated": len(users),
            "users that only train (fewer than 3 events)": self.num_users - len(users),
            "users whose valid item is also in their training part (repeat)": int(
                np.isin(users * data.num_items + valid, train_pairs).sum()
            ),
            "users whose test item is also in their history (repeat)": int(
                (np.isin(users * data.num_items + test, train_pairs) | (test == valid)).sum()
            ),
            "items seen only as a target": int((~in_train[np.union1d(valid, test)]).sum()),
            "side pairs dropped as held out": dict(data.side_dropped),
            "ratings not used as behaviours (more than 127 distinct, or negative)": (
                len(data.ratings) if data.ratings is not None and data.behaviours is None else 0
            ),
            "times checked (oldest first)": data.times is not None,
            "checks passed": [
                "no training example reaches a held-out event",
                "no evaluation history reaches its target",
                "no side behaviour holds a held-out item of its user",
                "item popularity counts the training part only",
            ],
        }


def _check_part(which: str) -> None:
    if which not in PARTS:
        raise ValueError(f"which must be 'valid' or 'test'; got {which!r}")
