"""Recommendations of a saved model, for any number of users in bounded memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..collaborative import is_collaborative
from ..data import Dataset
from ..errors import DataError
from ..evaluation import Recommender, ScoringRecommender
from ..evaluation.generative import GenerativeRecommender
from ..files import regular_file
from ..models.settings import Normalize
from .answers import Answer, AnswerFields, AnswerWriter, check_output, open_answers
from .load import check_counts, load_collaborative_for, load_for
from .queries import Query, QueryReader, parquet_rows, read_available

__all__ = ["Answerer", "RecommendOptions", "recommend_from_checkpoint", "throughput"]


@dataclass(frozen=True)
class RecommendOptions:
    """How to recommend.

    Attributes:
        top: items for each user.
        beams: beams of the search; at least ``top`` are used.
        mask_seen: whether a user's history is left out.
        available: text file with the ids of the items that may be recommended; None for all.
        temperature: divides the logits.
        normalize: over what token probabilities are normalised; None for the model's own setting.
        batch_size: users that are searched for together.
        fields: what a record holds.
    """

    top: int = 10
    beams: int = 20
    mask_seen: bool = True
    available: str | None = None
    temperature: float = 1.0
    normalize: Normalize | None = None
    batch_size: int = 64
    fields: AnswerFields = field(default_factory=AnswerFields)

    def __post_init__(self) -> None:
        check_counts({"--top": self.top, "--beams": self.beams, "--batch-size": self.batch_size})
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"--temperature must be above 0 and finite; got {self.temperature}")


class Answerer:
    """A model with its data, which answers queries: the one way, for one process and for many.

    Attributes:
        dataset: names the items.
        reader: makes queries of requests.
        score: what the scores are called.
    """

    def __init__(self, model_folder: str, data_folder: str, options: RecommendOptions) -> None:
        """Load what answers; see :func:`recommend_from_checkpoint`."""
        self._options = options
        self._recommender, self.dataset = _recommender(model_folder, data_folder, options)
        self.reader = QueryReader(self.dataset)
        self.score = "log P" if isinstance(self._recommender, GenerativeRecommender) else "score"

    def answer(self, queries: Iterable[Query], write: AnswerWriter) -> Iterator[int]:
        """Answer queries batch by batch; yields how many each batch had, when they are written."""
        for batch in _batches(queries, self._options.batch_size):
            past = [query.history for query in batch]
            seen = past if self._options.mask_seen else None
            found = self._recommender.recommend(past, self._options.top, seen)
            write(
                [
                    Answer(query, items[items >= 0], scores[items >= 0])
                    for query, items, scores in zip(batch, *found, strict=True)
                ]
            )
            yield len(batch)


def recommend_from_checkpoint(
    model_folder: str,
    data_folder: str,
    options: RecommendOptions,
    *,
    users: Sequence[str] = (),
    histories: Sequence[str] = (),
    source: str | None = None,
    output: str | None = None,
    table: bool = False,
    progress: bool = True,
) -> None:
    """Write the best items of users and histories, batch by batch as they are found.

    Args:
        model_folder: a saved model, the folder of a run, or a collaborative model (RUN/sasrec).
        data_folder: the dataset.
        options: how to recommend.
        users: users of the dataset.
        histories: ids of items, such as ``3,14,15``; one with a comma stands in double quotes.
        source: instead of both, a file of requests (:meth:`QueryReader.from_file`); one batch of it
            is held at a time.
        output: file for the answers, written whole or not at all; None for standard output.
        table: on standard output, a table for people instead of JSON lines.
        progress: show the progress on standard error when that is a terminal, and in the end a line
            with the users per second.

    Raises:
        DataError: a request names what is not there. The answers to the requests before it have
            been written to standard output.
        ValueError: an option is out of range, or ``source`` comes with users or histories.
    """
    if (source is None) == (not users and not histories):
        raise ValueError("give either --input, or users by --user and --history")
    if output is not None:
        check_output(output)
    rows = len(users) + len(histories) if source is None else None
    if source is not None and source.endswith(".parquet"):
        rows = parquet_rows(source)  # opened before the model is: a wrong name is found at once
    elif source not in (None, "-"):
        with regular_file(source).open("rb"):
            pass
    answerer = Answerer(model_folder, data_folder, options)
    reader = answerer.reader
    queries: Iterable[Query] = (
        reader.from_arguments(users, histories) if source is None else reader.from_file(source)
    )
    fields, dataset, score = options.fields, answerer.dataset, answerer.score
    with (
        open_answers(output, dataset, fields, table=table, score=score) as write,
        _Progress(rows, bar=progress and (output is not None or not sys.stdout.isatty())) as bar,
    ):
        for count in answerer.answer(queries, write):
            bar.advance(count)
    if progress and not table:
        print(f"gflowgr: {bar.summary()}", file=sys.stderr)


def _recommender(
    model_folder: str, data_folder: str, options: RecommendOptions
) -> tuple[Recommender, Dataset]:
    """A saved generator, or a collaborative model with what there is to choose for one."""
    if is_collaborative(model_folder):
        if options.normalize is not None or options.temperature != 1.0:
            raise ValueError(
                "--normalize and --temperature must be left out for a collaborative model, whose "
                f"scores are no probabilities of tokens; {model_folder} is one"
            )
        scorer, dataset = load_collaborative_for(model_folder, data_folder)
        available = _available(options, dataset)
        return ScoringRecommender(Path(model_folder).name, scorer, available=available), dataset
    model, dataset = load_for(model_folder, data_folder)
    generator = GenerativeRecommender(
        model,
        num_beams=options.beams,
        normalize=options.normalize,
        temperature=options.temperature,
        available=_available(options, dataset),
    )
    return generator, dataset


def _available(options: RecommendOptions, dataset: Dataset) -> torch.Tensor | None:
    if options.available is None:
        return None
    return torch.from_numpy(read_available(options.available, dataset))


def _batches(queries: Iterable[Query], size: int) -> Iterator[list[Query]]:
    """Batches of queries; those before a bad one are handed out before its error is raised."""
    batch: list[Query] = []
    bad: DataError | None = None
    source = iter(queries)
    while bad is None:
        try:
            query = next(source, None)
        except DataError as error:
            bad, query = error, None
        if query is not None:
            batch.append(query)
        if batch and (query is None or len(batch) == size):
            yield batch
            batch = []
        if query is None:
            break
    if bad is not None:
        raise bad


class _Progress:
    """Users done, and how many per second, on standard error where that is a terminal."""

    def __init__(self, total: int | None, *, bar: bool) -> None:
        from tqdm import tqdm

        self.users, self.begin = 0, time.perf_counter()
        shown = bar and sys.stderr.isatty()
        self._bar = tqdm(
            total=total, unit="user", disable=not shown, dynamic_ncols=True, leave=False
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, users: int) -> None:
        """Count ``users`` more."""
        self.users += users
        self._bar.update(users)

    def summary(self) -> str:
        """What was done, in a line."""
        return throughput(self.users, time.perf_counter() - self.begin)


def throughput(users: int, seconds: float) -> str:
    """How many users were answered in how long, in a line."""
    rate = users / max(seconds, 1e-9)
    return f"{users:,} users in {seconds:.1f} s ({rate:,.1f} users/s)"
