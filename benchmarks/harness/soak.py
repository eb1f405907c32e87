"""A long run of the server: changes of the catalogue while others ask, and every answer checked.

One client makes all changes, so that the journal says what the catalogue was at every version. An
answer names its version: it must be at least the one that had been answered for when the request
began, and may hold nothing that was not in the catalogue, and available, at that version.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.http_clients import Client
from benchmarks.harness.processes import descendants
from benchmarks.harness.served import Shop, gflowgr_server
from benchmarks.harness.shapes import CODES, LENGTH

__all__ = ["Seen", "SoakResult", "grown", "lost", "soak_test", "soak_text", "wrong_items"]

ASKERS = 3
_PAUSE = 0.2
"""Seconds between the requests of an asker."""
_CHANGE = 0.25
"""Seconds between two changes."""
_TOUCHED = 40
"""Items of the dataset that are changed; the others are always there."""
_SWAP = 25
"""Every so many changes the model is another one."""
_GROWTH = 30.0
"""MiB, or a tenth, by which a process may grow."""


@dataclass
class SoakResult:
    """What came of it.

    Attributes:
        seconds: how long it ran.
        replicas: processes that answered.
        requests, changes: answers of status 200.
        killed: seconds from the start to the death of a replica; None: none was killed.
        retried: requests without an answer or with status 500, which were made again.
        wrong: what must not be, in words.
        memory: MiB of each process, by its name, at several seconds of the run.
        slowest: seconds of the slowest request that was answered.
    """

    seconds: float
    replicas: int
    requests: int = 0
    changes: int = 0
    killed: float | None = None
    retried: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    memory: dict[int, dict[str, float]] = field(default_factory=dict)
    slowest: float = 0.0


@dataclass(frozen=True)
class Seen:
    """An answer to be checked: what had been answered for before, what was asked and what came."""

    before: int
    version: int
    available: tuple[str, ...] | None
    items: tuple[str, ...]


class _Run:
    """The clients of one run, in one event loop."""

    def __init__(self, shop: Shop, port: int, pid: int, result: SoakResult) -> None:
        self.shop, self.port, self.pid, self.result = shop, port, pid, result
        self.begin = time.monotonic()
        self.version = 0  # of the last change that was answered for
        self.answered: dict[int, dict[str, Any]] = {}
        self.seen: list[Seen] = []
        self.draw = random.Random(7)
        self.bodies = shop.requests(200, mask_seen=False)
        self.touched = [str(item) for item in range(_TOUCHED)]

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.begin

    async def ask(self, client: Client, method: str, path: str, body: Any = None) -> Any:
        """The answer; what a killed replica was asked is asked again, and counted."""
        while True:
            sent = time.monotonic()
            try:
                status, content = await client.ask(method, path, body)
            except ConnectionError:
                status, content = 0, b""
            if status == 200:
                self.result.slowest = max(self.result.slowest, time.monotonic() - sent)
                return content.decode() if path == "/metrics" else json.loads(content)
            if status not in (0, 500, 503):
                return {"refused": content.decode(errors="replace")}
            self.result.retried.append(round(self.now, 2))
            await asyncio.sleep(0.05)

    async def asker(self, number: int) -> None:
        """Ask for what a history may lead to, and in turn for the items that are changed."""
        client, turn = Client(self.port), number
        while self.now < self.result.seconds:
            body = {**self.bodies[turn % len(self.bodies)], "k": 50}
            available = None
            if turn % 2:
                available = (*self.touched, *(f"new-{place}" for place in range(_TOUCHED)))
                known = set(self.touched) | self.added
                available = tuple(item for item in available if item in known)
                body = {"history": [], "available": available, "k": len(available)}
            before = self.version
            found = await self.ask(client, "POST", "/recommend", body)
            if "refused" in found:
                self.result.wrong.append(f"a request was refused: {found['refused'][:200]}")
            else:
                items = tuple(str(item) for item in found["items"])
                self.seen.append(Seen(before, found["version"], available, items))
                self.result.requests += 1
            turn += ASKERS
            await asyncio.sleep(_PAUSE)
        client.close()

    async def changer(self) -> None:
        """Make changes, one after the other; what is answered for must be in the journal."""
        client, self.added = Client(self.port), set[str]()
        for path, method, body, change in self._changes():
            if self.now >= self.result.seconds:
                break
            found = await self.ask(client, method, path, body)
            if "refused" not in found:
                self.version = found["version"]
                self.answered[self.version] = change
                self.result.changes += 1
                if change["kind"] == "add":
                    self.added.add(change["id"])
            elif not self.result.retried:
                # Made, but not answered for by the one that died: then it is refused again.
                self.result.wrong.append(f"a change was refused: {found['refused'][:200]}")
            await asyncio.sleep(_CHANGE)
        client.close()

    def _changes(self) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
        there = dict.fromkeys(self.touched, True)
        codes = self.shop.tokens - self.shop.vocabulary.offset
        codes = codes - [CODES * level for level in range(LENGTH)]
        for number in range(1_000_000):
            if number % _SWAP == _SWAP - 1:
                folder = str(self.shop.folder / f"model{(number // _SWAP + 1) % 2}")
                yield "/model", "POST", {"model": folder}, {"kind": "model", "model": folder}
                continue
            kind = self.draw.choice(("add", "remove", "hide", "show"))
            item = self.draw.choice([*there])
            if kind == "add":
                gone = [each for each, is_there in there.items() if not is_there]
                new = f"new-{number % _TOUCHED}"
                item = self.draw.choice([*gone, new]) if there.get(new) is not True else ""
                if not item:
                    continue
                identifier = codes[self.draw.randrange(len(codes))].tolist()
                body = {"id": item, "identifier": identifier, "share": True}
                there[item] = True
                yield "/items", "POST", body, {"kind": "add", "id": item}
            elif not there[item]:
                continue
            elif kind == "remove":
                there[item] = False
                yield f"/items/{item}", "DELETE", None, {"kind": "remove", "id": item}
            else:
                shown = kind == "show"
                change = {"kind": "availability", "id": item, "available": shown}
                yield f"/items/{item}/availability", "PUT", {"available": shown}, change

    async def watcher(self) -> None:
        """Memory at several times, and in the middle, of several replicas, the death of one."""
        client, total = Client(self.port), self.result.seconds
        marks = [total * share for share in (0.1, 0.2, 0.4, 0.6, 0.8, 0.97)]
        for mark in sorted([*marks, total / 2]):
            await asyncio.sleep(max(0.0, mark - self.now))
            if mark == total / 2 and self.result.replicas > 1:
                started = descendants(self.pid).items()
                victim = next(pid for pid, title in started if "ray::ServeReplica" in title)
                os.kill(victim, signal.SIGKILL)
                self.result.killed = round(self.now, 1)
            elif mark in marks:
                text = await self.ask(client, "GET", "/metrics")
                self.result.memory[round(mark)] = dict(_memory(text))
                client.close()  # idle until the next mark, a server would close it

    async def all(self) -> None:
        """Everything at once."""
        self.added = set[str]()
        await asyncio.gather(
            self.changer(), self.watcher(), *(self.asker(number) for number in range(ASKERS))
        )


def soak_test(
    items: int,
    *,
    seconds: float,
    replicas: int = 1,
    threads: int = 1,
    sizes: Any = None,
    say: Callable[[str], None] = print,
) -> SoakResult:
    """Run it; whatever must not be is in ``wrong`` of the result.

    Args:
        items: items of the catalogue before any change.
        seconds: how long.
        replicas: processes that answer; of several, one is killed in the middle.
        threads: CPU threads of each.
        sizes: of the generator; None: the package's default.
        say: gets a line when something begins.
    """
    from gflowgr.models import TigerConfig
    from gflowgr.serving.requests import Recommend
    from gflowgr.serving.service import Service

    result = SoakResult(seconds, replicas)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shop, state = Shop(folder, items, sizes or TigerConfig()), folder / "state"
        shop.write()
        options = ["--replicas", str(replicas), "--threads", str(threads)] if replicas > 1 else []
        port, pid = stack.enter_context(
            gflowgr_server(shop, state, threads=threads, options=options)
        )
        say(f"soak of {seconds:g} s, replicas: {replicas}")
        run = _Run(shop, port, pid, result)
        asyncio.run(run.all())
        lines = [json.loads(line) for line in (state / "changes.jsonl").read_text().splitlines()]
        result.wrong += lost(run.answered, lines)
        result.wrong += wrong_items(run.seen, lines, items) + grown(result.memory)
        # In the end the server and a new process with the same journal answer alike.
        offline = Service(str(folder / "model0"), str(folder / "data"), str(state))
        body = {"history": [1, 2, 3], "k": 20}
        (wanted,) = offline.answer([Recommend(history=(1, 2, 3), k=20)])
        found = asyncio.run(run.ask(Client(port), "POST", "/recommend", body))
        if found != wanted:
            result.wrong.append(f"at the end the answer must be {wanted}; got {found}")
    allowed = 0 if result.killed is None else 2 * (ASKERS + 1)
    if len(result.retried) > allowed:
        result.wrong.append(f"at most {allowed} requests may be made again; {len(result.retried)}")
    return result


def lost(answered: dict[int, dict[str, Any]], lines: list[dict[str, Any]]) -> list[str]:
    """Changes that were answered for and are not in the journal."""
    wrong = []
    for version, change in answered.items():
        there = lines[version - 1]["change"] if version <= len(lines) else {}
        if {name: there.get(name) for name in change} != change:
            wrong.append(f"version {version} must be {change}; the journal has {there}")
    return wrong


def wrong_items(seen: list[Seen], lines: list[dict[str, Any]], items: int) -> list[str]:
    """Answers that hold what was not there at their version, or lack what was asked for."""
    wrong, states = [], [({str(item) for item in range(items)}, frozenset[str]())]
    for line in lines:
        there, hidden = states[-1]
        change = line["change"]
        item = change.get("id")
        if change["kind"] == "add":
            there, hidden = there | {item}, hidden - {item}
        elif change["kind"] == "remove":
            there = there - {item}
        elif change["kind"] == "availability":
            hidden = hidden - {item} if change["available"] else hidden | {item}
        states.append((there, hidden))
    for each in seen:
        if each.version < each.before:
            wrong.append(f"an answer of version {each.version} came after {each.before}")
        there, hidden = states[each.version]
        shown = there - hidden
        if not set(each.items) <= shown:
            wrong.append(f"version {each.version} has no {sorted(set(each.items) - shown)}")
        if each.available is not None and set(each.items) != set(each.available) & shown:
            missing = sorted(set(each.available) & shown - set(each.items))
            wrong.append(f"version {each.version} has {missing}, which were asked for")
    return wrong


def _memory(metrics: str) -> Iterator[tuple[str, float]]:
    for line in metrics.splitlines():
        if line.startswith("process_resident_memory_bytes"):
            name = line.partition('replica="')[2].partition('"')[0] or "server"
            yield name, round(float(line.rpartition(" ")[2]) / 2**20, 1)


def grown(memory: dict[int, dict[str, float]]) -> list[str]:
    """Processes that are larger at the end than when they had been asked for a while."""
    wrong = []
    for name in sorted({name for sizes in memory.values() for name in sizes}):
        sizes = [there[name] for there in memory.values() if name in there]
        if len(sizes) >= 3 and sizes[-1] > sizes[1] + max(0.1 * sizes[1], _GROWTH):
            wrong.append(f"memory of {name} must stay flat; it went over {sizes} MiB")
    return wrong


def soak_text(result: SoakResult) -> str:
    """The outcome as Markdown."""
    lines = [
        f"- ran for {result.seconds:g} s with {result.replicas} replicas, {ASKERS} clients that "
        "ask and one that changes the catalogue",
        f"- answers: {result.requests:,}, each checked against the journal; changes: "
        f"{result.changes:,}, each found there",
        f"- wrong: {len(result.wrong)}" + "".join(f"\n  - {each}" for each in result.wrong[:20]),
        f"- slowest request: {result.slowest:.2f} s",
    ]
    if result.killed is not None:
        lines.append(f"- a replica was killed after {result.killed:g} s")
    lines.append(f"- requests that were made again, at second: {result.retried or 'none'}")
    for mark, sizes in result.memory.items():
        shown = ", ".join(f"{name} {size:.0f}" for name, size in sorted(sizes.items()))
        lines.append(f"- MiB at {mark} s: {shown}")
    return "\n".join(lines)
