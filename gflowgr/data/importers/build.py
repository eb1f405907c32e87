"""Make a data set from raw events: duplicates, k-core, order, numbering.

The same rules for every source, in this order:

1. Exact duplicates (same user, item, time and behaviour) count once: the first line stays.
2. ``duplicates``: of several events of one user with one item, keep "all", only the "first" or only
   the "last" in time.
3. Iterated k-core: drop users and items with fewer than k events, until none is left to drop.
4. Events are sorted by time within a user; ties keep the order of the file.
5. Users are numbered by first appearance in the file, items by first appearance in the sequences,
   user by user. The keys of the source stay as ``user_ids`` and ``item_ids``.
6. Side behaviours keep pairs of remaining users and items, from before the user's validation event.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gflowgr.data.dataset import Dataset
from gflowgr.data.importers.lines import BadLines
from gflowgr.data.ragged import Ragged
from gflowgr.errors import DataError
from gflowgr.item_ids import ItemIds

if TYPE_CHECKING:
    import polars

DUPLICATES = ("all", "first", "last")
Describe = Callable[[list[str]], list[dict[str, str]]]


@dataclass(frozen=True)
class ImportReport:
    """What an importer read, dropped and kept.

    Attributes:
        source: the files.
        lines: lines (rows) read that were not blank.
        bad_lines: how many of them could not be used.
        bad_examples: the first few: place, reason, beginning of the line.
        events: usable events, side behaviours included.
        users, items: distinct ones among them.
        exact_duplicates: events dropped by rule 1.
        repeats: events dropped by rule 2.
        k_core: k; ``rounds``: passes until nothing changed.
        kept_users, kept_items, kept_events: what the data set has (side behaviours not counted).
        notes: other counts, e.g. events outside a time window, items without metadata.
    """

    source: str
    lines: int
    bad_lines: int
    bad_examples: list[str]
    events: int
    users: int
    items: int
    exact_duplicates: int
    repeats: int
    k_core: int
    rounds: int
    kept_users: int
    kept_items: int
    kept_events: int
    notes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        text = [
            f"{self.source}: {self.lines:,} lines, {self.bad_lines:,} bad",
            *(f"  bad: {example}" for example in self.bad_examples),
            f"  {self.events:,} events of {self.users:,} users with {self.items:,} items",
            f"  dropped: {self.exact_duplicates:,} exact duplicates, {self.repeats:,} repeats",
            f"  {self.k_core}-core after {self.rounds} rounds: {self.kept_users:,} users, "
            f"{self.kept_items:,} items, {self.kept_events:,} events",
            *(f"  {name}: {count:,}" for name, count in self.notes.items()),
        ]
        return "\n".join(text)


class Events:
    """Growing columns of raw events; users and items are numbered by first appearance."""

    def __init__(self) -> None:
        self.users: dict[str, int] = {}
        self.items: dict[str, int] = {}
        self.behaviours: dict[str, int] = {}
        self._user, self._item, self._time = array("q"), array("q"), array("q")
        self._behaviour, self._value = array("q"), array("d")

    def add(
        self, user: str, item: str, time: int, *, behaviour: str = "", value: float = 0.0
    ) -> None:
        """Append one event.

        Raises:
            OverflowError: the time does not fit 64 bits; nothing is appended.
        """
        self._time.append(time)
        self._user.append(self.users.setdefault(user, len(self.users)))
        self._item.append(self.items.setdefault(item, len(self.items)))
        self._behaviour.append(self.behaviours.setdefault(behaviour, len(self.behaviours)))
        self._value.append(value)

    def extend(self, frame: polars.DataFrame) -> None:
        """Append a table with the columns user, item, time, behaviour and value, without nulls."""
        codes = {}
        for name, known in (
            ("user", self.users),
            ("item", self.items),
            ("behaviour", self.behaviours),
        ):
            keys = frame.get_column(name).unique(maintain_order=True)
            table = keys.to_frame().with_columns(
                code=np.array([known.setdefault(key, len(known)) for key in keys], dtype=np.int64)
            )
            joined = frame.select(name).join(table, on=name, how="left", maintain_order="left")
            codes[name] = joined.get_column("code").to_numpy()
        self._user.frombytes(codes["user"].tobytes())
        self._item.frombytes(codes["item"].tobytes())
        self._behaviour.frombytes(codes["behaviour"].tobytes())
        self._time.frombytes(frame.get_column("time").to_numpy().astype(np.int64).tobytes())
        self._value.frombytes(frame.get_column("value").to_numpy().astype(np.float64).tobytes())

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(user, item, time, behaviour) int64 [n] and value float64 [n], in file order."""
        return (
            np.array(self._user, dtype=np.int64),
            np.array(self._item, dtype=np.int64),
            np.array(self._time, dtype=np.int64),
            np.array(self._behaviour, dtype=np.int64),
            np.array(self._value, dtype=np.float64),
        )


