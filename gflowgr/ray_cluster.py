"""Work on a Ray cluster: the connection, and what its processes need of this one."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from . import __version__
from .extensions import SEARCH_VARIABLE, search_path

__all__ = [
    "ClusterWorker",
    "call_by_name",
    "caller_facts",
    "connected",
    "gpus_of_cluster",
    "own_instance",
    "room_in_cluster",
    "stay_on_loopback",
    "take_over",
]

_VARIABLES = ("GFLOWGR_", "HF_", "TRANSFORMERS_", "WANDB_", "MLFLOW_", "TENSORBOARD_")

_OBJECT_STORE = 80 << 20
"""Bytes: about the least that Ray takes; nothing large passes through it."""


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to a cluster; whoever is connected already stays so.

    Args:
        address: ``HOST:PORT`` of its head, or ``"auto"``: the cluster of this machine.

    Raises:
        ConnectionError: there is none.
        MissingExtraError: Ray is not installed.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(address=address, log_to_driver=False, logging_level="WARNING")
    try:
        yield
    finally:
        ray.shutdown()


def stay_on_loopback() -> None:
    """Let the processes of an instance of this process's own listen on 127.0.0.1 alone.

    To be called before Ray is imported. The variable is named after the systems where it is so by
    default.
    """
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


@contextlib.contextmanager
def own_instance(cpus: int) -> Iterator[None]:
    """A Ray instance of this process's own, which ends with the block, or when the process dies.

    Args:
        cpus: what its tasks and actors may demand together.
    """
    stay_on_loopback()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE,
        logging_level="ERROR",
    )
    try:
        yield
    finally:
        ray.shutdown()


def gpus_of_cluster() -> float:
    """GPUs of the machines that are in the cluster now."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0.0))


def caller_facts() -> dict[str, str]:
    """What :func:`take_over` needs, of the process that connects."""
    facts = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
    return facts | {SEARCH_VARIABLE: search_path(), "version": __version__}


def take_over(facts: dict[str, str]) -> None:
    """Make a process of the cluster like the one that connected, before libraries are imported.

    Raises:
        RuntimeError: it has another version of this package.
    """
    if facts["version"] != __version__:
        raise RuntimeError(
            f"gflowgr on {socket.gethostname()} must be of version {facts['version']}, as it is "
            f"where the command was given; got {__version__}"
        )
    os.environ |= {name: value for name, value in facts.items() if name != "version"}


def call_by_name(
    facts: dict[str, str], module: str, function: str, arguments: Sequence[Any], *_needs: Any
) -> Any:
    """What a function of a module returns, in a process of the cluster.

    It is named, so that its module is imported after :func:`take_over`.

    Args:
        facts: :func:`caller_facts`.
        module: such as ``"gflowgr.runs.ray_pool"``.
        function: its name there.
        arguments: for it.
        _needs: results of the tasks that come before, which Ray waits for.
    """
    take_over(facts)
    return getattr(importlib.import_module(module), function)(*arguments)


class ClusterWorker:
    """An actor that works on batches by what :func:`call_by_name` made when it began."""

    def __init__(
        self, facts: dict[str, str], module: str, function: str, arguments: Sequence[Any]
    ) -> None:
        """Make the worker; see :func:`call_by_name`."""
        self._work = call_by_name(facts, module, function, arguments)

    def __call__(self, batch: Any) -> Any:
        """What the worker makes of a batch."""
        return self._work(batch)


def room_in_cluster(cpus: int, gpus: float) -> int:
    """How many processes of these demands the cluster has room for now; at least 1."""
    import ray

    there = ray.cluster_resources()
    room = there.get("CPU", 0.0) / cpus
    if gpus > 0:
        room = min(room, there.get("GPU", 0.0) / gpus)
    return max(1, int(room))
