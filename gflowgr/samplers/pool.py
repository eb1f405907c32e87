"""The rules that every set of trajectories keeps, in one place.

- Valid items only; the positive is item 0 and nowhere else; no two items of a set have the same
  identifier.
- An augmented item has no barred item's identifier. Barred is, by ``exclude``, what the user ever
  interacts with, held-out items included (``"known"``: for objectives that push items down, which
  must not be good ones), or the example's own past and positive (``"past"``: nothing of the future
  is read; for rewards that are functions of history and item alone).
- An item from the user's own log is neither the user's validation nor test item, nor has it one's
  identifier.
- The same draws for the same (seed, epoch, example), on one process or on many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data import Ragged
from ..integers import integer_array
from ..transfer import to_device
from .base import (
    AUGMENTED,
    NOT_RECORDED,
    Candidates,
    Ints,
    SampleRequest,
    TrajectorySet,
    difficulty,
)
from .keyed_random import keyed_integers, keyed_uniform

if TYPE_CHECKING:
    from ..data import Split

__all__ = ["CandidatePool", "Draw", "Exclude"]

Exclude = Literal["known", "past"]

Draw = Callable[[SampleRequest, int, int], Ints]
"""(request, round, width) -> items [B, width]; each round gives other ones."""

# Rounds of a sampler's own draws, of uniform ones, and last the whole catalogue.
_OWN, _UNIFORM = 8, 8
_ROUNDS = _OWN + _UNIFORM + 1
_STREAMS = 64
_Floats = npt.NDArray[np.float64]


class CandidatePool:
    """The items that may be sampled for each user, and draws from them.

    Args:
        known: per user, every item they ever interacted with, held-out ones included.
        leaf_of: identifier (leaf) of each item [items]; an item without one (-1) is never sampled.
        seed: seeds all draws.
        future: per user, their validation and test items, which even their own log must not give
            away; None: all of ``known``.
        past: the training events of all users, and of each example [examples] the place where its
            user's begin and the place of its positive: what is barred is then the example's own
            past and positive, instead of ``known``.
    """

    def __init__(
        self,
        known: Ragged,
        leaf_of: npt.NDArray[np.integer],
        seed: int,
        *,
        future: Ragged | None = None,
        past: tuple[Ragged, Ints, Ints] | None = None,
    ) -> None:
        self.num_items = len(leaf_of)
        self.num_users = len(known)
        self.leaf_of = integer_array(leaf_of, "leaf_of")
        self.seed = seed
        self._known = self._keys(known)
        self._future = self._known if future is None else self._keys(future)
        self._past = past
        by_leaf = np.argsort(self.leaf_of, kind="stable").astype(np.int32)
        by_leaf = by_leaf[np.count_nonzero(self.leaf_of < 0) :]
        bounds = np.searchsorted(self.leaf_of[by_leaf], np.arange(self.leaf_of.max() + 2))
        self._items_of_leaf = Ragged(bounds, by_leaf)
        self._barred = self._items_of(self._known, self.num_users)

    @classmethod
    def from_split(
        cls,
        split: Split,
        leaf_of: npt.NDArray[np.integer],
        seed: int,
        exclude: Exclude = "known",
    ) -> CandidatePool:
        """The pool of a split, see the module's docstring.

        Raises:
            ValueError: an unknown ``exclude``.
        """
        if exclude not in get_args(Exclude):
            raise ValueError(f"exclude must be one of {get_args(Exclude)}; got {exclude!r}")
        past = None
        if exclude == "past":
            bounds = np.asarray(split.train.bounds, dtype=np.int64)
            begin = split.train_sequences.offsets[bounds[:, 2]]
            past = (split.train_sequences, begin, bounds[:, 1])
        return cls(split.known, leaf_of, seed, future=split.held_out, past=past)

    def _keys(self, rows: Ragged) -> Ints:
        """Sorted (row, identifier) pairs as one number each.

        By identifier: another item with the identifier of a held-out one would tell it as well.
        The last entry is larger than every key, so that a search always finds an entry.
        """
        leaves = self.leaf_of[rows.values]
        pairs = np.unique((rows.row_of_values() * self.num_items + leaves)[leaves >= 0])
        return np.append(pairs, np.iinfo(np.int64).max)

    def _items_of(self, keys: Ints, num_rows: int) -> Ragged:
        """All items that have the identifiers of these keys."""
        rows, leaves = np.divmod(keys[:-1], self.num_items)
        bounds = self._items_of_leaf.offsets
        items = self._items_of_leaf.slices(bounds[leaves], bounds[leaves + 1])
        counts = np.bincount(rows, weights=items.lengths, minlength=num_rows)
        return Ragged.from_lengths(counts.astype(np.int64), items.values)

    def _past_keys(self, request: SampleRequest) -> Ints:
        """Keys of (row of the request, identifier in the example's past or its positive's)."""
        assert self._past is not None
        events, begin, target = self._past
        examples = request.examples
        rows = events.slices(begin[examples], target[examples] + 1)
        return self._keys(rows)

    def _barred_of(self, request: SampleRequest) -> Ragged:
        """The barred items of each row of the request."""
        if self._past is not None:
            return self._items_of(self._past_keys(request), len(request.users))
        offsets = self._barred.offsets
        return self._barred.slices(offsets[request.users], offsets[request.users + 1])

    def is_known(self, users: Ints, items: Ints) -> npt.NDArray[np.bool_]:
        """Whether the user [B] knows the item [B, M], or one with the same identifier."""
        return self._has(self._known, users, items)

    def is_barred(self, request: SampleRequest, items: Ints) -> npt.NDArray[np.bool_]:
        """Whether the items [B, M] may not be augmentations of the examples."""
        if self._past is None:
            return self.is_known(request.users, items)
        return self._has(self._past_keys(request), np.arange(len(items)), items)

    def is_future(self, users: Ints, items: Ints) -> npt.NDArray[np.bool_]:
        """Whether the item [B, M], or one with its identifier, is held out of the user [B]."""
        return self._has(self._future, users, items)

    def _has(self, keys: Ints, users: Ints, items: Ints) -> npt.NDArray[np.bool_]:
        wanted = users[:, None] * self.num_items + self.leaf_of[items]
        found: npt.NDArray[np.bool_] = keys[np.searchsorted(keys, wanted)] == wanted
        return found

    def barred(self, request: SampleRequest) -> Ints:
        """Items that may not be augmentations of the examples [B, E], padded with -1."""
        rows = self._barred_of(request)
        width = int(rows.lengths.max(initial=0))
        padded = np.full((len(rows), width), -1, np.int64)
        padded[np.arange(width) < rows.lengths[:, None]] = rows.values
        return padded

    def num_barred(self, request: SampleRequest) -> Ints:
        """How many items may not be augmentations of the examples [B]."""
        if self._past is not None:
            return self._barred_of(request).lengths
        return np.diff(self._barred.offsets)[request.users]

    def admissible_scores(self, request: SampleRequest, inadmissible: float) -> Tensor:
        """A copy of the request's scores [B, items] with ``inadmissible`` at the barred items.

        The positive is one of them.
        """
        assert request.scores is not None
        rows = self._barred_of(request)
        where = (rows.row_of_values(), rows.values.astype(np.int64))
        scores = request.scores.clone()
        scores[tuple(to_device(part, scores.device) for part in where)] = inadmissible
        return scores

    # ---- draws ----

    def key(self, request: SampleRequest, stream: int, round_: int = 0) -> int:
        """The key of one stream of draws in one epoch."""
        return (request.epoch * _ROUNDS + round_) * _STREAMS + stream

    def uniform(
        self, request: SampleRequest, stream: int, columns: int, round_: int = 0
    ) -> _Floats:
        """Uniform numbers in [0, 1) for each example [B, columns]."""
        return keyed_uniform(
            self.seed, self.key(request, stream, round_), request.examples, columns
        )

    def draw_uniform(self, request: SampleRequest, round_: int, width: int) -> Ints:
        """Any items, each as likely as the next [B, width]; see :data:`Draw`."""
        key = self.key(request, 0, round_)
        return keyed_integers(self.seed, key, request.examples, width, self.num_items)

    # ---- the rules ----

    def complete(
        self,
        request: SampleRequest,
        candidates: Candidates,
        count: int,
        draw: Draw | None = None,
    ) -> TrajectorySet:
        """The positive and, of each row, the first ``count`` candidates that keep the rules.

        Where they do not suffice, ``draw`` (default: uniform draws) fills up. Padding is left only
        where the user has no further admissible item.
        """
        draw = self.draw_uniform if draw is None else draw
        chosen = self._first(request, candidates, count)
        width = 2 * count + 8
        for round_ in range(_ROUNDS):
            short = np.flatnonzero((chosen.items < 0).any(axis=1))
            if not len(short):
                break
            part = _rows(request, short)
            if round_ < _OWN:
                items = draw(part, round_, width)
            elif round_ < _OWN + _UNIFORM:
                items = self.draw_uniform(part, round_, width)
            else:  # a user who knows nearly everything: the whole catalogue in random order
                order = self.uniform(part, 0, self.num_items, round_)
                items = order.argsort(axis=1, kind="stable")
            filled = self._first(
                part,
                Candidates.concatenate([chosen.rows(short), Candidates.augmented(items)]),
                count,
            )
            for mine, new in zip(_arrays(chosen), _arrays(filled), strict=True):
                mine[short] = new
        behaviours = request.behaviours
        if behaviours is None:
            behaviours = np.full_like(request.targets, NOT_RECORDED)
        log_proposal = None
        if not np.isnan(chosen.log_proposal).all():
            none = torch.full((len(request.targets), 1), torch.nan)
            log_proposal = torch.cat([none, torch.from_numpy(chosen.log_proposal)], dim=1)
        return TrajectorySet(
            np.concatenate([request.targets[:, None], chosen.items], axis=1),
            np.concatenate([behaviours[:, None], chosen.behaviours], axis=1),
            difficulty(request, chosen.items),
            log_proposal,
        )

    def _first(self, request: SampleRequest, candidates: Candidates, count: int) -> Candidates:
        """The first ``count`` candidates of each row that keep the rules, then padding."""
        items = candidates.items
        real = items >= 0
        safe = np.maximum(items, 0)
        leaves = self.leaf_of[safe]
        logged = candidates.behaviours != AUGMENTED
        good = real & (leaves >= 0) & (leaves != self.leaf_of[request.targets][:, None])
        good &= logged | ~self.is_barred(request, safe)
        if logged.any():
            good &= ~(logged & self.is_future(request.users, safe))
        # Equal identifiers stand next to each other once sorted; the sort keeps their order.
        marked = np.where(good, leaves, -1)
        order = marked.argsort(axis=1, kind="stable")
        ordered = np.take_along_axis(marked, order, axis=1)
        repeated = np.zeros_like(good)
        repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        again = np.empty_like(good)
        np.put_along_axis(again, order, repeated, axis=1)
        good &= ~again
        first = (~good).argsort(axis=1, kind="stable")[:, :count]
        places = np.full((len(items), count), -1, np.int64)
        places[:, : first.shape[1]] = np.where(np.take_along_axis(good, first, axis=1), first, -1)
        return candidates.take(places)


def _rows(request: SampleRequest, rows: npt.NDArray[np.intp]) -> SampleRequest:
    """The fields of some prompts of a request that draws and rules read."""
    return SampleRequest(
        request.examples[rows],
        request.users[rows],
        request.targets[rows],
        request.epoch,
        request.progress,
        step=request.step,
    )


def _arrays(candidates: Candidates) -> tuple[npt.NDArray[np.generic], ...]:
    return candidates.items, candidates.behaviours, candidates.log_proposal