def k_core(user: np.ndarray, item: np.ndarray, k: int) -> tuple[np.ndarray, int]:
    """Iterated k-core of events (user[i], item[i]), integers from 0.

    Returns:
        keep: bool [n], the largest set of events in which every user and every item has at least k.
        rounds: passes over the data.

    Raises:
        ValueError: k below 1.
    """
    if k < 1:
        raise ValueError(f"k_core must be at least 1 (1 keeps everything); got {k}")
    keep = np.ones(len(user), dtype=bool)
    rounds = 0
    while True:
        rounds += 1
        users = np.bincount(user[keep], minlength=int(user.max(initial=-1)) + 1)
        items = np.bincount(item[keep], minlength=int(item.max(initial=-1)) + 1)
        now = keep & (users[user] >= k) & (items[item] >= k)
        if now.sum() == keep.sum():
            return now, rounds
        keep = now


def check_options(core: int, duplicates: str, max_bad_fraction: float) -> None:
    """Raise ValueError for options no importer can use; called before long files are read."""
    if isinstance(core, bool) or not isinstance(core, int | np.integer):
        raise ValueError(f"k_core must be an integer; got {core!r}")
    if core < 1:
        raise ValueError(f"k_core must be at least 1 (1 keeps everything); got {core}")
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicates must be one of {', '.join(DUPLICATES)}; got {duplicates!r}")
    if isinstance(max_bad_fraction, bool) or not isinstance(
        max_bad_fraction, int | float | np.integer | np.floating
    ):
        raise ValueError(f"max_bad_fraction must be a number; got {max_bad_fraction!r}")
    if not 0.0 <= max_bad_fraction <= 1.0:
        raise ValueError(f"max_bad_fraction must be between 0 and 1; got {max_bad_fraction}")


def check_found(
    paths: Sequence[Path], keys: list[str], found: Mapping[str, object], notes: dict[str, int]
) -> None:
    """Count the items that metadata say nothing about, in ``notes``.

    Raises:
        DataError: they know none of the items: these are other items, or keys of another form.
    """
    notes["items without metadata"] = missing = sum(key not in found for key in keys)
    if missing == len(keys):
        raise DataError(
            f"{', '.join(p.name for p in paths)}: metadata must have rows of the items; got none "
            f"of {len(keys):,}, whose keys are such as {', '.join(repr(key) for key in keys[:3])}"
        )


