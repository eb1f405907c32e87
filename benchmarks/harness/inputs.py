"""Random inputs of a case, new for every seed, and the identifiers that trees are made of."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.shapes import CODES, LossShape

# Distinct prefixes of Beauty's published identifiers, level by level.
_BEAUTY_PREFIXES = (197, 7931, 11696, 12088)


@dataclass
class Inputs:
    """Tensors of one case: those that ask for a gradient are the leaves that are compared."""

    tensors: dict[str, Tensor]
    upstream: Tensor | None = None  # gradient of a result that is not a scalar

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors that get a gradient."""
        return {name: t for name, t in self.tensors.items() if t.requires_grad}

    def clear(self) -> None:
        """Drop the gradients, so that the next backward pass allocates its own."""
        for tensor in self.leaves.values():
            tensor.grad = None

    def double(self) -> Inputs:
        """The same values in float64, integers as they are."""
        wide = {
            name: t.detach().double().requires_grad_(t.requires_grad)
            if t.is_floating_point()
            else t
            for name, t in self.tensors.items()
        }
        return Inputs(wide, None if self.upstream is None else self.upstream.double())


MakeInputs = Callable[[int], Inputs]


def head_inputs(
    shape: LossShape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    trained: bool,
    upstream: bool,
    tokens: Callable[[torch.Generator], Tensor] | None = None,
) -> MakeInputs:
    """Inputs of the head's ops: logits of unit variance, rewards and log Z of a few nats.

    `trained`: the head asks for a gradient. `upstream`: also a random gradient [B, N, L] of the
    result. `tokens` draws the trajectories (uniform over the vocabulary by default).
    """
    trajectories = (shape.B, shape.N)

    def make(seed: int) -> Inputs:
        g = torch.Generator(device).manual_seed(seed)

        def normal(*size: int, scale: float, kind: torch.dtype = torch.float32) -> Tensor:
            # Drawn in the dtype wanted: a float32 copy of a large head would double the memory.
            return torch.randn(size, generator=g, device=device, dtype=kind).mul_(scale)

        drawn = (
            torch.randint(shape.V, (*trajectories, shape.L), generator=g, device=device)
            if tokens is None
            else tokens(g)
        )
        return Inputs(
            {
                "hidden": normal(
                    *trajectories, shape.L, shape.d, scale=1.0, kind=dtype
                ).requires_grad_(),
                "weight": normal(shape.V, shape.d, scale=shape.d**-0.5, kind=dtype).requires_grad_(
                    trained
                ),
                "tokens": drawn,
                "log_reward": normal(*trajectories, scale=2.0),
                "log_z": normal(shape.B, scale=2.0).requires_grad_(),
            },
            normal(*trajectories, shape.L, scale=1.0) if upstream else None,
        )

    return make


@dataclass(frozen=True)
class Catalogue:
    """Distinct identifiers as tokens of the head, and where they come from."""

    tokens: np.ndarray  # int64 [items, L], sorted
    source: str
    _device: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def draw(self, shape: LossShape, device: torch.device) -> Callable[[torch.Generator], Tensor]:
        """Trajectories [B, N, L]: items drawn uniformly."""
        if device not in self._device:
            self._device[device] = torch.from_numpy(self.tokens).to(device)
        items = self._device[device]

        def tokens(g: torch.Generator) -> Tensor:
            chosen = torch.randint(len(items), (shape.B, shape.N), generator=g, device=device)
            return items[chosen]

        return tokens


def catalogue(shape: LossShape) -> Catalogue:
    """Beauty's published identifiers as tokens of this head, or random ones of the same shape.

    Taken from ``$GFLOWGR_DATA/Beauty``, else from ``shared/data/Beauty`` beside the source tree.
    Level l's code c is token ``V - 256 L + 256 l + c``. With another L than 4 they are random.
    """
    given = os.environ.get("GFLOWGR_DATA")
    root = Path(given) if given else Path(__file__).resolve().parents[3] / "shared" / "data"
    if shape.L == 4 and (root / "Beauty" / "inter.json.gz").is_file():
        codes = _published_codes(root / "Beauty")
        source = "Beauty's published identifiers"
    else:
        codes = _random_codes(shape.L)
        source = "random identifiers with as many prefixes per level as Beauty's"
    distinct = np.unique(np.asarray(codes, np.int64), axis=0)
    tokens = distinct + shape.first_code + CODES * np.arange(shape.L)
    return Catalogue(tokens, f"{source}: {len(tokens):,} of {shape.L} tokens")


@functools.cache
def _published_codes(folder: Path) -> np.ndarray:
    from gflowgr.data import load_dataset

    return load_dataset(folder).identifiers("letter_official").codes


@functools.cache
def _random_codes(length: int) -> np.ndarray:
    """Level by level, every prefix gets a child, and the rest go to random prefixes."""
    rng = np.random.default_rng(0)
    prefixes = np.zeros((1, 0), np.int64)
    for level in range(length):
        wanted = _BEAUTY_PREFIXES[min(level, len(_BEAUTY_PREFIXES) - 1)]
        parent = np.repeat(np.arange(len(prefixes)), CODES)
        code = np.tile(np.arange(CODES), len(prefixes))
        order = rng.permutation(len(parent))
        # The first child of each prefix in random order, then any others.
        _, first = np.unique(parent[order], return_index=True)
        others = np.delete(order, first)
        chosen = np.concatenate([order[first], others[: max(wanted - len(first), 0)]])
        prefixes = np.column_stack([prefixes[parent[chosen]], code[chosen]])
    return prefixes
