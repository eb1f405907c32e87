"""``gflowgr data import``: from command-line options to an importer."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data import Dataset
from ..data.importers import (
    ImportReport,
    import_amazon,
    import_movielens,
    import_table,
    import_yelp,
)

__all__ = ["import_raw"]
