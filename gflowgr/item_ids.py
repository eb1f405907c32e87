"""The ids that the items of a source have, such as ``"B00A"``, in the order of their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import DataError, shown
from .files import find_lone_surrogate, read_json, write_json_gz

__all__ = ["ITEM_IDS_FILE", "ItemIds"]

ITEM_IDS_FILE = "item_ids.json.gz"
"""In a dataset's folder and in a saved model: a JSON list, whose entry n is the id of item n."""
_MAX_CHARACTERS = 1000


class ItemIds:
    """The id of each item, and the item of each id.

    Everything inside works with item numbers 0 .. n - 1; ids are for what goes in and comes out.

    Args:
        ids: of the items 0 .. n - 1.
        where: what errors call them.

    Raises:
        DataError: an id is not a text of 1 to 1,000 characters of valid Unicode, has white space at
            an end, or occurs twice.
    """

    def __init__(self, ids: Iterable[str], where: str = "item_ids") -> None:
        self._ids = tuple(ids)
        for item, each in enumerate(self._ids):
            if (
                type(each) is not str
                or not 1 <= len(each) <= _MAX_CHARACTERS
                or each.strip() != each
                or find_lone_surrogate(each)
            ):
                raise DataError(
                    f"{where}: the id of item {item} must be a text of 1 to {_MAX_CHARACTERS:,} "
                    f"characters, without white space at its ends; got {shown(each)}"
                )
        self._items = {each: item for item, each in enumerate(self._ids)}
        if len(self._items) != len(self._ids):
            item = next(n for n, each in enumerate(self._ids) if self._items[each] != n)
            twin = self._items[self._ids[item]]
            raise DataError(
                f"{where}: ids must differ; got {shown(self._ids[item])} for the items {item} and "
                f"{twin}"
            )

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __getitem__(self, item: int) -> str:
        return self._ids[item]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ItemIds) and self._ids == other._ids

    def __hash__(self) -> int:
        return hash(self._ids)

    def __repr__(self) -> str:
        return f"ItemIds({len(self):,}: {', '.join(map(repr, self._ids[:3]))}, ...)"

    def item(self, id_: str) -> int | None:
        """The number of the item with this id, or None."""
        return self._items.get(id_)

    def first_difference(self, other: ItemIds) -> int | None:
        """The first item whose ids differ, or that only one of the two has; None if there is none.

        Args:
            other: ids of the items that should be the same.
        """
        if self == other:
            return None
        pairs = enumerate(zip(self, other, strict=False))
        shorter = min(len(self), len(other))
        return next((item for item, (mine, theirs) in pairs if mine != theirs), shorter)

    def save(self, folder: Path) -> None:
        """Write :data:`ITEM_IDS_FILE` into ``folder``, whole or not at all."""
        write_json_gz(folder / ITEM_IDS_FILE, self._ids)

    @classmethod
    def load(cls, folder: Path) -> ItemIds | None:
        """Read what :meth:`save` wrote; None if the folder has none.

        Raises:
            DataError: the file is damaged, or is no list of ids.
        """
        path = folder / ITEM_IDS_FILE
        if not path.exists() and not path.is_symlink():
            return None
        return cls(read_json(path, expect=list), str(path))
