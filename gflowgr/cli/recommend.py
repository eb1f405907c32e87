"""``gflowgr recommend``: items for users and histories."""

from __future__ import annotations

import argparse
import os
import sys

from ._parsers import Commands, add_model_and_data, command

__all__ = ["add_recommend"]


_EPILOG = """\
requests (--input) are JSON lines, or the rows of a .parquet file, with "user" or "history":
  {"user": "17"}                            a user of the dataset, with the whole sequence
  {"history": [3, 14, 15]}                  items, oldest first
  {"user": "new", "history": [3, 14, 15]}   the same; "user" is only handed through
answers, in the order of the requests ("row" is the request's line or row, from 1):
  {"row": 1, "user": "17", "items": [9, 2, 6], "scores": [-1.7, -2.1, -2.2]}
Users and items are named by their ids in the source of the data, such as "B00A"; in a dataset
without ids (item_ids.json.gz) items are numbers.
A bad request ends the run with exit code 2; those before it are answered on standard output.

examples:
  gflowgr recommend runs/a/gflowgr/model --data data --user 17
  gflowgr recommend runs/a/sasrec --data data --user 17     what it is compared with
  gflowgr recommend runs/a/gflowgr/model --data data --history 3,14,15 --top 5 --json
  gflowgr recommend runs/a/gflowgr/model --data data --input users.jsonl --output top.parquet
  gflowgr recommend runs/a/gflowgr/model --data data --input users.parquet --with-scores \\
      --available in_stock.txt --output top.jsonl
  produce | gflowgr recommend runs/a/gflowgr/model --data data --batch-size 1 | consume
  gflowgr recommend MODEL --data data --input users.parquet --output answers/
  gflowgr recommend MODEL --data data --input users/ --output /shared/answers/ --ray auto"""


def add_recommend(commands: Commands) -> None:
    """Declare ``gflowgr recommend``."""
    parser = command(commands, "recommend", "recommend items to users, or for histories", _EPILOG)
    add_model_and_data(parser)
    asked = parser.add_argument_group("who is asked for")
    asked.add_argument(
        "--user",
        action="append",
        default=[],
        metavar="ID",
        help="a user of the dataset; the whole sequence is the history (may be repeated)",
    )
    asked.add_argument(
        "--history",
        action="append",
        default=[],
        metavar="ITEMS",
        help="ids of items, oldest first, such as 3,14,15 (may be repeated)",
    )
    asked.add_argument(
        "--input",
        metavar="FILE",
        help="JSON lines or .parquet, or - for JSON lines from standard input, which is the "
        "default without --user and --history; read a batch at a time. For an --output folder also "
        "a folder of .parquet files",
    )
    search = parser.add_argument_group("what is recommended")
    search.add_argument(
        "-k", "--top", type=int, default=10, metavar="K", help="items per user (default: 10)"
    )
    search.add_argument(
        "--mask-seen",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave out the items of the history (default: yes)",
    )
    search.add_argument(
        "--available",
        metavar="FILE",
        help="the items that may be recommended, one id a line (default: all)",
    )
    search.add_argument(
        "--temperature", type=float, default=1.0, help="divides the logits (default: 1)"
    )
    search.add_argument(
        "--normalize",
        choices=("vocab", "level", "children"),
        help="tokens' probabilities are normalised over the vocabulary, the codebook of their "
        "position or the tree node's children (default: as the model was trained)",
    )
    search.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="users at a time (default: 64)"
    )
    written = parser.add_argument_group("what is written")
    written.add_argument(
        "--output",
        metavar="FILE",
        help=".jsonl or .parquet, written whole or not at all (default: standard output); or a "
        "folder, with a / at its end: a Parquet file for every --shard-rows requests, where the "
        "same command goes on after an interruption",
    )
    written.add_argument(
        "--shard-rows",
        type=int,
        default=10_000,
        metavar="R",
        help="for an --output folder: requests in a file of answers (default: 10000)",
    )
    written.add_argument(
        "--with-scores", action="store_true", help="log P of each item (SASRec: its score), too"
    )
    written.add_argument("--with-titles", action="store_true", help="title of each item, too")
    written.add_argument(
        "--json", action="store_true", help="for --user and --history: JSON lines, not a table"
    )
    written.add_argument("--no-progress", action="store_true", help="no progress, no users/s")
    cluster = parser.add_argument_group("on many machines, for an --output folder")
    cluster.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="answer on this Ray cluster, or auto: the one that this machine is in; model, data, "
        "input and output are at the same places on all its machines",
    )
    cluster.add_argument(
        "--threads", type=int, default=1, metavar="T", help="CPUs of each process (default: 1)"
    )
    cluster.add_argument(
        "--gpus",
        type=float,
        metavar="G",
        help="GPUs of each process, such as 0.5 (default: 1 if the cluster has any)",
    )
    parser.set_defaults(run=_recommend)


def _recommend(args: argparse.Namespace) -> int:
    from ..serving.answers import AnswerFields
    from ..serving.recommend import RecommendOptions, recommend_from_checkpoint
    from ..serving.shards import Cluster, recommend_in_shards

    options = RecommendOptions(
        top=args.top,
        beams=args.beams,
        mask_seen=args.mask_seen,
        available=args.available,
        temperature=args.temperature,
        normalize=args.normalize,
        batch_size=args.batch_size,
        fields=AnswerFields(scores=args.with_scores, titles=args.with_titles),
    )
    named = bool(args.user or args.history)
    if args.output is not None and (args.output.endswith("/") or os.path.isdir(args.output)):
        if named or args.input is None:
            raise ValueError("an --output folder takes its requests from --input, Parquet files")
        recommend_in_shards(
            args.model,
            args.data,
            options,
            source=args.input,
            folder=args.output,
            shard_rows=args.shard_rows,
            cluster=None if args.ray is None else Cluster(args.ray, args.threads, args.gpus),
            progress=not args.no_progress,
        )
        return 0
    if args.ray is not None:
        raise ValueError(
            f"--output must be a folder, with a / at its end, for --ray; got {args.output!r}"
        )
    source = args.input if named or args.input else "-"
    if source == "-" and sys.stdin.isatty():
        print("gflowgr: reading JSON lines from the terminal; Ctrl-D ends them", file=sys.stderr)
    recommend_from_checkpoint(
        args.model,
        args.data,
        options,
        users=args.user,
        histories=args.history,
        source=source,
        output=args.output,
        table=named and not args.json and args.output is None,
        progress=not args.no_progress,
    )
    return 0
