"""The arguments of ``gflowgr bench``. Imported with the command line: imports nothing heavy."""

from __future__ import annotations

import argparse

SUMMARY = "time the ops against plain PyTorch and the other projects that are installed"

EPILOG = (
    "ops:\n"
    "  head, logprobs     the joint loss, or log-probabilities, from hidden states; each also\n"
    "                     with a frozen head (head-frozen, logprobs-frozen)\n"
    "  tree               the joint loss over a tree's children (tree, tree-frozen)\n"
    "  reductions         the losses from log-probabilities (tb, db, subtb, vargrad)\n\n"
    "named shapes: letter, llm, tiger and losses (the reductions'), each with -gpu appended\n"
    "for a GPU's; others as BxNxLxdxV.\n\n"
    "examples:\n"
    "  gflowgr bench --threads 2 --out results\n"
    "  gflowgr bench head tree --shapes letter 64x4x4x256x50000 --dtype bfloat16\n"
    "  gflowgr bench reductions --peers none --no-memory\n\n"
    "Every variant is compared with float64 first; one that is wrong is not timed, and the\n"
    "exit code is 1 if it is ours. benchmarks/README.md says how to read the tables."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes, and what it runs."""
    parser.add_argument("ops", nargs="*", metavar="op", help="what to measure (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["float32", "bfloat16"],
        metavar="NAME",
        help="float32, bfloat16, float16 (default: float32 bfloat16; reductions: float32)",
    )
    parser.add_argument(
        "--shapes", nargs="+", default=[], metavar="SHAPE", help="default: each op's named ones"
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="NAME",
        help="torch, compile, linear_cross_entropy, cut-cross-entropy, liger, trl, or none "
        "(default: all that are installed)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument(
        "--repeats", type=int, default=7, metavar="N", help="samples (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="leave a variant alone after S seconds and two samples (default: %(default)g)",
    )
    parser.add_argument(
        "--no-memory",
        action="store_true",
        help="do not count memory (on a CPU it takes a process per variant)",
    )
    parser.add_argument("--out", metavar="FOLDER", help="write JSON, CSV, Markdown and plots there")
    parser.add_argument("--no-progress", action="store_true", help="no line of progress")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run it; the exit code is 1 if an implementation of ours is wrong."""
    from gflowgr.benchmarking.running import Settings, run_benchmarks

    settings = Settings.read(
        args.ops,
        device=args.device,
        dtypes=args.dtype,
        shapes=args.shapes,
        peers=args.peers,
        threads=args.threads,
        repeats=args.repeats,
        seconds=args.seconds,
        count_memory=not args.no_memory,
        out=args.out,
        progress=not args.no_progress,
    )
    rows = run_benchmarks(settings)
    return int(any(row.status in ("wrong", "failed") and not row.family for row in rows))
