"""``gflowgr serve``: a trained model answers over HTTP."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._parsers import Commands, add_model_and_data, command

__all__ = ["add_serve"]

_EPILOG = """\
needs: pip install gflowgr[serve]

examples:
  gflowgr serve runs/a/gflowgr/model --data data
  gflowgr serve runs/a/gflowgr/model --data data --beside runs/a/sft/model \\
      --collaborative runs/a/sasrec
  gflowgr serve runs/a/gflowgr/model --data data --host 0.0.0.0 --api-key-file key.txt

  curl -s localhost:8000/recommend --json '{"history": [3, 14, 15], "k": 5, "with_titles": true}'

http://localhost:8000/ is a page for people, /docs describes every endpoint. Changes of the
catalogue (POST /items, DELETE /items/ID, PUT /items/ID/availability, POST /model) are kept in
--state; a restart comes back with them."""


def add_serve(commands: Commands) -> None:
    """Declare ``gflowgr serve``."""
    parser = command(commands, "serve", "answer over HTTP, with a live catalogue", _EPILOG)
    add_model_and_data(parser)
    parser.add_argument(
        "--state",
        metavar="FOLDER",
        help="journal of the catalogue's changes; servers that share it are replicas of each "
        "other (default: MODEL-catalogue)",
    )
    parser.add_argument(
        "--index",
        metavar="FILE",
        help="index.NAME.json.gz that the model was trained with, made by gflowgr identifiers; "
        "new items may then come with a vector instead of an identifier",
    )
    parser.add_argument(
        "--beside",
        metavar="MODEL2",
        help="a second model of the same items and identifiers; the page shows the answers of both",
    )
    parser.add_argument(
        "--collaborative",
        metavar="FOLDER",
        help="the collaborative model, such as RUN/sasrec, whose scores the reward is made of; the "
        "page shows the flow of the reward beside the model's",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port (default: %(default)s)")
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="its text must come with requests as X-API-Key; needed for another --host",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=64,
        metavar="N",
        help="requests that are searched for together (default: %(default)s)",
    )
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if not find_spec(name)]
    if missing:
        raise ValueError(f"gflowgr serve needs {', '.join(missing)}: pip install 'gflowgr[serve]'")
    from ..serving.load import check_counts
    from ..serving.server import ServerConfig, read_api_key, serve

    check_counts({"--beams": args.beams})
    config = ServerConfig(
        args.host, args.port, read_api_key(args.api_key_file), max_batch=args.batch_size
    )
    folder = Path(args.model)
    state = args.state or str(folder.with_name(f"{folder.name}-catalogue"))
    serve(
        args.model,
        args.data,
        state,
        config,
        num_beams=args.beams,
        index=args.index,
        beside=args.beside,
        collaborative=args.collaborative,
    )
    return 0
