"""The split by global time: what all users did before a moment trains, the rest is tested."""

from __future__ import annotations

from datetime import datetime, timezone

import numpy as np

from gflowgr.data.dataset import Dataset
from gflowgr.data.split import PARTS, LeaveOneOut, Split, events_of, refuse_side
from gflowgr.errors import DataError

__all__ = ["TemporalSplit", "make_split"]

_UNIX_SECONDS = (10**8, 10**10)


class TemporalSplit(Split):
    """Training before one moment, validation until a second one, test after it, for all users.

    No model learns from what any user did after the first moment, as when it is put to use. The
    target of a user in a period is their first event of it that has something before it; the
    history is everything before the target. A user without one only trains, and a user without an
    event before the first moment only is evaluated.

    Args:
        dataset: the data, with times.
        max_history: longest history given to a model; older events are cut.
        held_out_share: share of all events in each of the last two periods, as far as events at
            the same time let it.
        target_behaviour: behaviour of the targets, such as ``"purchase"``; all behaviours are
            learned from, and are history. None: any.

    Raises:
        ValueError: an argument is out of range, or a behaviour that the data do not have.
        DataError: the data have no times or too few different ones, or side behaviours, which have
            none.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        max_history: int = 20,
        held_out_share: float = 0.1,
        target_behaviour: str | None = None,
    ) -> None:
        if not 0 < held_out_share < 0.5:
            raise ValueError(f"held_out_share must be in (0, 0.5); got {held_out_share}")
        dataset = dataset.with_stars_as_behaviours()
        if dataset.times is None:
            raise DataError(f"{dataset.name}: a temporal split needs times; the data have none")
        refuse_side(dataset, "a temporal split")
        times, count = dataset.times, dataset.num_interactions
        ordered = np.sort(times)
        places = [int((1 - parts * held_out_share) * count) for parts in (2, 1)]
        self._moments = tuple(int(ordered[place]) for place in places)
        first, second = self._moments
        if not ordered[0] < first < second:
            raise DataError(
                f"{dataset.name}: a temporal split needs events at three different times; the last "
                f"two periods would begin at {first} and {second}, the first event is at "
                f"{ordered[0]}"
            )
        self._target = target_behaviour
        offsets = dataset.sequences.offsets
        owner = dataset.sequences.row_of_values()
        has_past = np.arange(count) > offsets[owner]
        wanted = events_of(dataset, target_behaviour) & has_past
        trained = np.bincount(owner[times < first], minlength=dataset.num_users)
        held_out = {}
        inside = {"valid": (times >= first) & (times < second), "test": times >= second}
        for part in PARTS:
            at = np.flatnonzero(wanted & inside[part])
            users, places_of = np.unique(owner[at], return_index=True)  # the first of each user
            held_out[part] = np.full(dataset.num_users, -1, np.int64)
            held_out[part][users] = at[places_of]
        super().__init__(
            dataset,
            offsets[:-1] + trained,
            held_out,
            max_history=max_history,
            only_train="no target in the last two periods",
        )
        self._report["training events before"] = _moment(first)
        self._report["test events from"] = _moment(second)

    def target_rule(self, which: str) -> str:
        """How the targets of ``which`` were chosen, for a report."""
        first, second = map(_moment, self._moments)
        period = f"from {second}" if which == "test" else f"from {first} to {second}"
        of = "" if self._target is None else f" of behaviour {self._target!r}"
        return (
            f"temporal; all events before {first} train, the target is each user's first "
            f"item{of} {period}"
        )


def _moment(time: int) -> str:
    """A time as the data have it, and as a date where it looks like Unix seconds."""
    if not _UNIX_SECONDS[0] <= time < _UNIX_SECONDS[1]:
        return str(time)
    return f"{datetime.fromtimestamp(time, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"


def make_split(
    dataset: Dataset,
    kind: str = "leave_one_out",
    *,
    max_history: int = 20,
    held_out_share: float = 0.1,
    target_behaviour: str | None = None,
) -> Split:
    """The split of a name: ``"leave_one_out"`` or ``"temporal"``.

    Args:
        dataset: the data.
        kind: which split.
        max_history, target_behaviour: of both.
        held_out_share: of :class:`TemporalSplit`.

    Raises:
        ValueError: another name, or see the two classes.
    """
    if kind == "leave_one_out":
        return LeaveOneOut(dataset, max_history=max_history, target_behaviour=target_behaviour)
    if kind != "temporal":
        raise ValueError(f"split must be 'leave_one_out' or 'temporal'; got {kind!r}")
    return TemporalSplit(
        dataset,
        max_history=max_history,
        held_out_share=held_out_share,
        target_behaviour=target_behaviour,
    )
