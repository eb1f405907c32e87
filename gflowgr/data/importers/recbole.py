"""RecBole's atomic files: ``NAME.inter`` and ``NAME.item``, tab-separated with typed headers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gflowgr.data.dataset import Dataset
from gflowgr.data.importers.build import ImportReport
from gflowgr.data.importers.frames import TextForm, column_names, table_files
from gflowgr.data.importers.table import import_table
from gflowgr.errors import DataError


def import_recbole(
    interactions: str | Path,
    metadata: str | Path | None = None,
    *,
    user: str = "user_id",
    item: str = "item_id",
    time: str = "timestamp",
    behaviour: str | None = None,
    value: str | None = None,
    side_behaviours: Sequence[str] = (),
    k_core: int = 5,
    duplicates: str = "all",
    max_bad_fraction: float = 0.01,
    name: str | None = None,
) -> tuple[Dataset, ImportReport]:
    """Read RecBole's atomic files, whose header names and types columns (``user_id:token``).

    Args:
        interactions: the ``.inter`` file, or the folder with exactly one of them (then its
            ``.item`` file is found there as well).
        metadata: the ``.item`` file; all its columns but ``item`` become texts.
        user, item, time: names of the columns, without their types. Times are numbers (any one
            unit; fractions are cut).
        behaviour: column of the behaviour's name, if any.
        value: column of a number that becomes ``ratings``; default: "rating" where there is one.
        side_behaviours: behaviours that are no events of the sequence, e.g. ("cart", "impression").
        k_core: keep users and items with at least this many events, iterated; 1 keeps all.
        duplicates: "all", "first" or "last" event of a user with an item.
        max_bad_fraction: more bad rows than this share is an error.
        name: of the data set; default: the file's name.

    Raises:
        FileNotFoundError, ValueError: wrong arguments.
        DataError: as :func:`import_table`, and a folder with several ``.inter`` files.
    """
    path = Path(interactions)
    if path.is_dir():
        folder = path
        path = _only(folder, "inter")
        if metadata is None and list(folder.glob("*.item")):
            metadata = _only(folder, "item")
    files = table_files(path)
    if value is None and "rating" in column_names(files[0][0], TextForm()):
        value = "rating"
    return import_table(
        path,
        metadata,
        user=user,
        item=item,
        time=time,
        behaviour=behaviour,
        value=value,
        side_behaviours=side_behaviours,
        k_core=k_core,
        duplicates=duplicates,
        max_bad_fraction=max_bad_fraction,
        name=name,
    )


def _only(folder: Path, suffix: str) -> Path:
    found = sorted(folder.glob(f"*.{suffix}"))
    if not found:
        raise FileNotFoundError(f"{folder}: there is no .{suffix} file")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: must hold one .{suffix} file; got {names}: name the one meant")
    return found[0]
