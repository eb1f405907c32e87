"""The cells of an experiment: pieces of work that each leave one folder, and what they need."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from .. import files
from .config import ConfigError
from .spec import ExperimentSpec, Method, Track

__all__ = ["BUSY", "Cell", "alone", "cells_of", "check_claims", "claim", "locked"]

BUSY = 75
"""Exit status of a process whose cell is being worked on elsewhere."""

_CLAIM = "cell.json"
_OF_START = ("seed", "data", "collaborative", "model", "sft", "evaluation")
_MADE_FROM = {
    "collaborative": ("seed", "data", "collaborative", "evaluation"),
    "sft": _OF_START,
    "method": (*_OF_START, "flow", "finetune"),
}


@dataclass(frozen=True)
class Cell:
    """One piece of work.

    Attributes:
        stage: ``"collaborative"``: train and evaluate the collaborative model, and popularity;
            ``"sft"``: the supervised start; ``"method"``: a fine-tuning from there.
        track: dataset, seed and identifiers.
        method: of a fine-tuning.
    """

    stage: str
    track: Track
    method: Method | None = None

    @property
    def id(self) -> str:
        """Its folder, under the experiment's."""
        if self.stage == "collaborative":
            return f"{self.track.seed_folder}/collaborative"
        return f"{self.track.folder}/{'sft' if self.method is None else self.method.slug}"

    def is_complete(self, out: Path) -> bool:
        """Whether the last of its files is there."""
        evaluation = out / self.id / "evaluation"
        if self.stage == "collaborative":
            evaluation /= "popularity"
        return (evaluation / "analysis.json").is_file()

    @property
    def needs(self) -> tuple[str, ...]:
        """Ids of the cells that must be done before."""
        collaborative = Cell("collaborative", self.track).id
        return {
            "collaborative": (),
            "sft": (collaborative,),
            "method": (collaborative, Cell("sft", self.track).id),
        }[self.stage]

    @property
    def label(self) -> str:
        """For the screen."""
        return "SFT" if self.stage == "sft" else self.method.name if self.method else "SASRec"

    def made_from(self, spec: ExperimentSpec) -> dict[str, Any]:
        """The values that its results depend on, JSON-ready, without places on this machine."""
        config = spec.config(self.track, self.method).to_dict()
        values = {name: config[name] for name in _MADE_FROM[self.stage]}
        if self.stage == "sft":
            values["normalize"] = config["flow"]["normalize"]
        for section, key in (("data", "path"), ("collaborative", "embeddings"), ("model", "path")):
            if section in values and values[section].get(key) is not None:
                values[section][key] = Path(values[section][key]).name
        if self.stage == "collaborative":
            del values["data"]["identifiers"]
        made: dict[str, Any] = json.loads(json.dumps(values))  # tuples as they are read
        return made


def cells_of(spec: ExperimentSpec) -> list[Cell]:
    """All cells, in an order in which each comes after those that it needs."""
    cells: dict[str, Cell] = {}
    for track in spec.tracks:
        methods = [Cell("method", track, method) for method in spec.methods]
        for cell in (Cell("collaborative", track), Cell("sft", track), *methods):
            cells.setdefault(cell.id, cell)
    return list(cells.values())


def claim(cell: Cell, spec: ExperimentSpec, out: Path) -> None:
    """Record what the cell's folder is made from."""
    files.write_json(out / cell.id / _CLAIM, cell.made_from(spec))


def check_claims(spec: ExperimentSpec, cells: list[Cell], out: Path) -> None:
    """Check that what is there was made from the same values.

    Raises:
        ConfigError: it was not; the message names the values, and the folders to delete.
    """
    stale, changed = [], dict[str, str]()
    for cell in cells:
        path = out / cell.id / _CLAIM
        if not path.is_file():
            continue
        found, wanted = files.read_json(path, expect=dict), cell.made_from(spec)
        if found != wanted:
            stale.append(cell.id)
            changed |= _differences(found, wanted)
    if stale:
        shown = ", ".join(stale[:5]) + (f" and {len(stale) - 5} more" if len(stale) > 5 else "")
        raise ConfigError(
            f"{out} holds results of other values ({'; '.join(changed.values())}). Choose another "
            f"output folder, or delete these in it: {shown}"
        )


def _differences(found: Any, wanted: Any, key: str = "") -> dict[str, str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        parts: dict[str, str] = {}
        for name in found | wanted:
            inner = f"{key}.{name}" if key else name
            parts |= _differences(found.get(name), wanted.get(name), inner)
        return parts
    return {} if found == wanted else {key: f"{key}: {found!r} there, {wanted!r} here"}


@contextlib.contextmanager
def locked(cell: Cell, out: Path) -> Iterator[bool]:
    """Whether the cell is this process's to work on; the lock goes with the process.

    Machines that share the folder see each other's locks, if its file system has them (NFS 4 has).
    """
    with _lock_file(out, cell.id) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextlib.contextmanager
def alone(folder: str, out: Path) -> Iterator[None]:
    """Wait until no other process is in such a block of the same folder: one prepares, all read."""
    with _lock_file(out, folder) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock_file(out: Path, name: str) -> TextIO:
    # No folder's name has a %, so that different folders have different locks.
    path = out / ".locks" / name.replace("/", "%")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a")
