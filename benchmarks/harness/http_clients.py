"""Clients of an HTTP server on loopback, in a process of their own: keep-alive, closed loop."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Client", "Clients", "Load", "clients_process", "load"]


class Client:
    """One connection, which stays open; not for several tasks at once."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and content of the answer.

        Raises:
            OSError: the server is not there, or closed the connection.
        """
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        try:
            writer.write(head.encode() + content)
            await writer.drain()
            lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
            lengths = [line for line in lines if line.startswith(b"content-length:")]
            answer = await reader.readexactly(int(lengths[0].partition(b":")[2]))
        except (OSError, asyncio.IncompleteReadError) as error:
            self.close()
            raise ConnectionError(f"no answer to {method} {path}") from error
        return int(lines[0].split()[1]), answer

    def close(self) -> None:
        """Close the connection; the next request opens another one."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


@dataclass(frozen=True)
class Load:
    """What clients saw.

    Attributes:
        seconds: from a request to the end of its answer, of every request.
        elapsed: from the first request to the last answer, in seconds.
        failed: answers whose status was not 200.
    """

    seconds: tuple[float, ...]
    elapsed: float
    failed: int


async def load(port: int, bodies: Sequence[Any], clients: int, duration: float) -> Load:
    """What :meth:`Clients.load` does, in this process."""
    seconds, failed = list[float](), 0
    todo = iter(range(1_000_000_000))
    begin = time.perf_counter()

    async def client() -> None:
        nonlocal failed
        connection = Client(port)
        while time.perf_counter() - begin < duration:
            body = bodies[next(todo) % len(bodies)]
            sent = time.perf_counter()
            status, _ = await connection.ask("POST", "/recommend", body)
            seconds.append(time.perf_counter() - sent)
            failed += status != 200
        connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return Load(tuple(seconds), time.perf_counter() - begin, failed)


class Clients:
    """The other end of the clients' process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def load(self, port: int, bodies: Sequence[Any], clients: int, duration: float) -> Load:
        """Ask for so many seconds, each client as soon as it has its answer; wait for the last."""
        self._pipe.send((port, bodies, clients, duration))
        found: Load = self._pipe.recv()
        return found


def _work(pipe: Connection) -> None:
    while (asked := pipe.recv()) is not None:
        pipe.send(asyncio.run(load(*asked)))


@contextmanager
def clients_process() -> Iterator[Clients]:
    """A process of clients, for as long as the block runs."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there,), daemon=True)
    process.start()
    there.close()
    try:
        yield Clients(here)
        here.send(None)
        process.join(10)
    finally:
        process.kill()
        process.join()
