"""``gflowgr export``: a saved model as programs of tensors, for other runtimes."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._parsers import Commands, command

__all__ = ["add_export"]

_EPILOG = """\
needs for --onnx: pip install gflowgr[onnx]

examples:
  gflowgr export runs/a/gflowgr/model --torch-export --out exported
  gflowgr export runs/a/gflowgr/model --onnx --out exported

Written: prompt and step (.pt2 or .onnx), and export.json, which names their inputs and outputs.
A TIGER and a decoder can be exported; an LLM goes to other servers as it is saved."""


def add_export(commands: Commands) -> None:
    """Declare ``gflowgr export``."""
    parser = command(commands, "export", "write a model as torch.export or ONNX programs", _EPILOG)
    parser.add_argument(
        "model", metavar="MODEL", help="a saved model, such as RUN/gflowgr/model, or a run"
    )
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument(
        "--torch-export",
        dest="form",
        action="store_const",
        const="torch-export",
        help="prompt.pt2 and step.pt2, for torch.export.load",
    )
    form.add_argument(
        "--onnx",
        dest="form",
        action="store_const",
        const="onnx",
        help="prompt.onnx and step.onnx",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where they go")
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from ..models.exported import export_model
    from ..serving.load import model_in

    export_model(model_in(Path(args.model)), Path(args.out), args.form)
    print(f"written to {args.out}")
    return 0
