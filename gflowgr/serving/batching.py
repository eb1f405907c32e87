"""Dynamic batching: requests that come while a search runs are searched for together after it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

__all__ = ["Batcher", "QueueFullError"]

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


class QueueFullError(Exception):
    """More requests wait than may."""


class Batcher(Generic[Asked, Answered]):
    """Calls ``answer`` with as many requests as have come, one call at a time.

    A request that finds nobody waiting goes at once: nothing is gained by waiting for company while
    the machine is idle. All methods belong to one event loop; ``answer`` runs in a thread.

    Args:
        answer: gives an answer for each request, in their order.
        max_batch: requests in one call.
        max_waiting: requests that may be under way or wait; :class:`QueueFullError` beyond.
        observe: gets the size of each batch.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Asked]], Sequence[Answered]],
        *,
        max_batch: int,
        max_waiting: int,
        observe: Callable[[int], None],
    ) -> None:
        self.answer, self.max_batch, self.max_waiting = answer, max_batch, max_waiting
        self.observe = observe
        self.waiting = 0
        self._alone = asyncio.Lock()  # first come, first served
        self._open: list[Asked] | None = None
        self._task: asyncio.Task[Sequence[Answered]] | None = None

    async def __call__(self, request: Asked) -> Answered:
        """The answer to one request.

        Raises:
            QueueFullError: too many wait. Whatever ``answer`` raises, for each of its requests.
        """
        if self.waiting >= self.max_waiting:
            raise QueueFullError
        if self._task is None or self._open is None or len(self._open) == self.max_batch:
            self._open = []
            self._task = asyncio.create_task(self._run(self._open))
        batch, task, place = self._open, self._task, len(self._open)
        batch.append(request)
        self.waiting += 1
        try:
            # A client that goes away must not end the search of the others.
            return (await asyncio.shield(task))[place]
        finally:
            self.waiting -= 1

    async def _run(self, batch: list[Asked]) -> Sequence[Answered]:
        async with self._alone:
            if self._open is batch:
                self._open = None
            self.observe(len(batch))
            return await asyncio.to_thread(self.answer, batch)
