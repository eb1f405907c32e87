"""``python -m benchmarks serve``: the server under load, against what it is made of and a peer."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.report import describe_machine
from benchmarks.harness.shapes import BEAUTY_ITEMS
from gflowgr import files
from gflowgr.report.tables import markdown_table

__all__ = ["Cell", "command_parser", "load_test", "main", "report"]

CLIENTS = (1, 8, 64)
OURS, PEER, ALONE = "gflowgr serve", "transformers.generate", "gflowgr serve, one at a time"
SEARCH = "the search itself"
_SAME = 8
"""Requests whose answers are compared."""


@dataclass
class Cell:
    """One server with so many clients, all rounds together.

    Attributes:
        variant: the server.
        clients: clients at once.
        seconds: of each request.
        elapsed: of all rounds.
        cpu: CPU seconds of the server meanwhile, which other work on the machine does not add to.
        rate: requests a second in each round.
    """

    variant: str
    clients: int
    seconds: list[float] = field(default_factory=list)
    elapsed: float = 0.0
    cpu: float = 0.0
    rate: list[float] = field(default_factory=list)

    def percentile(self, percent: float) -> float:
        """In milliseconds."""
        return 1e3 * float(np.percentile(self.seconds, percent))

    @property
    def per_second(self) -> float:
        """Requests a second, all rounds together."""
        return len(self.seconds) / self.elapsed


def load_test(
    items: int,
    *,
    rounds: int,
    seconds: float,
    threads: int,
    clients: Sequence[int] = CLIENTS,
    sizes: Any = None,
    say: Callable[[str], None] = print,
) -> list[Cell]:
    """Every server with every number of clients, in rounds, so that all meet the same machine.

    Args:
        items: items of the catalogue.
        rounds: how often each is measured.
        seconds: how long each time; what was asked by then is still waited for.
        threads: CPU threads of each server.
        clients: clients at once.
        sizes: of the generator; None: the package's default.
        say: gets a line when something begins.

    Raises:
        RuntimeError: an answer was an error, or the servers answer differently.
    """
    from benchmarks.harness.http_clients import clients_process
    from benchmarks.harness.processes import cpu_seconds_of
    from benchmarks.harness.served import Shop, gflowgr_server, peer_server, search_times
    from gflowgr.models import TigerConfig

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shop = Shop(folder, items, TigerConfig() if sizes is None else sizes)
        shop.write()
        say("starting the servers")
        servers = {
            PEER: stack.enter_context(peer_server(shop, threads=threads)),
            OURS: stack.enter_context(gflowgr_server(shop, folder / "state", threads=threads)),
            ALONE: stack.enter_context(
                gflowgr_server(
                    shop, folder / "state1", threads=threads, options=("--batch-size", "1")
                )
            ),
        }
        search = stack.enter_context(search_times(shop, threads=threads))
        ask = stack.enter_context(clients_process())
        ports = {name: port for name, (port, _) in servers.items()}
        _check_answers(ports, shop.requests(_SAME, mask_seen=False))
        bodies = shop.requests(512)
        for port in ports.values():  # the first calls of a process are slow
            ask.load(port, bodies, 4, 0.5)
        search(bodies, 0.5)
        cells = {(name, count): Cell(name, count) for name in ports for count in clients}
        alone = Cell(SEARCH, 1)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for count in clients:
                for name in [*ports][number % len(ports) :] + [*ports][: number % len(ports)]:
                    port, pid = servers[name]
                    before = cpu_seconds_of(pid)
                    found = ask.load(port, bodies, count, seconds)
                    if found.failed:
                        raise RuntimeError(f"{found.failed} requests to {name} failed")
                    _add(cells[name, count], found.seconds, found.elapsed)
                    cells[name, count].cpu += cpu_seconds_of(pid) - before
                if count == 1:
                    times = search(bodies, seconds)
                    _add(alone, times, sum(times))
    return [alone, *cells.values()]


def _add(cell: Cell, seconds: Sequence[float], elapsed: float) -> None:
    cell.seconds += seconds
    cell.elapsed += elapsed
    cell.rate.append(len(seconds) / elapsed)


def _check_answers(ports: dict[str, int], bodies: Sequence[dict[str, Any]]) -> None:
    """The items of all servers are the same; neighbours may change places where sums round."""
    import asyncio
    import json

    from benchmarks.harness.http_clients import Client

    async def answers(port: int) -> list[set[int]]:
        client = Client(port)
        found = [json.loads((await client.ask("POST", "/recommend", b))[1]) for b in bodies]
        client.close()
        return [set(each["items"]) for each in found]

    wanted = asyncio.run(answers(ports[OURS]))
    for name, port in ports.items():
        same = [one & other for one, other in zip(asyncio.run(answers(port)), wanted, strict=True)]
        if sum(map(len, same)) < 0.98 * sum(map(len, wanted)):
            raise RuntimeError(f"{name} must answer as {OURS}; it has other items")


# ---- what is reported ----


def report(cells: Sequence[Cell]) -> tuple[str, list[str]]:
    """A table, and which figures are reached."""
    rows = [
        [
            cell.variant,
            str(cell.clients),
            *(f"{cell.percentile(percent):.1f}" for percent in (50, 95, 99)),
            f"{cell.per_second:.1f}",
            f"{1e3 * cell.cpu / len(cell.seconds):.1f}" if cell.cpu else "",
            f"{min(cell.rate):.1f} to {max(cell.rate):.1f}",
            str(len(cell.seconds)),
        ]
        for cell in cells
    ]
    titles = ["server", "clients", "p50 ms", "p95 ms", "p99 ms", "requests/s"]
    titles += ["CPU ms a request", "rounds", "requests"]
    by_name = {(cell.variant, cell.clients): cell for cell in cells}
    bars = []
    most = max(cell.clients for cell in cells)
    for other, wanted in ((PEER, 8.0), (ALONE, None)):
        ratio = by_name[OURS, most].per_second / by_name[other, most].per_second
        bars.append(_bar(f"requests/s at {most} clients over {other}", ratio, wanted, ">="))
    cpu = [by_name[name, most].cpu / len(by_name[name, most].seconds) for name in (PEER, OURS)]
    if all(cpu):
        bars.append(_bar(f"CPU time of a request of {PEER} over ours", cpu[0] / cpu[1], None, ""))
    ratio = by_name[OURS, 1].percentile(95) / by_name[SEARCH, 1].percentile(95)
    bars.append(_bar(f"p95 at 1 client over p95 of {SEARCH}", ratio, 1.5, "<="))
    return markdown_table([titles, *rows], "lrrrrrrlr"), bars


def _bar(name: str, value: float, wanted: float | None, sign: str) -> str:
    if wanted is None:
        return f"{name}: {value:.2f}"
    met = value >= wanted if sign == ">=" else value <= wanted
    limit = "at least" if sign == ">=" else "at most"
    return f"{'met' if met else 'MISSED'}: {name}: {value:.2f}, {limit} {wanted:g}"


def machine_facts(arguments: Sequence[str]) -> dict[str, Any]:
    """Machine, versions, the command and the commit."""
    facts = describe_machine(torch.device("cpu"))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {**facts, "commit": commit or "unknown"}


def _write(out: str, name: str, facts: dict[str, Any], text: str, data: Any) -> None:
    folder = files.ensure_writable(Path(out))
    lines = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    document = f"# {name}\n\n{lines}\n\n{text}\n"
    (folder / "serve.md").write_text(document, encoding="utf-8")
    files.write_json(folder / "serve.json", {"machine": facts, "results": data})


# ---- the command ----


def command_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks serve",
        description="Load on a server of a random model on loopback, or with --soak a long run "
        "with changes of the catalogue, and faults.",
    )
    add = parser.add_argument
    add("--items", type=int, default=BEAUTY_ITEMS, help="items (default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads of a server (default: %(default)s)")
    add("--rounds", type=int, default=2, help="how often each is measured (default: %(default)s)")
    add("--seconds", type=float, default=2.5, help="how long each time (default: %(default)s)")
    add(
        "--soak",
        type=float,
        nargs="?",
        const=600.0,
        metavar="SECONDS",
        help="changes and questions at once for so long (default: 600), every answer checked",
    )
    add("--replicas", type=int, default=1, help="with --soak; of several, one is killed")
    add("--out", metavar="FOLDER", help="write serve.md and serve.json there")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code: 1 if an answer was wrong."""
    args = command_parser().parse_args(argv)
    if args.soak is not None:
        from benchmarks.harness.soak import soak_test, soak_text

        facts = machine_facts(argv)
        found = soak_test(
            args.items, seconds=args.soak, replicas=args.replicas, threads=args.threads
        )
        title, text = "Soak of the server", soak_text(found)
        data: Any = asdict(found)
        wrong = bool(found.wrong)
    else:
        facts = machine_facts(argv)
        cells = load_test(
            args.items, rounds=args.rounds, seconds=args.seconds, threads=args.threads
        )
        table, bars = report(cells)
        title, text = "Load on the server", "\n".join([table, "", *(f"- {bar}" for bar in bars)])
        data = [
            {
                "variant": cell.variant,
                "clients": cell.clients,
                "p50, p95, p99 (ms)": [round(cell.percentile(p), 2) for p in (50, 95, 99)],
                "requests/s": round(cell.per_second, 2),
                "requests/s of each round": [round(rate, 2) for rate in cell.rate],
                "CPU seconds of the server": round(cell.cpu, 2),
                "requests": len(cell.seconds),
            }
            for cell in cells
        ]
        wrong = False
    print(text)
    if args.out is not None:
        _write(args.out, title, facts, text, data)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
