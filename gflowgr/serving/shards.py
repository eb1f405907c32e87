"""Answers to many requests as a folder of Parquet files, in this process or on a Ray cluster.

The requests, rows of Parquet files, are divided into shards; each is answered into a file of its
own, which is there whole or not at all. So whoever does a shard again, after a killed process, a
lost machine or an interruption, loses no answer and repeats none, and a shard that is there is
never done again. What moves between machines are descriptions of shards and numbers of users.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import files
from ..errors import DataError, GFlowGRError, shown
from ..folders import MANIFEST_NAME, output_lock
from ..progress import progress_bar
from ..ray_cluster import ClusterWorker, caller_facts, connected, gpus_of_cluster, room_in_cluster
from .answers import open_answers
from .load import check_counts, model_in
from .queries import parquet_rows
from .recommend import Answerer, RecommendOptions, throughput

__all__ = ["Cluster", "Shard", "ShardAnswerer", "plan_shards", "recommend_in_shards"]

_REQUEST = "_request.json"  # readers of Parquet folders pass over names with an underscore
_DONE = "_SUCCESS"


@dataclass(frozen=True)
class Shard:
    """Some rows of a file of requests.

    Attributes:
        source: the file.
        first: its first row, from 0.
        rows: how many.
        name: of the file of answers.
    """

    source: str
    first: int
    rows: int
    name: str


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and what a process there demands.

    Attributes:
        address: ``HOST:PORT``, or ``"auto"``.
        threads: CPUs.
        gpus: GPUs; None: one, if the cluster has any.
    """

    address: str
    threads: int = 1
    gpus: float | None = None

    def __post_init__(self) -> None:
        check_counts({"--threads": self.threads})
        if self.gpus is not None and not 0 <= self.gpus < float("inf"):
            raise ValueError(f"--gpus must be >= 0 and finite; got {self.gpus}")


def plan_shards(source: str, rows: int) -> list[Shard]:
    """Divide the rows of a Parquet file, or of all ``*.parquet`` of a folder, into shards.

    Args:
        source: the file or folder.
        rows: of a shard; the last one of each file may have fewer.

    Raises:
        DataError: there is no such file, or it is not readable.
    """
    check_counts({"--shard-rows": rows})
    path = Path(source)
    sources = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not sources or any(each.suffix != ".parquet" for each in sources):
        raise DataError(
            f"--input must be a .parquet file or a folder with some, for an --output folder; got "
            f"{shown(source)}"
        )
    return [
        Shard(str(each), first, min(rows, total - first), f"{each.stem}-{number:05}.parquet")
        for each in sources
        for total in [parquet_rows(str(each))]
        for number, first in enumerate(range(0, total, rows))
    ]


class ShardAnswerer:
    """Answers shards into a folder, in whatever process it is made."""

    def __init__(
        self, model_folder: str, data_folder: str, options: RecommendOptions, folder: str
    ) -> None:
        """Load model and data once; the tree is memory-mapped, so that processes share it."""
        self._answerer = Answerer(model_folder, data_folder, options)
        self._fields, self._folder = options.fields, Path(folder)

    def __call__(self, shard: Shard) -> int:
        """Write the file of a shard's answers; returns how many there are.

        Raises:
            DataError: a row is no request; the message names it.
        """
        answerer = self._answerer
        queries = answerer.reader.from_rows(shard.source, shard.first, shard.rows)
        output = str(self._folder / shard.name)
        with open_answers(output, answerer.dataset, self._fields, table=False) as write:
            return sum(answerer.answer(queries, write))


def recommend_in_shards(
    model_folder: str,
    data_folder: str,
    options: RecommendOptions,
    *,
    source: str,
    folder: str,
    shard_rows: int = 10_000,
    cluster: Cluster | None = None,
    progress: bool = True,
) -> None:
    """Write the best items for all rows of Parquet files into a folder, or go on with it.

    Args:
        model_folder: a saved model, the folder of a run, or a collaborative model.
        data_folder: the dataset.
        options: how to recommend.
        source: a Parquet file of requests, or a folder of them.
        folder: ``STEM-00000.parquet`` and so on for each file of requests; ``row`` is that of the
            file, from 1. ``_SUCCESS`` is written last of all.
        shard_rows: requests in a file of answers.
        cluster: where to work; None: in this process.
        progress: show users on standard error, and in the end a line with the users per second.

    Raises:
        DataError: a row is no request; the shards that were answered stay.
        GFlowGRError: the same, or what else is bad input, said by a process of the cluster.
        OutputError: the folder cannot be written, or another one writes there.
        ValueError: an option is out of range, or the folder has answers to another request.
    """
    shards = plan_shards(source, shard_rows)
    out = Path(folder).resolve()
    with output_lock(out):
        _check_same_request(out, _request(model_folder, data_folder, options, shards, shard_rows))
        for left in out.glob(".*.tmp.parquet"):  # of a process that was killed
            left.unlink()
        to_do = [shard for shard in shards if not (out / shard.name).is_file()]
        total, rows = (sum(shard.rows for shard in each) for each in (shards, to_do))
        begin = time.perf_counter()
        bar = progress_bar(
            total=total, initial=total - rows, unit="user", smoothing=0.0, disable=not progress
        )
        arguments = (model_folder, data_folder, options, str(out))
        work = _here(to_do, arguments) if cluster is None else _there(to_do, arguments, cluster)
        with bar:
            for users in work:
                bar.update(users)
        files.write_json(out / _DONE, {"users": total, "shards": len(shards)})
    if progress:
        there = f"; {len(shards) - len(to_do)} of {len(shards)} files were there"
        line = throughput(rows, time.perf_counter() - begin)
        print(f"gflowgr: {line}{there if len(to_do) < len(shards) else ''}", file=sys.stderr)


