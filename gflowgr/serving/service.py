"""A served model without the server: requests in, answers out, changes of the catalogue."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import DataError, shown
from ..models.gflow_model import GFlowModel
from .beginnings import TargetPolicy, beginnings
from .catalogue import Catalogue
from .coding import NO_ENCODER, ItemCoder
from .journal import Journal
from .load import load_collaborative_for, load_for
from .requests import Add, AddVector, Change, Recommend, RequestError, SwapModel

__all__ = ["Service", "Sources"]

_PROMPTS_A_THREAD = 16
"""Prompts of one search on a CPU, for each of its threads."""

Search = tuple[int, tuple[int, ...] | None, bool]
"""What the requests of one search share: beams, the only items that may come back, and whether it
is by the model beside."""


@dataclass(frozen=True)
class _Asked:
    """A request whose ids have been found."""

    place: int
    request: Recommend
    history: npt.NDArray[np.int64]
    excluded: npt.NDArray[np.int64]
    search: Search


@dataclass(frozen=True)
class Sources:
    """What a :class:`Service` is made from, as paths; its arguments say what each is."""

    model: str
    data: str
    state: str
    num_beams: int = 20
    index: str | None = None
    encoder: str | None = None
    beside: str | None = None
    collaborative: str | None = None

    def resolved(self) -> Sources:
        """The same for a process with another current folder."""
        places = ("model", "data", "state", "index", "beside", "collaborative")
        given = {name: getattr(self, name) for name in places}
        if self.encoder is not None and Path(self.encoder).is_dir():
            given["encoder"] = self.encoder  # else a name in the local cache
        whole: dict[str, Any] = {
            name: str(Path(at).resolve()) for name, at in given.items() if at is not None
        }
        return replace(self, **whole)


class Service:
    """A model and its live catalogue; several, over one state folder, are replicas of each other.

    Whatever one replica has answered for a change, every request that begins afterwards is
    answered from a catalogue with it, on every replica: they all read the journal before they
    search. A request sees one catalogue, whole.

    Args:
        model: the folder of a saved model.
        data: the folder of its dataset.
        state: the folder of the journal; what is in it is done again, so a restart comes back with
            the same catalogue.
        num_beams: beams of the search; at least as many as items are wanted are used.
        index: the index file that the model was trained with, whose tokeniser codes new items;
            None: they come with their identifiers.
        encoder: the text encoder of the index's vectors; new items may then come with texts.
        beside: the folder of a second model of the same items and identifiers, for comparison; it
            answers from the same catalogue.
        collaborative: the folder of the model whose scores the reward is made of; its exact flows
            are then shown beside the model's.

    Raises:
        DataError: the model, the dataset or the journal is damaged, or they do not belong together.
    """

    def __init__(
        self,
        model: str,
        data: str,
        state: str,
        *,
        num_beams: int = 20,
        index: str | None = None,
        encoder: str | None = None,
        beside: str | None = None,
        collaborative: str | None = None,
    ) -> None:
        loaded, self.dataset = load_for(model, data)
        self._load: Callable[[str], GFlowModel] = partial(_model_of, data=data)
        self._lock = threading.RLock()
        self._catalogue = Catalogue.of(loaded, self.dataset, num_beams)
        if encoder is not None and index is None:
            raise ValueError("--encoder must come with --index, whose vectors it made")
        self._coder = None if index is None else ItemCoder(index, self._catalogue, encoder)
        self._beside = None if beside is None else load_for(beside, data)[0]
        if self._beside is not None:
            its = self._catalogue.with_model(self._beside).codes()
            if not np.array_equal(its, self._catalogue.codes()):
                raise DataError(
                    f"--beside {beside} must have the identifiers of {model}; it has others"
                )
        self._pair: tuple[Catalogue | None, Catalogue] = (None, self._catalogue)
        self._target = None
        if collaborative is not None:
            scorer, _ = load_collaborative_for(collaborative, data)
            self._target = TargetPolicy.of(scorer, self.dataset, loaded.settings)
        self._journal = Journal(state)
        self.catalogue()  # catches up

    def catalogue(self) -> Catalogue:
        """The catalogue with every change that any replica has answered for.

        Raises:
            DataError: the journal has a line that cannot be done again; it names the line.
        """
        with self._lock:
            for change in self._journal.unread():
                try:
                    self._catalogue = self._catalogue.after(change, self._load)
                except RequestError as error:
                    raise DataError(f"{self._journal.where} cannot be done: {error}") from None
            return self._catalogue

    def change(self, change: Change | AddVector, by: str) -> str:
        """Make a change: for every replica, and for good.

        Args:
            change: what to do.
            by: who asks, for the journal.

        Returns:
            The line of the journal, which is the line for an audit.

        Raises:
            RequestError: it cannot be done, and nothing has changed.
        """
        if isinstance(change, SwapModel):
            try:
                change = SwapModel(str(Path(change.model).resolve()))
            except (OSError, ValueError) as error:
                raise RequestError(
                    "model", f"model must be a folder; got {shown(change.model)}: {error}"
                ) from None
        with self._lock, self._journal.writing():
            if isinstance(change, AddVector):
                change = self._coded(change)
            changed = self.catalogue().after(change, self._load)
            if self._beside is not None:
                self._of_beside(changed)  # what cannot be done there changes nothing, either
            line = self._journal.append(change, by)
            self._catalogue = changed
        return line

    def vector(self, text: str) -> tuple[float, ...]:
        """The vector of a new item's text, for :class:`~gflowgr.serving.requests.AddVector`.

        Raises:
            RequestError: there is no text encoder here, or no word in the text.
        """
        if self._coder is None:
            raise RequestError("text", f"text: {NO_ENCODER}")
        return self._coder.vector(text)

    def _coded(self, change: AddVector) -> Add:
        """With what is there now, which nobody changes meanwhile."""
        if self._coder is None:
            raise RequestError(
                "vector", "vector: this server was started without --index; give the identifier"
            )
        identifier = self._coder.identifier(self.catalogue(), change.vector)
        share = self._coder.tokeniser.collisions == "shared"
        return Add(change.id, identifier, change.title, share)

    def answer(self, requests: Sequence[Recommend]) -> list[dict[str, Any] | RequestError]:
        """Answers to a batch of requests, in its order, all from one catalogue.

        Requests of equal beams and equal ``available`` are searched for together, as
        ``gflowgr recommend`` does for a batch of users; each gets what it would get alone.

        Returns:
            For each request a record of ``items``, best first, ``version`` of the catalogue, and
            ``scores`` and ``titles`` where wanted; or the error of that request.
        """
        catalogue = self.catalogue()
        answers: dict[int, dict[str, Any] | RequestError] = {}
        groups: dict[Search, list[_Asked]] = {}
        for place, request in enumerate(requests):
            try:
                asked = self._find(catalogue, place, request)
            except RequestError as error:
                answers[place] = error
            else:
                groups.setdefault(asked.search, []).append(asked)
        for (_, only, beside), group in groups.items():
            asked_model = self._of_beside(catalogue) if beside else catalogue
            recommender = asked_model.recommender(only)
            for some in _searched_together(group, asked_model.model.device.type):
                items, scores = recommender.recommend(
                    [asked.history for asked in some],
                    max(asked.request.k for asked in some),
                    [asked.excluded for asked in some],
                )
                for asked, found, log_p in zip(some, items, scores, strict=True):
                    answers[asked.place] = _record(catalogue, asked.request, found, log_p)
        return [answers[place] for place in range(len(requests))]

    def history(self, user: str) -> npt.NDArray[np.int64]:
        """The items of a user of the dataset, oldest first.

        Raises:
            RequestError: there is no such user.
        """
        row = self._rows.get(user)
        if row is None:
            raise RequestError("user", f"user must be one of the dataset; got {shown(user)}")
        return self.dataset.sequences.row(row).astype(np.int64)

    def beginnings(self, request: Recommend) -> dict[str, Any]:
        """The history of a request, and where the model's probability goes in the tree.

        Returns:
            ``history`` (id and title of each item); ``beginnings``, see
            :func:`~gflowgr.serving.beginnings.beginnings`; ``models``, what the served one and the
            one beside it were trained by; ``version`` of the catalogue.

        Raises:
            RequestError: an id that no item has, no such user, neither of them.
        """
        catalogue = self.catalogue()
        history = self._find(catalogue, 0, request).history
        models = [catalogue.model, *([] if self._beside is None else [self._beside])]
        of_model = self._of_beside(catalogue) if request.beside else catalogue
        return {
            "history": [
                {"id": catalogue.ids[item], "title": catalogue.titles[item]}
                for item in history.tolist()
            ],
            "beginnings": beginnings(of_model, history, self._target),
            "models": _told_apart([model.settings.label for model in models]),
            "version": catalogue.version,
        }

    def _of_beside(self, catalogue: Catalogue) -> Catalogue:
        """The same catalogue of the model beside, made once for each version."""
        with self._lock:
            if self._pair[0] is not catalogue:
                assert self._beside is not None  # _find has refused the request otherwise
                self._pair = catalogue, catalogue.with_model(self._beside)
            return self._pair[1]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.dataset.user_ids)}

    def _find(self, catalogue: Catalogue, place: int, request: Recommend) -> _Asked:
        def numbers(items: tuple[Any, ...], field: str) -> npt.NDArray[np.int64]:
            return np.array([catalogue.number(item, field) for item in items], dtype=np.int64)

        if request.beside and self._beside is None:
            raise RequestError("beside", "beside: this server was started without --beside")
        if request.history is not None:
            history = numbers(request.history, "history")
        elif request.user is not None:
            history = self.history(request.user)
        else:
            raise RequestError("history", "history or user must be given; got neither")
        excluded = numbers(request.exclude, "exclude")
        if request.mask_seen:
            excluded = np.concatenate([history, excluded])
        # Past the end of the tree there is nothing to leave out.
        excluded = np.unique(excluded[excluded < catalogue.tree.num_items])
        only = None
        if request.available is not None:
            only = tuple(np.unique(numbers(request.available, "available")).tolist())
        beams = max(request.k, catalogue.num_beams)
        return _Asked(place, request, history, excluded, (beams, only, request.beside))


def _told_apart(labels: list[str]) -> list[str]:
    """The labels of the served model and the one beside it, which may be of one kind."""
    if len(set(labels)) == len(labels):
        return labels
    return [f"{label} ({which})" for label, which in zip(labels, ("served", "beside"), strict=True)]


def _searched_together(group: list[_Asked], device: str) -> list[list[_Asked]]:
    """The requests of a batch in searches; on a CPU few of alike length, which are padded little.

    So many for each thread fill its vector units; more only outgrow its cache.
    """
    if device != "cpu":
        return [group]
    ordered = sorted(group, key=lambda asked: len(asked.history))
    size = _PROMPTS_A_THREAD * torch.get_num_threads()
    return [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]


def _record(
    catalogue: Catalogue,
    request: Recommend,
    items: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32],
) -> dict[str, Any]:
    found = [
        (item, score)
        for item, score in zip(items[: request.k].tolist(), scores.tolist(), strict=False)
        if item >= 0 and math.isfinite(score)
    ]
    record: dict[str, Any] = {
        "items": [catalogue.ids[item] for item, _ in found],
        "version": catalogue.version,
    }
    if request.with_scores:
        record["scores"] = [round(score, 6) for _, score in found]
    if request.with_titles:
        record["titles"] = [catalogue.titles[item] for item, _ in found]
    return record


def _model_of(folder: str, *, data: str) -> GFlowModel:
    return load_for(folder, data)[0]
