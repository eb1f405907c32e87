"""A tiny shop on disk with two models of it, served, and identifiers that no item of it has."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np

from gflowgr.data import save_dataset
from gflowgr.serving.service import Service
from support.tiny_shop import make_model, shop


def write_folders(root: Path) -> dict[str, str]:
    """The dataset ``data``, and two models of it, of other weights, ``model0`` and ``model1``."""
    save_dataset(replace(shop().dataset, indexes={}), root / "data")
    for seed in (0, 1):
        make_model(objective="sft", seed=seed).save_pretrained(root / f"model{seed}")
    return {name: str(root / name) for name in ("data", "model0", "model1")}


def serve(folders: dict[str, str], state: Path) -> Service:
    return Service(folders["model0"], folders["data"], str(state), num_beams=8)


@functools.cache
def free_identifiers() -> list[tuple[int, ...]]:
    """Identifiers that no item has: other last codes under prefixes that there are."""
    model = make_model(objective="sft")
    vocabulary = model.vocabulary
    codes = (model.item_tokens().numpy() - np.array(vocabulary.level_offsets)).tolist()
    taken = set(map(tuple, codes))
    return [
        (*prefix, last)
        for prefix in sorted({tuple(row[:-1]) for row in codes})
        for last in range(vocabulary.codebook_sizes[-1])
        if (*prefix, last) not in taken
    ]
