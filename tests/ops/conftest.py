"""Backends as fixtures: what cannot run here is skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gflowgr import backends


@pytest.fixture(params=["torch", "cpp"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that runs here, forced."""
    name: str = request.param
    if name == "cpp" and (missing := backends.cpp_missing()):
        pytest.skip(missing)
    with backends.backend(name):
        yield name


@pytest.fixture
def cpp() -> Iterator[None]:
    if missing := backends.cpp_missing():
        pytest.skip(missing)
    with backends.backend("cpp"):
        yield