def _here(shards: Sequence[Shard], arguments: tuple[Any, ...]) -> Iterator[int]:
    if shards:
        yield from map(ShardAnswerer(*arguments), shards)


def _there(shards: Sequence[Shard], arguments: tuple[Any, ...], cluster: Cluster) -> Iterator[int]:
    """The same by the actors of a cluster, each of which loads the model once."""
    if not shards:
        return
    import ray.data

    model_folder, data_folder, options, out = arguments
    places = (str(Path(model_folder).resolve()), str(Path(data_folder).resolve()))
    if options.available is not None:
        options = replace(options, available=str(Path(options.available).resolve()))
    with connected(cluster.address):
        # There is a bar of users; what goes wrong is still said.
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        gpus = min(1.0, gpus_of_cluster()) if cluster.gpus is None else cluster.gpus
        room = min(len(shards), room_in_cluster(cluster.threads, gpus))
        rows = [asdict(shard) | {"source": str(Path(shard.source).resolve())} for shard in shards]
        answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            ClusterWorker,
            fn_constructor_args=(
                caller_facts(),
                __name__,
                "make_actor",
                (*places, options, out),
            ),
            batch_size=1,
            num_cpus=cluster.threads,
            num_gpus=gpus,
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                initial_size=room,
                max_size=len(shards),  # machines that come later take part
                max_tasks_in_flight_per_actor=2,
            ),
        )
        for row in answered.iter_rows():
            if row["error"]:
                raise GFlowGRError(row["error"])
            yield int(row["users"])


def make_actor(*arguments: Any) -> Any:
    """What an actor does with a batch of Ray Data: the columns of shards in, of results out."""

    @functools.cache
    def answerer() -> ShardAnswerer:
        return ShardAnswerer(*arguments)

    def work(batch: dict[str, Any]) -> dict[str, list[Any]]:
        results: dict[str, list[Any]] = {"users": [], "error": []}
        for source, first, rows, name in zip(
            *(batch[column] for column in ("source", "first", "rows", "name")), strict=True
        ):
            users, error = 0, ""
            try:
                users = answerer()(Shard(str(source), int(first), int(rows), str(name)))
            except (GFlowGRError, OSError, ValueError) as bad:
                # As on the command line: bad input, which another process has, too.
                error = str(bad)
            results["users"].append(users)
            results["error"].append(error)
        return results

    return work


# ---- whose answers a folder has ----


def _request(
    model_folder: str,
    data_folder: str,
    options: RecommendOptions,
    shards: Sequence[Shard],
    shard_rows: int,
) -> dict[str, Any]:
    """What answers depend on, JSON-ready and without places: files by names and contents."""
    chosen = asdict(options)
    del chosen["batch_size"]
    if options.available is not None:
        chosen["available"] = _digest(files.regular_file(options.available).read_bytes())
    sources = dict.fromkeys(shard.source for shard in shards)
    return {
        "model": _folder_digest(model_in(Path(model_folder))),
        "data": _folder_digest(Path(data_folder)),
        "options": chosen,
        "input": {Path(source).name: _footer_digest(Path(source)) for source in sources},
        "shard_rows": shard_rows,
    }


def _check_same_request(out: Path, wanted: dict[str, Any]) -> None:
    """Record the request, or check that the answers that are there are to the same."""
    path = out / _REQUEST
    if not path.is_file():
        files.write_json(path, wanted)
        return
    found = files.read_json(path, dict)
    changed = [name for name, value in wanted.items() if found.get(name) != value]
    if changed:
        raise ValueError(
            f"--output {out} must be empty, or have answers to the same request; got some with "
            f"another {', another '.join(changed)}"
        )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _footer_digest(path: Path) -> str:
    """Of a Parquet file's size and footer, which has the place, size and range of every column."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - 8 - length))
        return _digest(b"%d " % size + file.read())


def _folder_digest(folder: Path) -> str:
    """Of the names and sizes of a folder's files, and of its manifest if it has one."""
    names = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    manifest = folder / MANIFEST_NAME
    content = manifest.read_bytes() if manifest.is_file() else b""
    return _digest(repr([(path.name, path.stat().st_size) for path in names]).encode() + content)
