"""The ``gflowgr`` command."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import GFlowGRError, missing_extra, shown
from ..files import find_lone_surrogate
from .commands import COMMANDS

__all__ = ["main"]

_EPILOG = """\
first steps:
  gflowgr quickstart                     the whole job on a built-in dataset, in minutes
  gflowgr quickstart --data FOLDER       the same on your data
  gflowgr train --config run.yaml        a run of your own (see examples/)
  gflowgr recommend RUN/gflowgr/model --data FOLDER --user 17

A run that was interrupted goes on when the same command is given again.
Exit codes: 0 done, 1 failed, 2 wrong usage or bad input, 130 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A title that the terminal's encoding lacks must not end the command.
            stream.reconfigure(errors="backslashreplace")
    for word in sys.argv[1:] if argv is None else argv:
        lone = find_lone_surrogate(word)
        if lone is not None:
            # Bytes that are not UTF-8: no file of results could hold them.
            parser.error(f"arguments must be UTF-8 text; got {shown(word)}")
    args = parser.parse_args(argv)
    try:
        _quiet_libraries()
        return int(args.run(args) or 0)
    except BrokenPipeError:
        # The reader (head, less) has enough. Nothing can be flushed to it at exit, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (GFlowGRError, OSError, ValueError) as error:
        # Bad input, with a message that says what to do; a traceback would only hide it.
        if args.debug:
            raise
        print(f"gflowgr: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        if missing is None or args.debug:
            raise
        print(f"gflowgr: error: {missing}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"gflowgr: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ngflowgr: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _quiet_libraries() -> None:
    """Keep libraries' chatter out of the output, and never touch the network unasked."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gflowgr",
        description="Fine-tune generative recommenders as GFlowNets (GFlowGR, arXiv 2506.16114).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gflowgr {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of bad input, too")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser
