"""Cells of an experiment in forks of the test's process, which need not import everything anew."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Any, TextIO

import pytest

from gflowgr.runs import cell_process, pool


class ForkedCell:
    """What the pool uses of ``subprocess.Popen``, for its own command only."""

    def __init__(self, command: Any, *, stdout: TextIO, env: dict[str, str], **_: Any) -> None:
        assert command == pool._WORK
        self.returncode: int | None = None
        theirs, ours = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(ours)
            self._work(theirs, stdout.fileno(), env)
        os.close(theirs)
        self.stdin = os.fdopen(ours, "w")

    def _work(self, job: int, out: int, env: dict[str, str]) -> None:
        """The rest of the fork's life."""
        status = 1
        try:
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
            os.environ |= env
            sys.stdin = os.fdopen(job)
            status = cell_process.main()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        self._wait(os.WNOHANG)
        return self.returncode

    def wait(self) -> int | None:
        self._wait(0)
        return self.returncode

    def _wait(self, options: int) -> None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, options)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)

    def terminate(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGTERM)


@pytest.fixture
def forked_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """The local pool forks; :mod:`test_experiment_run` starts the cells' own program."""
    monkeypatch.setattr(pool.subprocess, "Popen", ForkedCell)
