"""Splits into training, validation and test, and the checks that no user's future is trained on."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from gflowgr.data.dataset import Dataset
from gflowgr.data.examples import TrainingExamples
from gflowgr.data.ragged import Ragged
from gflowgr.errors import DataError

PARTS = ("valid", "test")


class Split:
    """Training parts of all users, and at most one validation and one test event of each.

    The base of :class:`LeaveOneOut` and :class:`~gflowgr.data.TemporalSplit`, which choose the
    events. Repeats: when a user's held-out item also occurs earlier in that user's own sequence,
    the earlier event is a real past event and stays; such users are counted in ``report()``, they
    are no leak.

    Ratings: a data set with ratings and no behaviours gets its stars as behaviours
    (``Dataset.with_stars_as_behaviours``), so that they decide the reward r_a; ``split.dataset`` is
    then the converted one. Ratings that are no stars are left out and counted in ``report()``.

    Args:
        dataset: the data, with stars as behaviours.
        train_end: int64 [U], where each user's training part ends among all events.
        held_out: by part ("valid", "test") int64 [U], the event that is the target, -1 = none.
        max_history: longest history given to a model; older events are cut.
        only_train: why a user has no target, for ``report()``.

    Raises:
        ValueError: ``max_history`` below 1.
        DataError: a check of ``report()`` failed (it runs once here).
    """

    def __init__(
        self,
        dataset: Dataset,
        train_end: np.ndarray,
        held_out: dict[str, np.ndarray],
        *,
        max_history: int,
        only_train: str,
    ) -> None:
        if max_history < 1:
            raise ValueError(f"max_history must be at least 1; got {max_history}")
        self.dataset = dataset
        self.max_history = max_history
        offsets = dataset.sequences.offsets
        self._train_end = train_end
        self._users = {part: np.flatnonzero(held_out[part] >= 0) for part in PARTS}
        self._events = {part: held_out[part][self._users[part]] for part in PARTS}
        self.train_sequences = dataset.sequences.slices(offsets[:-1], train_end)
        behaviours = None
        if dataset.behaviours is not None:
            every = Ragged(offsets, dataset.behaviours)
            behaviours = every.slices(offsets[:-1], train_end).values
        self.train = TrainingExamples.build(self.train_sequences, max_history, behaviours)
        self._report = self._run_checks(only_train)

    def target_rule(self, which: str) -> str:
        """How the targets of ``which`` were chosen, for a report."""
        raise NotImplementedError

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
        return self._users[which]

    def targets(self, which: str) -> np.ndarray:
        """int64 [n]: the held-out items, in the order of ``eval_users``."""
        return self.dataset.sequences.values[self.target_events(which)].astype(np.int64)

    def target_events(self, which: str) -> np.ndarray:
        """int64 [n]: where the held-out events are among all events, in that order."""
        _check_part(which)
        return self._events[which]

    def past_lengths(self, which: str) -> np.ndarray:
        """int64 [n]: how many events each user has before the target; histories may be shorter."""
        return self.target_events(which) - self.dataset.sequences.offsets[self._users[which]]

    def histories(self, which: str) -> list[np.ndarray]:
        """n arrays int64, oldest first, the last ``max_history`` items before the target.

        All events before the target are history: those of the training part, and for "test" also
        those since.
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
    def held_out(self) -> Ragged:
        """Ragged int32 [U rows]: per user the items of all events after the training part."""
        return self.dataset.sequences.slices(self._train_end, self.dataset.sequences.offsets[1:])

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
        end = self.target_events(which)
        first = self.dataset.sequences.offsets[self._users[which]]
        return np.maximum(first, end - self.max_history), end

    def _run_checks(self, only_train: str) -> dict[str, object]:
        data = self.dataset
        offsets = data.sequences.offsets
        self.check_examples(self.train)

        # Independent count of the examples: a user's training part of n events has n - 1 of them.
        expected = int(np.maximum(self.train_sequences.lengths - 1, 0).sum())
        if len(self.train) != expected:
            raise DataError(
                f"{data.name}: there must be {expected} training examples; got {len(self.train)}"
            )
        for which in PARTS:
            users, at = self._users[which], self._events[which]
            leak = np.flatnonzero((at < self._train_end[users]) | (at >= offsets[users + 1]))
            if len(leak):
                raise DataError(
                    f"{data.name}: the {which} target of user {users[leak[0]]} is not after their "
                    "training part"
                )
            begin, end = self._history_bounds(which)
            leak = np.flatnonzero((end > at) | (begin < offsets[users]) | (end <= begin))
            if len(leak):
                raise DataError(
                    f"{data.name}: the {which} history of user {users[leak[0]]} holds its target"
                )
        held = self.held_out.row_of_values() * data.num_items + self.held_out.values
        for name, rows in data.side.items():
            pairs = rows.row_of_values() * data.num_items + rows.values
            leaks = np.flatnonzero(np.isin(pairs, held))
            if len(leaks):
                user, item = divmod(int(pairs[leaks[0]]), data.num_items)
                raise DataError(
                    f"{data.name}: side {name} of user {user} holds their held-out item {item}"
                )
        if int(self.item_counts.sum()) != data.num_interactions - len(self.held_out.values):
            raise DataError(f"{data.name}: item counts include events outside the training part")

        pairs = data.sequences.row_of_values() * data.num_items + data.sequences.values
        _, first, place = np.unique(pairs, return_index=True, return_inverse=True)
        first_time = first[place]  # of each event, the user's first one with the same item
        valid, test = self._events["valid"], self._events["test"]
        in_train = self.item_counts > 0
        targets = np.union1d(self.targets("valid"), self.targets("test"))
        return {
            "training events": len(self.train_sequences.values),
            "training examples": len(self.train),
            "users evaluated": len(self._users["test"]),
            "users validated": len(self._users["valid"]),
            f"users that only train ({only_train})": self.num_users
            - len(np.union1d(self._users["valid"], self._users["test"])),
            "users whose valid item is also in their training part (repeat)": int(
                (first_time[valid] < self._train_end[self._users["valid"]]).sum()
            ),
            "users whose test item is also in their history (repeat)": int(
                (first_time[test] < test).sum()
            ),
            "items seen only as a target": int((~in_train[targets]).sum()),
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


class LeaveOneOut(Split):
    """Last item test, second-last validation, the rest training (method: leave-one-out).

    A user with fewer than 3 events only trains.

    With ``target_behaviour`` (such as ``"purchase"``) the targets are each user's last and
    second-last event of it, and all behaviours are learned from: the training part is what comes
    before the validation event, a history is everything before its target, and what comes after
    the test event is left out. A user without two such events, the earlier of which has something
    before it, only trains, on the whole sequence.

    Args:
        dataset: the data.
        max_history: longest history given to a model; older events are cut.
        target_behaviour: behaviour of the targets; None: any.

    Raises:
        ValueError: ``max_history`` below 1, or a behaviour that the data do not have.
        DataError: ``target_behaviour`` with side behaviours, which have no place in time; or see
            :class:`Split`.
    """

    def __init__(
        self, dataset: Dataset, *, max_history: int = 20, target_behaviour: str | None = None
    ) -> None:
        dataset = dataset.with_stars_as_behaviours()
        self._target = target_behaviour
        wanted = events_of(dataset, target_behaviour)
        if target_behaviour is not None:
            refuse_side(dataset, "target_behaviour")
        offsets = dataset.sequences.offsets
        at = np.flatnonzero(wanted)
        before = np.searchsorted(at, offsets)  # events of that behaviour before each user
        counts = np.diff(before)
        enough = np.flatnonzero(counts >= 2)
        enough = enough[at[before[enough + 1] - 2] > offsets[enough]]
        held_out = {part: np.full(dataset.num_users, -1, np.int64) for part in PARTS}
        held_out["valid"][enough] = at[before[enough + 1] - 2]
        held_out["test"][enough] = at[before[enough + 1] - 1]
        train_end = offsets[1:].copy()
        train_end[enough] = held_out["valid"][enough]
        why = "fewer than 3 events"
        if target_behaviour is not None:
            why = f"fewer than 2 of {target_behaviour!r} with something before them"
        super().__init__(dataset, train_end, held_out, max_history=max_history, only_train=why)

    def target_rule(self, which: str) -> str:
        """How the targets of ``which`` were chosen, for a report."""
        _check_part(which)
        place = "last" if which == "test" else "second-last"
        if self._target is None:
            return f"leave-one-out; the target is each user's {place} item"
        return (
            f"leave-one-out; the target is each user's {place} item of behaviour "
            f"{self._target!r}, all behaviours are learned from"
        )


def events_of(dataset: Dataset, behaviour: str | None) -> np.ndarray:
    """bool [M]: which events have this behaviour; None: all.

    Raises:
        ValueError: the data have no such behaviour.
    """
    if behaviour is None:
        return np.ones(dataset.num_interactions, dtype=bool)
    if dataset.behaviours is None or behaviour not in dataset.behaviour_names:
        names = ", ".join(map(repr, dataset.behaviour_names)) or "none"
        raise ValueError(
            f"target_behaviour must be a behaviour of {dataset.name}, which has {names}; got "
            f"{behaviour!r}"
        )
    chosen: np.ndarray = dataset.behaviours == dataset.behaviour_names.index(behaviour)
    return chosen


def refuse_side(dataset: Dataset, setting: str) -> None:
    """Raise DataError for side behaviours, which nobody can tell to lie before a target."""
    if dataset.side:
        raise DataError(
            f"{dataset.name}: side behaviours have no times, so that {setting} cannot tell what of "
            f"them a model may see; got {', '.join(dataset.side)}. Convert the data without "
            "--side-behaviours: then they are events like all others"
        )


def _check_part(which: str) -> None:
    if which not in PARTS:
        raise ValueError(f"which must be 'valid' or 'test'; got {which!r}")
