"""The prefix tree: build it, walk it, find the available nodes, save and load it (CPU only).

Random identifiers of 4 tokens, 256 codes a level (the worst case: real catalogues share more
prefixes). All of it runs on the CPU.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.harness.case import Case, Variant
from benchmarks.harness.checking import Check
from benchmarks.harness.constraints import (
    CsrMatrix,
    DictTrie,
    packed,
    prefix_keys,
    random_catalogue,
    random_tokens,
)
from benchmarks.harness.floors import Floor
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.judging import judge_equal
from benchmarks.harness.registry import Table, register
from benchmarks.harness.shapes import BEAUTY_ITEMS, CODES, LENGTH, Shape
from gflowgr.tree import PrefixTree
from gflowgr.tree import build as _tree_build
from gflowgr.tree.layout import build_numpy

_CPU = torch.device("cpu")
_VOCAB = LENGTH * CODES  # nothing but codes
_WALKS = 1_000_000
_AVAILABLE = 0.2
_SLOW_ITEMS = 1_000_000  # larger catalogues are not built in Python or NumPy


@dataclass(frozen=True)
class TreeShape(Shape):
    """A catalogue of random identifiers."""

    kind: ClassVar[str] = "tree"
    example: ClassVar[str] = "10m"
    few: ClassVar[dict[str, int]] = {"items": 1000}
    items: int


class Structure(Protocol):
    """The package's tree, the dict trie or the CSR matrix."""

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Distinct prefixes of 1, 2, ... tokens."""

    @property
    def nbytes_structure(self) -> int:
        """Bytes, the map from leaves to items apart."""


def _build(
    table: str,
    shape: TreeShape,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[str, ...],
) -> Case:
    case = Case(table, shape, _CPU, dtype, lambda seed: Inputs({}), {})
    case.notes.append(f"random identifiers of {LENGTH} tokens, {CODES} codes a level")
    return _PARTS[table.partition(".")[2]](case, shape, peers)


# ---- build ----


def _build_case(case: Case, shape: TreeShape, peers: tuple[str, ...]) -> Case:
    def make_inputs(seed: int) -> Inputs:
        return Inputs({"tokens": torch.from_numpy(random_tokens(shape.items, 0, seed))})

    def judge(found: Structure, sizes: Tensor) -> Check:
        if list(found.level_sizes) != sizes.tolist():
            return Check("wrong", f"prefixes per level {found.level_sizes}, not {sizes.tolist()}")
        return Check("ok", result_error=0.0, bytes_per_item=found.nbytes_structure / shape.items)

    case.make_inputs, case.judge, case.tolerance = make_inputs, judge, 0.0
    case.references = {"prefixes": _level_sizes}
    case.notes.append(
        "bytes per item: the structure; ours has beside it a map of 4 bytes an item (8 where items "
        "share an identifier)"
    )
    # Tokens are read, the tree is written: one range and token for each inner node, a token a leaf.
    sizes = _level_sizes(make_inputs(0)).tolist()
    nbytes = 4.0 * LENGTH * shape.items + 5.0 * sum(sizes[:-1]) + sizes[-1] + 4.0 * shape.items
    case.floors["bytes"] = Floor(0.0, nbytes)
    slow = shape.items > _SLOW_ITEMS

    def add(name: str, family: str, build: object, *, quick: bool = False) -> None:
        if slow and not quick:
            case.missing.append((name, f"over {_SLOW_ITEMS:,} items"))
            return
        case.variants.append(
            Variant(name, family, build, "prefixes", "bytes", trains=False)  # type: ignore[arg-type]
        )

    if _tree_build.host_module() is None:
        case.missing.append(("gflowgr, C++", "this installation has no compiled builder"))
    else:
        add("gflowgr, C++", "", _build_ours, quick=True)
    add("gflowgr, NumPy", "", _build_numpy)
    if "csr" in peers:
        add("CSR, NumPy", "csr", _build_csr, quick=True)
    if "transformers" in peers:
        add("dict trie", "dicts", _build_trie)
    return case


def _level_sizes(inputs: Inputs) -> Tensor:
    return torch.tensor([len(keys) for keys in prefix_keys(inputs["tokens"].numpy(), 0)])


def _build_ours(inputs: Inputs) -> Structure:
    return PrefixTree.from_identifiers(inputs["tokens"])


def _build_numpy(inputs: Inputs) -> Structure:
    return PrefixTree(torch.from_numpy(build_numpy(inputs["tokens"].numpy(), None)))


def _build_csr(inputs: Inputs) -> Structure:
    return CsrMatrix(inputs["tokens"].numpy(), 0)


def _build_trie(inputs: Inputs) -> Structure:
    return DictTrie(inputs["tokens"].numpy())


# ---- walk, availability ----


def _walk_case(case: Case, shape: TreeShape, peers: tuple[str, ...]) -> Case:
    items = random_catalogue(shape.items, _VOCAB, _CPU)
    count = min(_WALKS, shape.items)

    def make_inputs(seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        chosen = torch.randint(shape.items, (count,), generator=g)
        return Inputs({"tokens": items.tokens[chosen]})

    def reference(inputs: Inputs) -> Tensor:
        return torch.from_numpy(_nodes(prefix_keys(items.tokens.numpy(), 0), inputs["tokens"]))

    case.make_inputs, case.judge, case.tolerance = make_inputs, judge_equal, 0.0
    case.references = {"ranks": reference}
    case.notes.append(f"{count:,} walks from the root to a leaf")
    case.add_ours(
        "tree_walk", lambda inputs: items.tree.walk(inputs["tokens"]), "ranks", trains=False
    )
    return case


def _nodes(levels: list[npt.NDArray[np.uint32]], tokens: Tensor) -> npt.NDArray[np.int64]:
    """Nodes [..., L] above identifiers: breadth-first, so a level's first and a prefix's rank."""
    first, out = 1, []
    for length, keys in enumerate(levels, start=1):
        out.append(first + np.searchsorted(keys, packed(tokens[..., :length].numpy(), 0)))
        first += len(keys)
    return np.stack(out, axis=-1).astype(np.int64)


def _available_case(case: Case, shape: TreeShape, peers: tuple[str, ...]) -> Case:
    items = random_catalogue(shape.items, _VOCAB, _CPU)

    def make_inputs(seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        return Inputs({"available": torch.rand(shape.items, generator=g) < _AVAILABLE})

    def reference(inputs: Inputs) -> Tensor:
        live = torch.zeros(items.tree.num_nodes, dtype=torch.bool)
        levels = prefix_keys(items.tokens.numpy(), 0)
        live[torch.from_numpy(_nodes(levels, items.tokens[inputs["available"]])).flatten()] = True
        live[0] = bool(inputs["available"].any())
        return live

    case.make_inputs, case.judge, case.tolerance = make_inputs, judge_equal, 0.0
    case.references = {"prefixes": reference}
    case.notes.append(f"{_AVAILABLE:.0%} of the items are available; found: the nodes above them")
    case.variants.append(
        Variant(
            *("gflowgr", ""),
            lambda inputs: items.tree.available_nodes(inputs["available"]),
            "prefixes",
            trains=False,
        )
    )
    return case


# ---- files ----


def _files_case(case: Case, shape: TreeShape, peers: tuple[str, ...]) -> Case:
    items = random_catalogue(shape.items, _VOCAB, _CPU)
    folder = tempfile.TemporaryDirectory(prefix="gflowgr-bench-")
    loaded = Path(folder.name) / "tree.safetensors"
    items.tree.save(loaded)

    def save(inputs: Inputs) -> PrefixTree | Path:
        path = Path(folder.name) / "saved.safetensors"
        items.tree.save(path)
        return path

    def judge(found: PrefixTree | Path, wanted: Tensor) -> Check:
        tree = PrefixTree.load(found) if isinstance(found, Path) else found
        return judge_equal(tree.buffer, wanted)

    case.judge, case.tolerance = judge, 0.0
    case.references = {"tree": lambda inputs: items.tree.buffer}
    # A file in the page cache: the buffer is copied once.
    case.floors["copy"] = Floor(0.0, 2.0 * items.tree.nbytes)
    case.notes.append(f"{items.tree.nbytes / 1e6:.4g} MB, in the page cache")
    for name, run, floor in (
        ("save", save, "copy"),
        ("load", lambda inputs: PrefixTree.load(loaded), "copy"),
        ("load, memory-mapped", lambda inputs: PrefixTree.load(loaded, mmap=True), None),
    ):
        case.variants.append(Variant(name, "", run, "tree", floor, trains=False))
    return case


_PARTS = {
    "build": _build_case,
    "walk": _walk_case,
    "available": _available_case,
    "files": _files_case,
}

for _part in _PARTS:
    register(
        Table(
            f"tree.{_part}",
            _build,
            TreeShape,
            on_cpu=tuple(TreeShape(items) for items in (BEAUTY_ITEMS, 1_000_000, 10_000_000)),
        )
    )
