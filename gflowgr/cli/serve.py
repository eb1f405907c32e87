"""``gflowgr serve``: a trained model answers over HTTP."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._parsers import Commands, add_model_and_data, command

__all__ = ["add_serve"]

_EPILOG = """\
needs: pip install gflowgr[serve], and for replicas gflowgr[serve,ray]

examples:
  gflowgr serve runs/a/gflowgr/model --data data
  gflowgr serve runs/a/gflowgr/model --data data --beside runs/a/sft/model \\
      --collaborative runs/a/sasrec
  gflowgr serve runs/a/gflowgr/model --data data --host 0.0.0.0 --api-key-file key.txt
  gflowgr serve runs/a/gflowgr/model --data data --replicas 4

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
        "--encoder",
        metavar="NAME",
        help="the text encoder, a folder or in the local cache, that gflowgr identifiers make "
        "--encoder made the vectors of --index by; new items may then come with a text",
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
    several = parser.add_argument_group("several processes, by Ray Serve")
    several.add_argument(
        "--replicas",
        type=int,
        default=1,
        metavar="N",
        help="processes that answer, behind a proxy that shares requests among them "
        "(default: %(default)s: this process itself)",
    )
    several.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="answer on this Ray cluster, or auto: the one that this machine is in; model, data, "
        "state and index are at the same places on all its machines (default: an instance of Ray "
        "of this command's own)",
    )
    several.add_argument(
        "--threads",
        type=int,
        metavar="T",
        help="CPUs of each replica (default: an equal share of this machine; 1 with --ray)",
    )
    several.add_argument(
        "--gpus",
        type=float,
        metavar="G",
        help="GPUs of each replica, such as 0.5 (default: an equal share, at most 1)",
    )
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    from importlib.util import find_spec

    from ..serving.load import check_counts

    several = args.replicas != 1 or args.ray is not None
    if not several and (args.threads, args.gpus) != (None, None):
        raise ValueError("--threads and --gpus must come with --replicas or --ray")
    wanted = ["fastapi", "uvicorn", "prometheus_client", *(["ray"] if several else [])]
    missing = [name for name in wanted if not find_spec(name)]
    if missing:
        extras = "serve,ray" if several else "serve"
        raise ValueError(
            f"gflowgr serve needs {', '.join(missing)}: pip install 'gflowgr[{extras}]'"
        )
    from ..serving.replicas import Replicas, serve_replicas
    from ..serving.server import ServerConfig, read_api_key, serve
    from ..serving.service import Sources

    check_counts({"--beams": args.beams})
    config = ServerConfig(
        args.host, args.port, read_api_key(args.api_key_file), max_batch=args.batch_size
    )
    folder = Path(args.model)
    state = args.state or str(folder.with_name(f"{folder.name}-catalogue"))
    sources = Sources(
        args.model,
        args.data,
        state,
        num_beams=args.beams,
        index=args.index,
        encoder=args.encoder,
        beside=args.beside,
        collaborative=args.collaborative,
    )
    if several:
        replicas = Replicas(args.replicas, args.ray, args.threads, args.gpus)
        serve_replicas(sources, config, replicas)
    else:
        serve(sources, config)
    return 0
