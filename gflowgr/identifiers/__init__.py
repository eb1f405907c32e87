"""Item identifiers: index files, and residual k-means where none are published."""

from gflowgr.identifiers.index import Identifiers, from_codes, read_index, write_index
from gflowgr.identifiers.kmeans import residual_kmeans, text_embeddings

__all__ = [
    "Identifiers",
    "from_codes",
    "read_index",
    "residual_kmeans",
    "text_embeddings",
    "write_index",
]