def build(
    events: Events,
    bad: BadLines,
    *,
    source: str,
    name: str,
    core: int,
    duplicates: str,
    max_bad_fraction: float,
    describe: Describe | None = None,
    side_behaviours: Sequence[str] = (),
    has_behaviours: bool = False,
    has_values: bool = False,
    time_divisor: int = 1,
    notes: dict[str, int] | None = None,
) -> tuple[Dataset, ImportReport]:
    """Apply the rules of this module.

    Args:
        describe: called once with the original keys of the remaining items, which become their ids;
            gives their texts. None: there are no texts.
        side_behaviours: behaviours that become side behaviours instead of events of the sequence.
        time_divisor: stored times are raw times // this (the order is that of the raw times).

    Raises:
        DataError: too many bad lines, an unknown side behaviour, or nothing left after the k-core.
    """
    bad.check(source, max_bad_fraction)
    unknown = [b for b in side_behaviours if b not in events.behaviours]
    if unknown:
        raise DataError(
            f"{source}: side behaviour {unknown[0]!r} does not occur; "
            f"behaviours are {', '.join(sorted(events.behaviours))}"
        )
    user, item, time, behaviour, value = events.columns()
    is_side = np.isin(behaviour, [events.behaviours[b] for b in side_behaviours])

    # Rule 4 first: after it, rules 1 and 2 keep a first or last row of a sorted table.
    rows = np.flatnonzero(~is_side)
    rows = rows[np.lexsort((time[rows], user[rows]))]  # lexsort is stable: ties in file order
    before = len(rows)
    rows = rows[_first_of(user[rows], item[rows], time[rows], behaviour[rows])]
    exact = before - len(rows)
    if duplicates == "first":
        rows = rows[_first_of(user[rows], item[rows])]
    elif duplicates == "last":
        rows = rows[::-1][_first_of(user[rows[::-1]], item[rows[::-1]])][::-1]
    repeats = before - exact - len(rows)

    keep, rounds = k_core(user[rows], item[rows], core)
    rows = rows[keep]
    if len(rows) == 0:
        raise DataError(
            f"{source}: no users and items with at least {core} events each are left of "
            f"{before:,} events; try a smaller k_core"
        )
    old_users, user_row = np.unique(user[rows], return_inverse=True)
    seen_items, first, inverse = np.unique(item[rows], return_index=True, return_inverse=True)
    order = np.argsort(first)
    old_items = seen_items[order]
    new_item = np.empty(len(order), dtype=np.int32)
    new_item[order] = np.arange(len(order), dtype=np.int32)
    sequences = Ragged.from_lengths(np.bincount(user_row), new_item[inverse])

    user_keys, item_keys = list(events.users), list(events.items)
    item_names = [item_keys[i] for i in old_items]
    behaviour_codes: np.ndarray | None = None
    behaviour_names: tuple[str, ...] = ()
    if has_behaviours:
        behaviour_codes, behaviour_names = _name_behaviours(
            behaviour[rows], list(events.behaviours)
        )
    side = {}
    for kind in side_behaviours:
        of_kind = np.flatnonzero(behaviour == events.behaviours[kind])
        side[kind] = _side_rows(
            (user[of_kind], item[of_kind], time[of_kind]),
            old_users,
            old_items,
            sequences,
            time[rows],
        )
    dataset = Dataset(
        name=name,
        user_ids=[user_keys[u] for u in old_users],
        sequences=sequences,
        num_items=len(old_items),
        behaviours=behaviour_codes,
        behaviour_names=behaviour_names,
        ratings=value[rows].astype(np.float32) if has_values else None,
        times=time[rows] // time_divisor,
        side=side,
        texts=describe(item_names) if describe is not None else None,
        item_ids=ItemIds(item_names, f"{source}: items"),
    )
    report = ImportReport(
        source=source,
        lines=bad.lines,
        bad_lines=bad.bad,
        bad_examples=list(bad.examples),
        events=len(user),
        users=len(events.users),
        items=len(events.items),
        exact_duplicates=exact,
        repeats=repeats,
        k_core=core,
        rounds=rounds,
        kept_users=dataset.num_users,
        kept_items=dataset.num_items,
        kept_events=dataset.num_interactions,
        notes={
            **({"lines that are not UTF-8, read as Latin-1": bad.latin} if bad.latin else {}),
            **(notes or {}),
        },
    )
    return dataset, report


def _first_of(*columns: np.ndarray) -> np.ndarray:
    """Sorted positions of the first occurrence of every distinct row."""
    if len(columns[0]) == 0:
        return np.zeros(0, dtype=np.int64)
    # A stable sort by all columns puts equal rows together, earliest first.
    order = np.lexsort(columns)
    new = np.zeros(len(order), dtype=bool)
    new[0] = True
    for column in columns:
        ordered = column[order]
        new[1:] |= ordered[1:] != ordered[:-1]
    return np.sort(order[new])


def _name_behaviours(codes: np.ndarray, names: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Codes renumbered to the alphabetical order of the names that occur."""
    used = sorted(names[code] for code in np.unique(codes))
    rank = {name: position for position, name in enumerate(used)}
    table = np.array([rank.get(name, -1) for name in names])
    return table[codes].astype(np.int8), tuple(used)


def _side_rows(
    raw: tuple[np.ndarray, np.ndarray, np.ndarray],
    old_users: np.ndarray,
    old_items: np.ndarray,
    sequences: Ragged,
    times: np.ndarray,
) -> Ragged:
    user, item, time = raw
    user_of = np.full(int(max(user.max(initial=-1), old_users.max())) + 1, -1)
    user_of[old_users] = np.arange(len(old_users))
    item_of = np.full(int(max(item.max(initial=-1), old_items.max())) + 1, -1)
    item_of[old_items] = np.arange(len(old_items))
    # A user without held-out events has no moment after which a side event would leak.
    cut = np.full(len(old_users), np.iinfo(np.int64).max)
    evaluated = np.flatnonzero(sequences.lengths >= 3)
    cut[evaluated] = times[sequences.offsets[evaluated + 1] - 2]
    user, item = user_of[user], item_of[item]
    keep = (user >= 0) & (item >= 0)
    keep[keep] &= time[keep] < cut[user[keep]]
    pairs = np.unique(user[keep] * len(old_items) + item[keep])
    counts = np.bincount(pairs // len(old_items), minlength=len(old_users))
    return Ragged.from_lengths(counts, (pairs % len(old_items)).astype(np.int32))
