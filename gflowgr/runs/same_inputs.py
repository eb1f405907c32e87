"""Refuse to resume a folder that was made from another configuration, or from other data.

Before a stage begins, the values that its result depends on are recorded in its folder
(``inputs.json``); a later call that would read the result, but with other values, is refused. So a
change names only the folders of the stages that it concerns, and what came before them stays valid.
Data are recorded by their digests (``digests.json``): files may change and keep their names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..data import Dataset
from ..identifiers import Identifiers
from .config import ConfigError

__all__ = ["check_same_data", "check_same_inputs", "digest_of", "record_inputs"]

_RECORD = "inputs.json"
_DIGESTS = "digests.json"
_SHOWN = 12


def record_inputs(folder: Path, values: Mapping[str, Any]) -> None:
    """Record what the result in ``folder`` is about to be made from, unless it is recorded.

    Args:
        folder: of a stage; created when missing.
        values: JSON-ready, by section of the configuration.
    """
    path = folder / _RECORD
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(path, values)


def check_same_inputs(out: Path, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that what is there was made from the same values.

    Args:
        out: the output folder.
        wanted: folder of a stage, under ``out``, to the values that it would be made from now.

    Raises:
        ConfigError: it was made from others; the message names them, and the folders to delete for
            a new start of just these stages.
    """
    stale: list[str] = []
    changed: dict[str, str] = {}
    for folder, values in wanted.items():
        path = out / folder / _RECORD
        if not path.is_file():
            continue
        # A setting that was not there when the record was made is the same where it is not used:
        # None, or a switch that is off.
        differences = _differences(files.read_json(path, expect=dict), values)
        if differences:
            changed |= differences
            if not any(folder.startswith(f"{above}{os.sep}") for above in stale):
                stale.append(folder)
    if stale:
        more = f" and {len(stale) - _SHOWN} more" if len(stale) > _SHOWN else ""
        raise ConfigError(
            f"{out} holds a run of another configuration ({'; '.join(changed.values())}). Choose "
            f"another output folder, or delete these in it: {', '.join(stale[:_SHOWN])}{more}"
        )


def _differences(found: Any, wanted: Any, key: str = "") -> dict[str, str]:
    """Key to a text that names the old and the new value, for every value that differs."""
    if isinstance(found, dict) and isinstance(wanted, Mapping):
        parts: dict[str, str] = {}
        for name in found | dict(wanted):
            inner = f"{key}.{name}" if key else name
            value = wanted.get(name)
            if name in found or value is not False:
                parts |= _differences(found.get(name), value, inner)
        return parts
    return {} if found == wanted else {key: f"{key}: {found!r} there, {wanted!r} here"}


def check_same_data(folder: Path, digests: dict[str, str]) -> None:
    """Record the data's digests in ``folder``, or check that its results are of the same data.

    Raises:
        ConfigError: the data or the identifiers have changed since the run began.
    """
    path = folder / _DIGESTS
    if not path.is_file():
        files.write_json(path, digests)
        return
    found: dict[str, Any] = files.read_json(path, expect=dict)
    changed = [name for name, digest in digests.items() if found.get(name, digest) != digest]
    if changed:
        raise ConfigError(
            f"{folder} holds a run on other {' and '.join(changed)}: the files have changed since. "
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
        if source.item_ids is not None:
            head += f" {list(source.item_ids)}"
    else:
        parts, head = {"codes": source.codes}, ""
    digest = hashlib.sha256(head.encode())
    for name, array in parts.items():
        if array is not None:
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
