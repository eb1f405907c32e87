"""A frozen tokeniser: codes new items with the encoder and codebooks that coded the old ones."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from gflowgr.errors import DataError, shown
from gflowgr.files import atomic_path, regular_file
from gflowgr.identifiers.collisions import Collisions
from gflowgr.identifiers.quantisation import (
    Quantisation,
    VectorEncoder,
    checked_vectors,
    squared_distances,
)

__all__ = ["Tokeniser", "tokeniser_path"]

_FORMAT = "gflowgr.tokeniser"


def tokeniser_path(index: str | os.PathLike[str]) -> Path:
    """Where the tokeniser of an index file is: ``tokeniser.NAME.safetensors`` beside it."""
    path = Path(index)
    name = path.name.removesuffix(".gz").removesuffix(".json").removeprefix("index.")
    return path.with_name(f"tokeniser.{name}.safetensors")


@dataclass(frozen=True, eq=False)
class Tokeniser:
    """What coded a catalogue, frozen.

    Attributes:
        codebooks: float32 [L, K, d].
        collisions: how items with equal codes were told apart; see
            :func:`~gflowgr.identifiers.resolve_collisions`.
        encoder: from item vectors to what is quantised; None: they are quantised themselves.
    """

    codebooks: np.ndarray
    collisions: Collisions
    encoder: VectorEncoder | None = None

    @classmethod
    def of(cls, quantised: Quantisation, collisions: Collisions) -> Tokeniser:
        """The tokeniser that made ``quantised``."""
        return cls(quantised.codebooks, collisions, quantised.encoder)

    def extend(self, codes: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Identifiers of new items; those of the old ones stay as they are.

        Each item, in order, takes the code nearest to what the codes before it leave over, at every
        level. Only codes that some old item has are taken: a trained model has no token for others.
        Where the identifier must be unique, a code under which nothing is free is passed over for
        the next nearest (``"reassign"``), and the number that tells equal codes apart is the
        smallest free one (``"extra"``).

        Args:
            codes: int [items, L], or [items, L + 1] for ``"extra"``: the old items' codes.
            vectors: float [new, width], made as those of the old items were.

        Returns:
            int32 [new, as many levels].

        Raises:
            ValueError: a wrong shape, a vector that is not finite, no identifier left.
        """
        levels = len(self.codebooks) + (self.collisions == "extra")
        if codes.ndim != 2 or codes.shape[1] != levels or (codes < 0).any():
            raise ValueError(
                f"codes must be [items, {levels}], as the tokeniser makes them; got "
                f"{list(codes.shape)}"
            )
        latent = checked_vectors(vectors, "vectors")
        width = self.codebooks.shape[2] if self.encoder is None else len(self.encoder.mean)
        if latent.shape[1] != width:
            raise ValueError(
                f"vectors must be [new items, {width}], as those of the old items; got "
                f"{list(latent.shape)}"
            )
        if self.encoder is not None:
            latent = self.encoder(latent)
        known = [np.unique(column) for column in codes.T]
        # Identifiers in use below each prefix, the empty one and whole ones included.
        used: dict[tuple[int, ...], int] = {}
        if self.collisions != "shared":
            for row in set(map(tuple, codes.tolist())):
                _count(used, row)
        found = []
        for row in latent:
            identifier = self._place(row, known, used)
            if self.collisions != "shared":
                _count(used, identifier)
            found.append(identifier)
        return np.array(found, dtype=np.int32).reshape(-1, levels)

    def _place(
        self, vector: np.ndarray, known: list[np.ndarray], used: dict[tuple[int, ...], int]
    ) -> tuple[int, ...]:
        """Never a step back: below every code that is taken there is room."""
        room = np.cumprod([1, *(len(each) for each in known[:0:-1])])[::-1]
        prefix: tuple[int, ...] = ()
        for level, candidates in enumerate(known):
            ordered = candidates  # of the numbers of "extra" the smallest
            if level < len(self.codebooks):
                codebook = self.codebooks[level]
                distances = squared_distances(vector[None], codebook[candidates])[0]
                ordered = candidates[np.argsort(distances, kind="stable")]
            free = (code for code in ordered.tolist() if used.get((*prefix, code), 0) < room[level])
            code = next(free, None)
            if code is None:
                raise ValueError(
                    "every identifier that the model has tokens for is taken; make new identifiers "
                    "with more codes, and train anew"
                )
            prefix = (*prefix, code)
            if level < len(self.codebooks):
                vector = vector - self.codebooks[level, code]
        return prefix

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.numpy import save_file

        arrays = {"codebooks": self.codebooks}
        if self.encoder is not None:
            arrays |= {"mean": self.encoder.mean, "scale": np.array([self.encoder.scale])}
            for number, (weight, bias) in enumerate(self.encoder.layers):
                arrays |= {f"weight{number}": weight, f"bias{number}": bias}
        arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
        metadata = {"format": _FORMAT, "collisions": self.collisions}
        with atomic_path(path) as temporary:
            save_file(arrays, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokeniser:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: it is no such file, or one whose parts do not fit together.
            FileNotFoundError: there is no such file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(regular_file(path), framework="np") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise DataError(f"{path}: not a safetensors file: {error}") from None
        collisions: Any = metadata.get("collisions")
        if metadata.get("format") != _FORMAT or collisions not in get_args(Collisions):
            raise DataError(f"{path} must be a tokeniser; got the metadata {shown(metadata)}")
        count = sum(name.startswith("weight") for name in arrays)
        names = [f"{part}{number}" for number in range(count) for part in ("weight", "bias")]
        names += ["codebooks", *(("mean", "scale") if count else ())]
        if sorted(names) != sorted(arrays):
            raise DataError(f"{path} must hold {shown(sorted(names))}; got {shown(sorted(arrays))}")
        if any(a.dtype != np.float32 or not np.isfinite(a).all() for a in arrays.values()):
            raise DataError(f"{path} must hold finite numbers of float32")
        layers = [(arrays[f"weight{n}"], arrays[f"bias{n}"]) for n in range(count)]
        codebooks = arrays["codebooks"]
        encoder = None
        width = codebooks.shape[-1]
        fits = codebooks.ndim == 3 and codebooks.size > 0
        if count:
            encoder = VectorEncoder(arrays["mean"], float(arrays["scale"].sum()), tuple(layers))
            fits = fits and encoder.mean.ndim == 1 and encoder.widths() is not None
            fits = fits and encoder.widths() == [len(encoder.mean), *(len(b) for _, b in layers)]
            fits = fits and len(layers[-1][1]) == width
        if not fits:
            shapes = {name: list(array.shape) for name, array in arrays.items()}
            raise DataError(f"{path}: the shapes do not fit together: {shown(shapes)}")
        return cls(codebooks, collisions, encoder)


def _count(used: dict[tuple[int, ...], int], identifier: tuple[int, ...]) -> None:
    for length in range(1, len(identifier) + 1):
        used[identifier[:length]] = used.get(identifier[:length], 0) + 1
