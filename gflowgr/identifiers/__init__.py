"""Item identifiers: index files, and tokenisers that make them from item vectors or texts."""

from gflowgr.data.index import Identifiers, from_codes, raw_codes, read_index, write_index
from gflowgr.identifiers.collisions import resolve_collisions
from gflowgr.identifiers.kmeans import fit_kmeans, residual_kmeans
from gflowgr.identifiers.learn import METHODS, learn_codes, outside_identifiers
from gflowgr.identifiers.letter import LetterConfig, fit_letter
from gflowgr.identifiers.quality import (
    Agreement,
    Quality,
    measure_quality,
    nearest_neighbours,
    quality_table,
)
from gflowgr.identifiers.quantisation import Quantisation
from gflowgr.identifiers.rqvae import RqVaeConfig, fit_rqvae
from gflowgr.identifiers.text import encode_texts, item_texts, text_embeddings
from gflowgr.identifiers.tokeniser import Tokeniser, tokeniser_path

__all__ = [
    "METHODS",
    "Agreement",
    "Identifiers",
    "LetterConfig",
    "Quality",
    "Quantisation",
    "RqVaeConfig",
    "Tokeniser",
    "encode_texts",
    "fit_kmeans",
    "fit_letter",
    "fit_rqvae",
    "from_codes",
    "item_texts",
    "learn_codes",
    "measure_quality",
    "nearest_neighbours",
    "outside_identifiers",
    "quality_table",
    "raw_codes",
    "read_index",
    "residual_kmeans",
    "resolve_collisions",
    "text_embeddings",
    "tokeniser_path",
    "write_index",
]
