"""Requests to a served model as plain data, and the error that names the field that is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..errors import DataError, shown

__all__ = [
    "Add",
    "AddVector",
    "Change",
    "Recommend",
    "Remove",
    "RequestError",
    "SetAvailability",
    "SwapModel",
    "change_from_json",
]


class RequestError(DataError):
    """A request cannot be carried out; ``field`` is the part of it that is to be changed."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[type[RequestError], tuple[str, str]]:
        return RequestError, (self.field, str(self))  # goes between processes


@dataclass(frozen=True)
class Recommend:
    """One request for items.

    Attributes:
        user: a user of the dataset, whose sequence is the history unless ``history`` is given.
        history: ids of items, oldest first.
        k: items wanted.
        exclude: ids of items that must not come back, besides the history.
        available: ids of the items that may come back; None for all of the catalogue.
        mask_seen: leave out the items of the history.
        with_scores: log P of each item, too (nats).
        with_titles: the title of each item, too.
        beside: ask the model beside the served one.
    """

    user: str | None = None
    history: tuple[Any, ...] | None = None
    k: int = 10
    exclude: tuple[Any, ...] = ()
    available: tuple[Any, ...] | None = None
    mask_seen: bool = True
    with_scores: bool = False
    with_titles: bool = False
    beside: bool = False


@dataclass(frozen=True)
class Add:
    """Put an item into the catalogue, or one back that was removed.

    Attributes:
        id: its id.
        identifier: its codes, one for each level, numbered as in the model's vocabulary.
        title: what people read.
        share: whether the identifier may be one that another item has.
    """

    id: str
    identifier: tuple[int, ...]
    title: str | None = None
    share: bool = False
    kind: Literal["add"] = "add"


@dataclass(frozen=True)
class AddVector:
    """An :class:`Add` whose identifier the tokeniser finds; the journal has what it found.

    Attributes:
        id: the item's id.
        vector: made as those of the items were that the tokeniser was trained on.
        title: what people read.
    """

    id: str
    vector: tuple[float, ...]
    title: str | None = None


@dataclass(frozen=True)
class Remove:
    """Take an item out of the catalogue; histories may still hold it."""

    id: str
    kind: Literal["remove"] = "remove"


@dataclass(frozen=True)
class SetAvailability:
    """Whether an item of the catalogue may be recommended."""

    id: str
    available: bool
    kind: Literal["availability"] = "availability"


@dataclass(frozen=True)
class SwapModel:
    """Go over to another checkpoint, which was trained on the same items."""

    model: str
    kind: Literal["model"] = "model"


Change: TypeAlias = Add | Remove | SetAvailability | SwapModel

_KINDS: dict[str, type[Any]] = {
    "add": Add,
    "remove": Remove,
    "availability": SetAvailability,
    "model": SwapModel,
}
_TYPES: dict[str, tuple[type[Any], ...]] = {
    "id": (str,),
    "identifier": (tuple,),
    "title": (str, type(None)),
    "share": (bool,),
    "available": (bool,),
    "model": (str,),
    "kind": (str,),
}


def change_from_json(values: dict[str, Any]) -> Change:
    """The change that ``dataclasses.asdict`` made ``values`` of.

    Raises:
        DataError: no such kind, a field that is missing, or one that the kind does not have, or not
            of this type.
    """
    kind = _KINDS.get(str(values.get("kind")))
    if kind is None:
        raise DataError(f"kind must be one of {', '.join(_KINDS)}; got {values.get('kind')!r}")
    if isinstance(values.get("identifier"), list):
        values = {**values, "identifier": tuple(values["identifier"])}
    try:
        change: Change = kind(**values)
    except TypeError as error:
        raise DataError(f"a change of kind {values['kind']!r}: {error}") from None
    for name, value in vars(change).items():
        if type(value) not in _TYPES[name]:
            raise DataError(f"{name}: {shown(value)} is not what this field holds")
    if isinstance(change, Add) and not all(type(code) is int for code in change.identifier):
        raise DataError(f"identifier must hold integers; got {shown(change.identifier)}")
    return change
