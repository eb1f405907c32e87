"""``python -m benchmarks OP ...``: times and memory of the ops, from a checkout."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

_DESCRIPTION = """\
Time the ops, searches and trainings against plain PyTorch and other projects, and count memory."""

_SHAPES = """\
An op stands for all of its tables. Shapes are written as above; the losses and log-probabilities
have BxNxLxdxV (prompts, trajectories, tokens, width, vocabulary), or a name: letter, llm, tiger,
losses (flow_loss's), each with -gpu appended for a GPU's. Numbers may end in k or m. Of the tables
asked for, those run that a given shape fits.

examples:
  python -m benchmarks --threads 2 --out results
  python -m benchmarks logprobs_dense.fused --shapes letter 64x4x4x256x50000 --dtype bfloat16
  python -m benchmarks flow_loss --peers none --no-memory
  python -m benchmarks beam_step search --shapes beam_step:64x20x33124x12101 search-t5:8x60x20x12101
  python -m benchmarks tree --shapes tree:10m tree:100m
  python -m benchmarks serve --help     # servers under load, which have options of their own

Every variant is compared with a reference first (float64 where it computes); one that is wrong is
not timed, and the exit code is 1 if it is ours. benchmarks/README.md says how to read the tables.
Exit codes: 0 done, 1 an implementation of ours is wrong, 2 wrong usage, 130 interrupted."""


class _Parser(argparse.ArgumentParser):
    """Lists the ops in its help: only then are all of them imported."""

    def format_help(self) -> str:
        """The help with every op, its tables and its shapes."""
        from benchmarks.harness.registry import describe_ops

        self.epilog = f"ops:\n{describe_ops()}\n\n{_SHAPES}"
        return super().format_help()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    # Quiet libraries, and no network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if words[:1] == ["serve"]:
            from benchmarks.serve import main as serve

            return serve(words[1:])
        return _run(_parser().parse_args(words))
    except (OSError, ValueError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbenchmarks: interrupted; --out has the cases that are done", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m benchmarks",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help="an op or one of its tables (default: all)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add(
        "--dtype",
        nargs="+",
        default=["float32", "bfloat16"],
        metavar="NAME",
        help="float32, bfloat16, float16 (default: float32 bfloat16), of the log-probabilities; "
        "the rest is float32",
    )
    add("--shapes", nargs="+", default=[], metavar="SHAPE", help="default: each table's own")
    add(
        "--peers",
        nargs="+",
        metavar="NAME",
        help="torch, compile, linear_cross_entropy, cut-cross-entropy, liger, trl, csr, "
        "transformers, or none (default: all that are installed)",
    )
    add("--threads", type=int, metavar="N", help="CPU threads")
    add("--repeats", type=int, default=7, metavar="N", help="samples (default: %(default)s)")
    add(
        "--seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="leave a variant alone after S seconds and two samples (default: %(default)g)",
    )
    add(
        "--no-memory",
        action="store_true",
        help="do not count memory (on a CPU it takes a process per variant)",
    )
    add("--out", metavar="FOLDER", help="write JSON, CSV, Markdown and plots there")
    add("--no-progress", action="store_true", help="no line of progress")
    return parser


if __name__ == "__main__":
    sys.exit(main())
