"""What can be checked of the Dockerfile without Docker."""

from __future__ import annotations

import re
import shlex
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "Dockerfile").is_file(), reason="needs the source tree")


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def test_its_instructions_are_docker_s_and_its_shell_lines_are_shell() -> None:
    known = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "WORKDIR"}
    assert {word for word, _ in instructions()} == known
    for word, rest in instructions():
        if word == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)
    stages = [rest for word, rest in instructions() if word == "FROM"]
    assert [stage.partition(" AS ")[2] for stage in stages] == ["build", ""]
    assert any(rest.startswith("--from=build /opt/gflowgr ") for _, rest in instructions())


def test_it_installs_torch_first_and_extras_that_there_are() -> None:
    installs = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    assert "pip install --no-cache-dir torch $" in installs[0]
    assert '".[$EXTRAS]"' in installs[1]
    (extras,) = (rest[7:] for word, rest in instructions() if rest.startswith("EXTRAS="))
    text = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = ", text, re.MULTILINE) for extra in extras.split(","))
    # The check at the end of the build, as it stands there.
    check = shlex.split(installs[1].partition("&& python -c ")[2])[0]
    compile(check, "Dockerfile", "exec")
    assert "cpp_missing" in check


def test_what_the_build_needs_reaches_it() -> None:
    patterns = (ROOT / ".dockerignore").read_text().split()
    needed = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"]
    for folder in ("gflowgr", "csrc", "kernels"):
        needed += [str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.[cphy]*")]
    kept = [name for name in needed if not name.endswith((".so", ".pyc"))]
    for name in kept:
        parts = [name, *(str(parent) for parent in Path(name).parents)]
        matched = [(p, part) for p in patterns for part in parts if fnmatch(part, p)]
        assert not [m for m in matched if "__pycache__" not in m[0]], matched
    assert (ROOT / "setup.py").is_file()
