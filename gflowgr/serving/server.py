"""``gflowgr serve``: one process that answers over HTTP."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from pathlib import Path

from ..files import regular_file
from .http_api import ServerConfig, is_loopback, make_app
from .service import Service, Sources

__all__ = ["ServerConfig", "announce", "log_changes", "read_api_key", "serve"]


def read_api_key(path: str | None) -> str | None:
    """The key in the first line of a file; None without a file."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise FileNotFoundError(f"--api-key-file must name a file; got {path}")
    return regular_file(path).read_text(encoding="utf-8").strip()


def serve(sources: Sources, config: ServerConfig) -> None:
    """Answer requests until the process is told to end (SIGINT, SIGTERM).

    Args:
        sources: what is served; servers that share ``state`` are replicas.
        config: address, key and batches.

    Raises:
        DataError: model, dataset and journal do not belong together.
        OSError: the port cannot be listened on.
    """
    import uvicorn

    service = Service(**asdict(sources))
    log_changes()
    announce(config)
    uvicorn.run(
        make_app(service, config),
        host=config.host,
        port=config.port,
        log_level="warning",
        server_header=False,
        proxy_headers=False,  # the journal's "by" is whom the socket says, not what a header says
    )


def log_changes() -> None:
    """A line on standard error for each change of the catalogue."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="gflowgr: %(message)s")
    logging.getLogger("gflowgr.serving").setLevel(logging.INFO)


def announce(config: ServerConfig) -> None:
    """Say where the page and the interface are, if it is this machine that answers."""
    shown = f"[{config.host}]" if ":" in config.host else config.host
    if is_loopback(config.host):
        print(f"gflowgr: http://{shown}:{config.port}/ (page: /, interface: /docs)", flush=True)
