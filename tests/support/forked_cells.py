"""Cells of an experiment in forks of the test's process, which need not import everything anew."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from typing import Any, TextIO

import pytest

from gflowgr.runs import cell_process, runner


class _Pipe(io.StringIO):
    """The cell's standard input; it starts when this is closed."""

    def __init__(self, process: ForkedCell) -> None:
        super().__init__()
        self.process = process

    def close(self) -> None:
        if not self.closed:
            self.process.begin(self.getvalue())
        super().close()


class ForkedCell:
    """What the runner uses of ``subprocess.Popen``, for its own command only."""

    def __init__(self, command: Any, *, stdout: TextIO, env: dict[str, str], **_: Any) -> None:
        assert command == runner._WORK
        self.out, self.env, self.pid = os.dup(stdout.fileno()), env, 0
        self.returncode: int | None = None
        self.stdin = _Pipe(self)

    def begin(self, job: str) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.dup2(self.out, 1)
                os.dup2(self.out, 2)
                sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
                os.environ |= self.env
                sys.stdin = io.StringIO(job)
                status = cell_process.main()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        os.close(self.out)

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
    """The runner forks; :mod:`test_experiment_run` starts the cells' own program."""
    monkeypatch.setattr(runner.subprocess, "Popen", ForkedCell)
