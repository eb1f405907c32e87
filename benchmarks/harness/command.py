"""The arguments of ``gflowgr bench``. Imported with the command line: imports nothing heavy."""

from __future__ import annotations

import argparse

SUMMARY = "time losses, decoding, training and the tree against PyTorch and other projects"

EPILOG = (
    "ops, by group:\n"
    "  head, logprobs     the joint loss, or log-probabilities, from hidden states; each also\n"
    "                     with a frozen head (head-frozen, logprobs-frozen)\n"
    "  children           the joint loss over a tree's children (children, children-frozen)\n"
    "  reductions         the losses from log-probabilities (tb, db, subtb, vargrad)\n"
    "  decode             beam, beam-hidden: one step of a beam search, from logits or from\n"
    "                     hidden states, against a CSR mask and transformers' constraint;\n"
    "                     search: a whole beam search against model.generate;\n"
    "                     score: log P of every item against a row per item\n"
    "  tree               the prefix tree: tree-build (bytes per item too), tree-walk,\n"
    "                     tree-available, tree-files (save, load, memory-map); CPU only\n"
    "  step               a training step of GFlowGR-TB against SFT and against a\n"
    "                     forward per trajectory, and what its parts take\n"
    "  train              SFT end to end against the plain transformers Trainer, and the\n"
    "                     cost of GFlowGR-TB\n\n"
    "shapes of the losses: letter, llm, tiger and losses (the reductions'), each with -gpu\n"
    "appended for a GPU's; others as BxNxLxdxV. Of the others:\n"
    "  beam:PROMPTSxBEAMSxVxITEMS            beam, beam-hidden\n"
    "  t5:PROMPTSxSOURCExBEAMSxITEMS         search; also gpt2: and qwen3:\n"
    "  score:PROMPTSxSOURCExITEMS            score\n"
    "  tree:ITEMS                            the ops of tree\n"
    "  train-t5:PROMPTSxSOURCExNxITEMS       step; also train-qwen3:\n"
    "  sft-small:PROMPTSxSTEPSxITEMS         train; also sft-tiger: (the reference sizes)\n"
    "Numbers may end in k or m. Of the ops asked for, those run that a given shape fits.\n\n"
    "examples:\n"
    "  gflowgr bench --threads 2 --out results\n"
    "  gflowgr bench head children --shapes letter 64x4x4x256x50000 --dtype bfloat16\n"
    "  gflowgr bench reductions --peers none --no-memory\n"
    "  gflowgr bench decode --shapes beam:64x20x33124x12101 t5:8x60x20x12101\n"
    "  gflowgr bench tree --shapes tree:10m tree:100m\n\n"
    "Every variant is compared with a reference first (float64 where it computes); one that is\n"
    "wrong is not timed, and the exit code is 1 if it is ours. benchmarks/README.md says how to\n"
    "read the tables."
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
        help="float32, bfloat16, float16 (default: float32 bfloat16); of the losses from hidden "
        "states, the rest is float32",
    )
    parser.add_argument(
        "--shapes", nargs="+", default=[], metavar="SHAPE", help="default: each op's named ones"
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="NAME",
        help="torch, compile, linear_cross_entropy, cut-cross-entropy, liger, trl, csr, "
        "transformers, or none (default: all that are installed)",
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
    from benchmarks.harness.running import Settings, run_benchmarks

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
