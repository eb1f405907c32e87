"""Whose results an output folder holds: the same run goes on, another one is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..data import Dataset
from ..identifiers import Identifiers
from .config import ConfigError, RunConfig

__all__ = ["claim_configuration", "claim_data", "digest_of"]

_SFT = ("seed", "data", "collaborative", "model", "sft", "flow.normalize")
_FINETUNE = (*_SFT, "finetune")
# What each stage's folder was made from; a change elsewhere leaves it valid.
_MADE_FROM = {
    "data": ("seed", "data"),
    "sasrec": ("seed", "data", "collaborative"),
    "sft": _SFT,
    "sft_continued": _FINETUNE,
    "gflowgr": (*_FINETUNE, "flow"),
    "evaluation": (*_FINETUNE, "flow", "evaluation"),
}


def claim_configuration(output: Path, config: RunConfig) -> None:
    """Record the configuration, or check that the folder's stages were made from the same.

    Raises:
        ConfigError: a stage in the folder was made from other values; the message names them, and
            the folders to delete for a new start of just these stages.
    """
    path = output / "config.json"
    # Through JSON, so that tuples and lists compare equal to what is read.
    wanted: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    found: dict[str, Any] = files.read_json(path, expect=dict) if path.is_file() else wanted
    stale = []
    changed: dict[str, str] = {}
    for stage, keys in _MADE_FROM.items():
        if not (output / stage).is_dir():
            continue
        for key in keys:
            old, new = _value(found, key), _value(wanted, key)
            if old != new:
                changed[key] = f"{key}: {old!r} there, {new!r} here"
                if stage not in stale:
                    stale.append(stage)
    if stale:
        raise ConfigError(
            f"{output} holds a run of another configuration ({'; '.join(changed.values())}). "
            f"Choose another output folder, or delete these in it: {', '.join(stale)}"
        )
    if found != wanted or not path.is_file():
        files.write_json(path, wanted)


def claim_data(output: Path, digests: dict[str, str]) -> None:
    """Record the data's digests, or check that the folder's results are of the same data.

    Raises:
        ConfigError: the data or the identifiers have changed since the run began.
    """
    path = output / "digests.json"
    if not path.is_file():
        files.write_json(path, digests)
        return
    found: dict[str, Any] = files.read_json(path, expect=dict)
    changed = [name for name, digest in digests.items() if found.get(name, digest) != digest]
    if changed:
        raise ConfigError(
            f"{output} holds a run on other {' and '.join(changed)}: the files have changed since. "
            "Choose another output folder, or delete that one to start again."
        )
    if set(digests) - set(found):
        files.write_json(path, {**found, **digests})


def digest_of(source: Dataset | Identifiers) -> str:
    """SHA-256 of what training and evaluation read of a dataset, or of a set of identifiers."""
    parts: dict[str, np.ndarray | None]
    if isinstance(source, Dataset):
        parts = {"offsets": source.sequences.offsets, "items": source.sequences.values}
        parts |= {"behaviours": source.behaviours, "truth": source.truth}
        for name, rows in source.side.items():
            parts |= {f"{name} offsets": rows.offsets, f"{name} items": rows.values}
        head = f"{source.num_items} {source.behaviour_names}"
    else:
        parts, head = {"codes": source.codes}, ""
    digest = hashlib.sha256(head.encode())
    for name, array in parts.items():
        if array is not None:
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _value(config: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    value = config.get(section)
    return value.get(name) if name and isinstance(value, dict) else value
