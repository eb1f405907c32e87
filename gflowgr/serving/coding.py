"""Identifiers of new items from their vectors, by the tokeniser that the model's items have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import DataError
from ..identifiers import Tokeniser, raw_codes, read_index, tokeniser_path
from .catalogue import Catalogue
from .requests import RequestError

__all__ = ["ItemCoder"]


class ItemCoder:
    """Codes new items of a catalogue.

    Args:
        index: the index file that the model was trained with; its tokeniser stands beside it.
        catalogue: the catalogue before any change.

    Raises:
        DataError: the index or the tokeniser is damaged, or the model has other identifiers.
        FileNotFoundError: one of the files is not there.
    """

    def __init__(self, index: str, catalogue: Catalogue) -> None:
        self.tokeniser = Tokeniser.load(tokeniser_path(index))
        identifiers = read_index(index, num_items=catalogue.model.tree.num_items)
        if not np.array_equal(identifiers.codes, catalogue.codes()):
            raise DataError(f"{index} must have the identifiers of the model; it has others")
        raw = raw_codes(identifiers, index)
        # The tokeniser's number of each code, by the model's.
        self._raw = [np.unique(column) for column in raw.T]

    def identifier(self, catalogue: Catalogue, vector: Sequence[float]) -> tuple[int, ...]:
        """The model's codes for a new item, next to those that are there now.

        Args:
            catalogue: what is there.
            vector: of the item [width], made as those of the old items were.

        Raises:
            RequestError: a wrong width, a number that is not finite, no identifier left.
        """
        codes = catalogue.codes()[catalogue.tree.item_ids.cpu().numpy()]
        pairs = zip(self._raw, codes.T, strict=True)
        raw = np.stack([known[column] for known, column in pairs], axis=1)
        try:
            (new,) = self.tokeniser.extend(raw, np.array([vector], dtype=np.float64))
        except ValueError as error:
            raise RequestError("vector", f"vector: {error}") from None
        found = zip(self._raw, new, strict=True)
        return tuple(int(np.searchsorted(known, code)) for known, code in found)
