"""Plant each fault of faults.yaml in a copy of the package and run the tests that must find it.

    python tests/planted_faults                 # all
    python tests/planted_faults replay csrc     # those whose name or file contains one of these

The copy is ``build/planted_faults``, which is kept: the C++ sources are compiled whole once, then
only what a fault touches. First the tests run without any fault, since a failing test would seem
to find everything. Ends with 1 if a fault survived.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COPY = ROOT / "build" / "planted_faults"
PARTS = ("gflowgr", "kernels", "csrc", "tests", "examples", "pyproject.toml", "setup.py")
SECONDS = 300


@dataclass(frozen=True)
class Fault:
    """One wrong change, and the tests that must fail with it."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]
    build: int = 0  # faults of C++ with one number share a build: none reaches another's tests

    @property
    def compiled(self) -> bool:
        """Whether the change takes a build."""
        return self.file.endswith((".cpp", ".h"))


def read_faults() -> list[Fault]:
    """The list, Python first: its faults run with the extensions of the checkout."""
    entries = yaml.safe_load((HERE / "faults.yaml").read_text())
    return sorted((Fault(**entry) for entry in entries), key=lambda fault: fault.compiled)


def update_copy() -> None:
    """Make the copy equal to the checkout; equal files keep their time: nothing is recompiled."""
    wanted = set()
    for part in PARTS:
        place = ROOT / part
        for path in place.rglob("*") if place.is_dir() else [place]:
            if path.is_file() and "__pycache__" not in path.parts:
                wanted.add(path.relative_to(ROOT))
    for part in PARTS:
        place = COPY / part
        for path in place.rglob("*") if place.is_dir() else []:
            known = path.relative_to(COPY) in wanted or "__pycache__" in path.parts
            if path.is_file() and not known:
                path.unlink()
    for name in wanted:
        to = COPY / name
        if not (to.is_file() and filecmp.cmp(ROOT / name, to, shallow=False)):
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to)


def build() -> bool:
    """Compile the copy's CPU extensions in place; false if that fails."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"GFLOWGR_CUDA": "0", "PYTHONPATH": ""}
    with (COPY / "build.log").open("w") as log:
        done = subprocess.run(command, cwd=COPY, env=environment, stdout=log, stderr=log)
    # setup.py leaves out what it cannot build, and says so.
    return done.returncode == 0 and "failed to build" not in (COPY / "build.log").read_text()


def run_tests(tests: Sequence[str], log: Path) -> int | None:
    """pytest's exit code in the copy (negative: died by this signal); None: it took too long.

    Forked from this process, which has imported torch and transformers but nothing of the package.
    """
    child = os.fork()
    if child == 0:
        os.setsid()
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(COPY)
        os.environ["PYTHONPATH"] = str(COPY)
        sys.path[:] = [str(COPY), *(path for path in sys.path if Path(path).resolve() != ROOT)]
        import pytest

        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
        sys.stdout.flush()
        os._exit(int(code))
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def plant(faults: Sequence[Fault]) -> dict[Path, str]:
    """Change the copy; gives what the changed files held.

    Raises:
        ValueError: a fault's old text does not occur exactly once.
    """
    sound: dict[Path, str] = {}
    for fault in faults:
        path = COPY / fault.file
        text = path.read_text()
        if text.count(fault.old) != 1:
            raise ValueError(f"{fault.name}: its old text occurs {text.count(fault.old)} times")
        sound.setdefault(path, text)
        path.write_text(text.replace(fault.old, fault.new))
    return sound


def try_faults(faults: Sequence[Fault], logs: Path) -> int:
    """Plant faults together, run each one's tests, print verdicts; gives how many survived."""
    survived = 0
    sound = plant(faults)
    try:
        if faults[0].compiled and not build():
            print(f"BROKEN: does not compile, {COPY / 'build.log'}: {[f.name for f in faults]}")
            return len(faults)
        for fault in faults:
            log = logs / f"{re.sub(r'[^a-z0-9]+', '-', fault.name.lower())}.log"
            begin = time.monotonic()
            code = run_tests(fault.tests, log)
            seconds = time.monotonic() - begin
            survived += code in _NOT_FOUND
            print(f"{_verdict(code):22} {seconds:4.0f} s  {fault.file}: {fault.name}", flush=True)
    finally:
        for path, text in sound.items():
            path.write_text(text)
    return survived


# pytest's exit codes but 1 (a test failed): all passed, interrupted, its own error, usage, no test.
_NOT_FOUND = (0, 2, 3, 4, 5)


def _verdict(code: int | None) -> str:
    if code is None:
        return "killed (endless)"
    if code < 0:
        return f"killed (signal {-code})"
    return {0: "SURVIVED", 1: "killed"}.get(code, f"BROKEN (pytest: {code})")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per fault; 1 if one survived or cannot be planted."""
    parser = argparse.ArgumentParser("python tests/planted_faults", description=__doc__)
    parser.add_argument("words", nargs="*", help="only faults whose name or file contains one")
    words = parser.parse_args(arguments).words
    chosen = [
        fault
        for fault in read_faults()
        if not words or any(word in fault.name or word in fault.file for word in words)
    ]
    update_copy()
    os.environ["OMP_NUM_THREADS"] = "1"
    import hypothesis  # noqa: F401 (imported once, for all forks)
    import pytest  # noqa: F401
    import torch  # noqa: F401
    from transformers import Trainer  # noqa: F401

    logs = COPY / "logs"
    logs.mkdir(exist_ok=True)
    tests = sorted({test for fault in chosen for test in fault.tests})
    code = run_tests(tests, logs / "without-any-fault.log")
    if code != 0:
        print(f"the tests fail without any fault: {logs / 'without-any-fault.log'}")
        return 1
    groups: dict[str, list[Fault]] = {}
    for fault in chosen:
        groups.setdefault(f"build {fault.build}" if fault.compiled else fault.name, []).append(
            fault
        )
    failed = sum(try_faults(group, logs) for group in groups.values())
    print(f"{len(chosen) - failed} of {len(chosen)} faults were found")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
