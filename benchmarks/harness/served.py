"""A shop of random users and items with models of it on disk, and servers of them on loopback."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.constraints import DictTrie, random_tokens
from benchmarks.harness.shapes import CODES, LENGTH
from gflowgr.data import Dataset, Ragged, save_dataset
from gflowgr.models import FlowSettings, GFlowModel, IdentifierVocabulary, TigerConfig, build_tiger
from gflowgr.tree import PrefixTree

__all__ = ["SMALL", "Shop", "free_port", "gflowgr_server", "peer_server", "search_times"]

MAX_HISTORY = 20
BEAMS = 20
SMALL = TigerConfig(16, d_ff=32, d_kv=8, num_heads=2, num_layers=1)
"""Sizes for tests."""
_PATIENCE = 180.0
"""Seconds until a server must answer."""


@dataclass(frozen=True)
class Shop:
    """Random items, users and weights, the same for the same numbers.

    Attributes:
        folder: where ``data``, ``model0`` and ``model1`` are written.
        items: items of the catalogue.
        sizes: of the generator.
    """

    folder: Path
    items: int
    sizes: TigerConfig

    @property
    def vocabulary(self) -> IdentifierVocabulary:
        """Four codebooks of 256."""
        return IdentifierVocabulary((CODES,) * LENGTH)

    @property
    def tokens(self) -> np.ndarray:
        """The items' identifiers [items, LENGTH]."""
        return random_tokens(self.items, self.vocabulary.offset)

    def backbone(self, seed: int) -> Any:
        """The generator with random weights, in ``eval`` mode."""
        return build_tiger(self.vocabulary, self.sizes, seed=seed).eval()

    def write(self) -> None:
        """Save the dataset and two models."""
        items = np.random.default_rng(0).integers(0, self.items, 64 * 8).astype(np.int32)
        items[0] = self.items - 1  # a dataset on disk ends with the largest number that it names
        users = Ragged.from_lengths(np.full(64, 8), items)
        save_dataset(
            Dataset("random", [str(user) for user in range(64)], users, self.items),
            self.folder / "data",
        )
        tree = PrefixTree.from_identifiers(torch.from_numpy(self.tokens))
        settings = FlowSettings(objective="sft", max_history=MAX_HISTORY)
        for seed in (0, 1):
            model = GFlowModel(self.backbone(seed), tree, self.vocabulary, settings)
            model.save_pretrained(self.folder / f"model{seed}")

    def requests(self, count: int, **fields: Any) -> list[dict[str, Any]]:
        """Bodies for ``/recommend``: histories of 5 to 20 items, 10 items wanted."""
        draw = np.random.default_rng(1)
        lengths = draw.integers(5, MAX_HISTORY + 1, count)
        histories = [draw.integers(0, self.items, length).tolist() for length in lengths]
        return [{"history": history, "k": 10, **fields} for history in histories]


def free_port() -> int:
    """A port of loopback that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def gflowgr_server(
    shop: Shop, state: Path, *, threads: int, options: Sequence[str] = ()
) -> Iterator[tuple[int, int]]:
    """``gflowgr serve`` of model 0 with its journal in ``state``; gives port and process id."""
    port = free_port()
    command = [sys.executable, "-m", "gflowgr", "serve", str(shop.folder / "model0")]
    command += ["--data", str(shop.folder / "data"), "--state", str(state)]
    command += ["--port", str(port), "--beams", str(BEAMS), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (shop.folder / f"server-{port}.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        _wait(port, lambda: process.poll() is None, Path(log.name))
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(60)


def _wait(port: int, alive: Any, log: Path | None = None) -> None:
    end = time.monotonic() + _PATIENCE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            opener.open(f"http://127.0.0.1:{port}/health", timeout=5).read()
            return
        except OSError as error:
            if not alive() or time.monotonic() > end:
                text = "" if log is None else log.read_text(errors="replace")
                raise RuntimeError(f"a server must answer on port {port}; {text}") from error
            time.sleep(0.1)


@contextmanager
def peer_server(shop: Shop, *, threads: int) -> Iterator[tuple[int, int]]:
    """``transformers.generate`` behind the same kind of server; gives port and process id."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve_generate, args=(shop, port, threads), daemon=True
    )
    process.start()
    try:
        _wait(port, process.is_alive)
        yield port, int(process.pid or 0)
    finally:
        process.kill()
        process.join()


def _serve_generate(shop: Shop, port: int, threads: int) -> None:
    import uvicorn

    from benchmarks.harness.generate_server import make_app

    torch.set_num_threads(threads)
    app = make_app(shop.backbone(0), shop.tokens, DictTrie(shop.tokens), BEAMS)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


@contextmanager
def search_times(shop: Shop, *, threads: int) -> Iterator[Any]:
    """The search alone, in a process; gives a function (bodies, seconds) -> times in seconds."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_search, args=(there, shop, threads), daemon=True)
    process.start()
    there.close()

    def times(bodies: Sequence[dict[str, Any]], seconds: float) -> list[float]:
        here.send((bodies, seconds))
        found: list[float] = here.recv()
        return found

    try:
        here.recv()
        yield times
    finally:
        process.kill()
        process.join()


def _search(pipe: Any, shop: Shop, threads: int) -> None:
    from gflowgr.evaluation.generative import GenerativeRecommender

    torch.set_num_threads(threads)
    model = GFlowModel.from_pretrained(shop.folder / "model0", decode_only=True).eval()
    recommender = GenerativeRecommender(model, num_beams=BEAMS)
    pipe.send("ready")
    while True:
        bodies, duration = pipe.recv()
        seconds: list[float] = []
        begin = time.perf_counter()
        while time.perf_counter() - begin < duration:
            history = np.array(bodies[len(seconds) % len(bodies)]["history"])
            sent = time.perf_counter()
            recommender.recommend([history], 10, [history])
            seconds.append(time.perf_counter() - sent)
        pipe.send(seconds)
