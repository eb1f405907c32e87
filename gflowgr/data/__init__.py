"""Data sets: reading, writing, importing, generating, splitting and training examples."""

from gflowgr.data.builtin import generate_builtin
from gflowgr.data.bundle import check_target, load_dataset, save_dataset
from gflowgr.data.dataset import Dataset
from gflowgr.data.examples import TrainingExamples
from gflowgr.data.importers import (
    ImportReport,
    import_amazon,
    import_movielens,
    import_recbole,
    import_table,
    import_yelp,
)
from gflowgr.data.padding import pad_histories
from gflowgr.data.ragged import Ragged
from gflowgr.data.renumber import with_items_of
from gflowgr.data.split import LeaveOneOut, Split
from gflowgr.data.temporal import TemporalSplit, make_split

__all__ = [
    "Dataset",
    "ImportReport",
    "LeaveOneOut",
    "Ragged",
    "Split",
    "TemporalSplit",
    "TrainingExamples",
    "check_target",
    "generate_builtin",
    "import_amazon",
    "import_movielens",
    "import_recbole",
    "import_table",
    "import_yelp",
    "load_dataset",
    "make_split",
    "pad_histories",
    "save_dataset",
    "with_items_of",
]
