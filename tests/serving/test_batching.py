"""Dynamic batching: requests at the same time share a batch, and each gets its own answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from gflowgr.serving.batching import Batcher, QueueFullError


def test_what_comes_during_a_search_is_searched_for_together_after_it() -> None:
    sizes: list[int] = []
    running, go = threading.Event(), threading.Event()

    def double(values: Sequence[int]) -> list[int]:
        running.set()
        assert go.wait(20)
        return [2 * value for value in values]

    async def ask() -> list[int]:
        batcher = Batcher(double, max_batch=4, max_waiting=100, observe=sizes.append)
        first = asyncio.create_task(batcher(0))
        await asyncio.to_thread(running.wait, 20)
        rest = [asyncio.create_task(batcher(value)) for value in range(1, 10)]
        await asyncio.sleep(0)
        assert batcher.waiting == 10
        go.set()
        found = await asyncio.gather(first, *rest)
        assert batcher.waiting == 0
        return found

    assert asyncio.run(ask()) == [2 * value for value in range(10)]
    assert sizes == [1, 4, 4, 1]


def test_an_error_of_a_search_reaches_its_requests_and_no_others() -> None:
    def fail_at_7(values: Sequence[int]) -> Sequence[int]:
        if 7 in values:
            raise FloatingPointError("the model's scores are NaN")
        return values

    async def ask() -> None:
        batcher = Batcher(fail_at_7, max_batch=1, max_waiting=3, observe=lambda size: None)
        tasks = [asyncio.create_task(batcher(value)) for value in (1, 7, 3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await batcher(4)
        one, seven, three = await asyncio.gather(*tasks, return_exceptions=True)
        assert (one, three) == (1, 3)
        assert isinstance(seven, FloatingPointError)
        assert await batcher(5) == 5

    asyncio.run(ask())


def test_a_client_that_goes_away_does_not_end_the_search_of_the_others() -> None:
    async def ask() -> None:
        batcher = Batcher(list, max_batch=8, max_waiting=8, observe=lambda size: None)
        gone, stays = asyncio.create_task(batcher("a")), asyncio.create_task(batcher("b"))
        await asyncio.sleep(0)
        gone.cancel()
        assert await stays == "b"
        assert batcher.waiting == 0

    asyncio.run(ask())
