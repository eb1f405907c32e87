"""The backbone's vocabulary of identifier tokens: special tokens, then one codebook per level."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..integers import integer_array

__all__ = ["EOS_TOKEN", "PAD_TOKEN", "IdentifierVocabulary"]

PAD_TOKEN = 0
"""Padding of prompts, and the decoder's start token (as in T5)."""
EOS_TOKEN = 1
"""Ends a prompt, and an identifier when identifiers differ in length."""

_NUM_SPECIAL = 2
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class IdentifierVocabulary:
    """Where the identifier tokens are among a model's tokens: the codes of level 1, of level 2, ...

    By default a compact vocabulary of ``pad``, ``eos`` and the codes. (TIGER reuses T5's 32k text
    vocabulary; nothing but identifiers is ever emitted, so ``2 + sum(codebook_sizes)`` tokens do.)
    In a vocabulary of text the codes begin at ``offset``.

    Attributes:
        codebook_sizes: number of codes of each level.
        ragged: identifiers differ in length, and so carry a final ``eos``.
        offset: token id of code 0 of level 1.
        eos_token: token id that ends an identifier when identifiers differ in length.
    """

    codebook_sizes: tuple[int, ...]
    ragged: bool = False
    offset: int = _NUM_SPECIAL
    eos_token: int = EOS_TOKEN

    def __post_init__(self) -> None:
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(
                f"codebook_sizes must be positive, one per level; got {self.codebook_sizes}"
            )
        end = self.offset + sum(self.codebook_sizes)
        if self.offset < 0 or self.eos_token < 0 or self.offset <= self.eos_token < end:
            raise ValueError(
                f"offset = {self.offset} and eos_token = {self.eos_token} must be >= 0, and "
                f"eos_token no identifier token ({self.offset} to {end - 1})"
            )

    @classmethod
    def from_codes(cls, codes: npt.ArrayLike) -> IdentifierVocabulary:
        """The smallest vocabulary that holds ``codes`` [items, L] (right-padded with -1)."""
        array = _check_codes(codes)
        sizes = tuple(int(size) for size in array.max(axis=0) + 1)
        return cls(codebook_sizes=sizes, ragged=bool((array < 0).any()))

    @property
    def size(self) -> int:
        """Number of token ids up to the last identifier token."""
        return self.offset + sum(self.codebook_sizes)

    @property
    def length(self) -> int:
        """Tokens per identifier (the longest one, its ``eos`` included when ragged)."""
        return len(self.codebook_sizes) + int(self.ragged)

    @property
    def level_offsets(self) -> tuple[int, ...]:
        """Token id of code 0 of each level."""
        starts = np.cumsum([0, *self.codebook_sizes[:-1]]) + self.offset
        return tuple(int(start) for start in starts)

    def token_names(self) -> list[str]:
        """``<a_0>``, ``<a_1>``, ..., ``<b_0>``, ...: a letter per level, in the order of the ids.

        Raises:
            ValueError: there are more levels than letters.
        """
        levels = len(self.codebook_sizes)
        if levels > len(_LETTERS):
            raise ValueError(f"{levels} levels have no names: there are {len(_LETTERS)} letters")
        return [
            f"<{letter}_{code}>"
            for letter, size in zip(_LETTERS, self.codebook_sizes, strict=False)
            for code in range(size)
        ]

    def encode(self, codes: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Token ids of ``codes`` [items, levels] -> [items, length], right-padded with -1.

        Raises:
            ValueError: a code is outside its level's codebook.
        """
        array = _check_codes(codes)
        if array.shape[1] != len(self.codebook_sizes):
            raise ValueError(
                f"codes has {array.shape[1]} levels, the vocabulary {len(self.codebook_sizes)}"
            )
        sizes = np.asarray(self.codebook_sizes)
        bad = np.argwhere(array >= sizes)
        if len(bad):
            row, level = (int(index) for index in bad[0])
            raise ValueError(
                f"codes[{row}, {level}] = {array[row, level]} is outside the codebook of level "
                f"{level} with {sizes[level]} codes"
            )
        present = array >= 0
        tokens = np.where(present, array + np.asarray(self.level_offsets), -1)
        if not self.ragged:
            if not present.all():
                row = int(np.argwhere(~present)[0][0])
                raise ValueError(f"codes[{row}] is shorter than {array.shape[1]} levels")
            return tokens
        tokens = np.concatenate([tokens, np.full((len(tokens), 1), -1)], axis=1)
        tokens[np.arange(len(tokens)), present.sum(axis=1)] = self.eos_token
        return tokens

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description, the inverse of :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> IdentifierVocabulary:
        """Rebuild from :meth:`to_dict`."""
        sizes = tuple(integer_array(values["codebook_sizes"], "codebook_sizes").tolist())
        return cls(**{**values, "codebook_sizes": sizes})


def _check_codes(codes: npt.ArrayLike) -> npt.NDArray[np.int64]:
    array = np.asarray(codes)
    if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"codes must be a non-empty integer array [items, levels]; got shape {array.shape}, "
            f"dtype {array.dtype}"
        )
    return integer_array(array, "codes")
