"""The split that the tests of evaluation share."""

from __future__ import annotations

import pytest
from support.tiny_split import tiny_split

from gflowgr.data import LeaveOneOut


@pytest.fixture
def split() -> LeaveOneOut:
    """Four evaluated users, eight items, histories of at most two items."""
    return tiny_split()
