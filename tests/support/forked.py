"""Programs in forks of the test's process, which need not import everything anew."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

SECONDS = 200


def start(program: Callable[[], object], log: Path) -> int:
    """Process id of a fork that runs ``program`` and ends, with 0 unless it raised."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
            program()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pid


def kill_when(ready: Callable[[], bool], program: Callable[[], object], log: Path) -> None:
    """Start a program and kill it, with no chance to clean up."""
    pid = start(program, log)
    end = time.monotonic() + SECONDS
    while not ready():
        ended, _ = os.waitpid(pid, os.WNOHANG)
        assert not ended, f"it ended before it could be killed: {log.read_text()[-2000:]}"
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"it did not get that far: {log.read_text()[-2000:]}")
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def run_ranks(program: Callable[[], object], count: int, folder: Path) -> None:
    """Run a program in ``count`` processes that find each other as those of ``torchrun`` do."""
    from accelerate.state import AcceleratorState

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"rank_{rank}.log" for rank in range(count)]

    def rank_program(rank: int) -> Callable[[], object]:
        def run() -> None:
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
            os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(count)
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
            # What this process found out about itself holds for one process.
            AcceleratorState._reset_state(reset_partial_state=True)
            program()

        return run

    pids = [start(rank_program(rank), log) for rank, log in enumerate(logs)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * count, "\n".join(log.read_text()[-2000:] for log in logs)
