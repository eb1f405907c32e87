"""Importers of raw public formats; each gives ``(Dataset, ImportReport)``."""

from gflowgr.data.importers.amazon import import_amazon
from gflowgr.data.importers.build import ImportReport
from gflowgr.data.importers.movielens import import_movielens
from gflowgr.data.importers.recbole import import_recbole
from gflowgr.data.importers.table import import_table
from gflowgr.data.importers.yelp import import_yelp

__all__ = [
    "ImportReport",
    "import_amazon",
    "import_movielens",
    "import_recbole",
    "import_table",
    "import_yelp",
]
