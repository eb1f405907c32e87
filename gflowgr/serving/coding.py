"""Identifiers of new items from their vectors or texts, as the model's items have theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError, shown
from ..identifiers import Tokeniser, encode_texts, raw_codes, read_index, tokeniser_path
from .catalogue import Catalogue
from .requests import RequestError

__all__ = ["NO_ENCODER", "ItemCoder"]

NO_ENCODER = (
    "this server was started without --encoder (and --index), the text encoder of its items; give "
    "the vector that it makes, or the identifier"
)


class ItemCoder:
    """Codes new items of a catalogue.

    Args:
        index: the index file that the model was trained with; its tokeniser stands beside it.
        catalogue: the catalogue before any change.
        encoder: the text encoder that the index's vectors were made by, a folder or a model in the
            local cache; None: new items come with their vectors.

    Raises:
        DataError: the index or the tokeniser is damaged, or the model has other identifiers.
        ValueError: there is no such encoder here, or its vectors have another width.
        FileNotFoundError: one of the files is not there.
    """

    def __init__(self, index: str, catalogue: Catalogue, encoder: str | None = None) -> None:
        if not Path(index).is_file():
            raise FileNotFoundError(f"--index must name a file; got {index}")
        self.tokeniser = Tokeniser.load(tokeniser_path(index))
        identifiers = read_index(index, num_items=catalogue.model.tree.num_items)
        if not np.array_equal(identifiers.codes, catalogue.codes()):
            raise DataError(f"{index} must have the identifiers of the model; it has others")
        raw = raw_codes(identifiers, index)
        # The tokeniser's number of each code, by the model's.
        self._raw = [np.unique(column) for column in raw.T]
        self._encoder = encoder
        if encoder is not None:
            try:
                self.tokeniser.extend(raw, encode_texts(["a text"], encoder))
            except ValueError as error:
                raise ValueError(f"--encoder {encoder} must be that of {index}: {error}") from None

    def vector(self, text: str) -> tuple[float, ...]:
        """The vector of a new item's text, by the encoder, which is read for it.

        Raises:
            RequestError: there is no encoder, or no word in the text.
        """
        if self._encoder is None:
            raise RequestError("text", f"text: {NO_ENCODER}")
        if not text.strip():
            raise RequestError("text", f"text must have a word; got {shown(text)}")
        (vector,) = encode_texts([text], self._encoder)
        return tuple(vector.tolist())

    def identifier(self, catalogue: Catalogue, vector: Sequence[float]) -> tuple[int, ...]:
        """The model's codes for a new item, next to those that are there now.

        Args:
            catalogue: what is there.
            vector: of the item [width], made as those of the old items were.

        Raises:
            RequestError: a wrong width, a number that is not finite, no identifier left.
        """
        for place, value in enumerate(vector):
            if not math.isfinite(value):
                raise RequestError(
                    "vector", f"vector must hold finite numbers; got {value} at place {place}"
                )
        codes = catalogue.codes()[catalogue.tree.item_ids.cpu().numpy()]
        pairs = zip(self._raw, codes.T, strict=True)
        raw = np.stack([known[column] for known, column in pairs], axis=1)
        try:
            (new,) = self.tokeniser.extend(raw, np.array([vector], dtype=np.float64))
        except ValueError as error:
            raise RequestError("vector", f"vector: {error}") from None
        found = zip(self._raw, new, strict=True)
        return tuple(int(np.searchsorted(known, code)) for known, code in found)
