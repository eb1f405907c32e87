"""Replicas of a served model on Ray Serve: its proxy, balancing, health checks and restarts."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError
from ..ray_cluster import caller_facts, connected, own_instance, stay_on_loopback, take_over

if TYPE_CHECKING:
    from .http_api import ServerConfig
    from .service import Sources

__all__ = ["Replicas", "merged", "serve_replicas", "wait_for_the_end", "with_honest_client"]

# Modules that import torch are imported where a replica begins, after take_over.

_NAME = "gflowgr"
"""Of the application and of its deployment."""
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


@dataclass(frozen=True)
class Replicas:
    """How many processes answer, where, and what each demands.

    Attributes:
        count: processes; each holds the model.
        address: ``HOST:PORT`` of a Ray cluster, or ``"auto"``; None: an instance of this command's
            own, which listens on loopback alone and ends with it.
        threads: CPUs of each; None: an equal share of this machine, or one CPU of a cluster.
        gpus: GPUs of each; None: an equal share of what there is, at most one.
    """

    count: int
    address: str | None = None
    threads: int | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"--replicas must be at least 1; got {self.count}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads must be at least 1; got {self.threads}")
        if self.gpus is not None and not 0 <= self.gpus < float("inf"):
            raise ValueError(f"--gpus must be >= 0 and finite; got {self.gpus}")


def serve_replicas(sources: Sources, config: ServerConfig, replicas: Replicas) -> None:
    """Answer requests until the process is told to end (SIGINT, SIGTERM), and end what it started.

    Args:
        sources: what is served; on a cluster all of it is at the same places on all machines.
        config: address, key and batches. Ray Serve's proxy listens there, on a cluster on every
            machine with a replica.
        replicas: how many, and where.

    Raises:
        DataError: model, dataset and journal do not belong together.
        OSError: the port cannot be listened on, or there is no such cluster.
        MissingExtraError: Ray Serve is not installed.
        ValueError: the cluster has too little room, or serves already.
    """
    local = replicas.address is None
    if local:
        stay_on_loopback()
    serve = _ray_serve()
    from .http_api import MAX_WAITING
    from .server import announce
    from .service import Service

    given = asdict(sources.resolved())  # a replica has another current folder
    Service(**given)  # what is wrong is said here, in one line, and not by a replica's trace
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    socket.create_server((config.host, config.port), family=family).close()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    share = max(1, len(os.sched_getaffinity(0)) // replicas.count) if local else 1
    cpus = replicas.threads or share
    own = own_instance(cpus * replicas.count)
    with own if local else connected(str(replicas.address)):
        demands = _demands(cpus, replicas)
        with _serving(config, everywhere=not local):
            deployment = serve.deployment(
                serve.ingress()(_Replica),
                name=_NAME,
                num_replicas=replicas.count,
                ray_actor_options=demands,
                # Above what the application lets wait, so that it is the application that refuses.
                max_ongoing_requests=2 * MAX_WAITING,
                max_queued_requests=MAX_WAITING,
                graceful_shutdown_wait_loop_s=0.2,
                graceful_shutdown_timeout_s=5.0,
                logging_config=_QUIET,
            )
            replica = deployment.bind(caller_facts(), given, asdict(config), local)
            serve.run(replica, name=_NAME, route_prefix="/")
            announce(config)
            wait_for_the_end()


def _ray_serve() -> Any:
    try:
        from ray import serve
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f'this needs pip install "gflowgr[serve,ray]" ({error.name} is not installed)',
            name=error.name,
        ) from error
    return serve


def _demands(cpus: int, replicas: Replicas) -> dict[str, float]:
    """CPUs and GPUs of a replica; ValueError if the cluster has too few for all of them."""
    import ray

    there = {name: float(ray.cluster_resources().get(name, 0.0)) for name in ("CPU", "GPU")}
    gpus = replicas.gpus
    if gpus is None:
        gpus = min(1.0, there["GPU"] / replicas.count)
    if cpus * replicas.count > there["CPU"] or gpus * replicas.count > there["GPU"] + 1e-6:
        raise ValueError(
            f"{replicas.count} replicas must find {cpus} CPUs and {gpus:g} GPUs each; Ray has "
            f"{there['CPU']:g} CPUs and {there['GPU']:g} GPUs"
        )
    return {"num_cpus": cpus, "num_gpus": gpus}


@contextmanager
def _serving(config: ServerConfig, *, everywhere: bool) -> Iterator[None]:
    """Ray Serve with this address, for as long as the block runs."""
    from ray import serve
    from ray.util import list_named_actors

    if any(each["namespace"] == "serve" for each in list_named_actors(all_namespaces=True)):
        # It would keep its own address, and its end would be the end of all that it serves.
        raise ValueError(
            "--ray must name a cluster without Ray Serve; it runs there already (serve shutdown)"
        )
    serve.start(
        proxy_location="EveryNode" if everywhere else "HeadOnly",
        http_options={"host": config.host, "port": config.port},
        logging_config=_QUIET,
    )
    try:
        yield
    finally:
        serve.shutdown()


def wait_for_the_end() -> None:
    """Return at SIGINT or SIGTERM."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()


class _Replica:
    """The same application as of one process, in a process of Ray Serve."""

    def __init__(
        self, facts: dict[str, str], given: dict[str, Any], config: dict[str, Any], local: bool
    ) -> None:
        take_over(facts)
        if local:
            _keep_internal_port_on_loopback()
        from ray import serve

        from .http_api import Metrics, ServerConfig, make_app
        from .server import log_changes
        from .service import Service

        log_changes()
        self._id = serve.get_replica_context().replica_id.unique_id
        self._metrics = Metrics()
        self._app = make_app(
            Service(**given), ServerConfig(**config), self._metrics, self._everywhere
        )

    def __serve_build_asgi_app__(self) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await self._app(with_honest_client(scope), receive, send)

        return app

    def samples(self) -> list[Any]:
        """What this replica has counted; each series says whose it is."""
        return self._metrics.families({"replica": self._id})

    async def _everywhere(self) -> list[Any]:
        from ray import serve

        handle = serve.get_deployment_handle(_NAME, _NAME)
        # A replica that is ending, or does not answer, has no series; the others have theirs.
        return merged(
            found
            for found in await handle.broadcast("samples").results_async(
                timeout_s=5.0, return_exceptions=True
            )
            if isinstance(found, list)
        )


def _keep_internal_port_on_loopback() -> None:
    """The port of a replica for other deployments, of which there are none, is not for others.

    Ray Serve has no option for its address; a private name is replaced, before it is used.
    """
    from ray.serve._private import replica

    listen = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: listen(
        server, address.replace("[::]", "127.0.0.1")
    )


def merged(replicas: Iterable[Sequence[Any]]) -> list[Any]:
    """Families of several replicas as one list, each name once."""
    families: dict[str, Any] = {}
    for family in (family for replica in replicas for family in replica):
        families.setdefault(family.name, family)
        if families[family.name] is not family:
            families[family.name].samples += family.samples
    return list(families.values())


def with_honest_client(scope: Any) -> Any:
    """A request's scope whose client is whom a socket says, or is marked as another's word.

    Ray Serve's proxy believes ``X-Forwarded-For`` of whoever asks from its own machine.
    """
    said = [value for name, value in scope.get("headers", ()) if name == b"x-forwarded-for"]
    if not said:
        return scope
    shown = b", ".join(said).decode("latin-1")[:200]
    return {**scope, "client": (f"unknown (X-Forwarded-For: {shown})", 0)}
