"""Item identifiers: index files."""

from gflowgr.identifiers.index import Identifiers, from_codes, read_index, write_index

__all__ = ["Identifiers", "from_codes", "read_index", "write_index"]
