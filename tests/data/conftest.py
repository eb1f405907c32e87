"""Small data folders written by the tests themselves."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WriteBundle = Callable[..., Path]


@pytest.fixture
def write_bundle(tmp_path: Path) -> WriteBundle:
    """write_bundle(inter={...}, item={...}, cart={...}): a folder with ``<name>.json.gz`` files."""

    def write(**files: Any) -> Path:
        folder = tmp_path / "shop"
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            name = name.replace("index_", "index.")
            (folder / f"{name}.json.gz").write_bytes(gzip.compress(text.encode()))
        return folder

    return write
