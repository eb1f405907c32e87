"""What can be asked for on the command line of the benchmark."""

from __future__ import annotations

import pytest

from gflowgr.benchmarking.peers import KEYS, read_peers
from gflowgr.benchmarking.shapes import (
    CODES,
    GROUPS,
    NAMED,
    OPS,
    Shape,
    default_shapes,
    read_ops,
    read_shape,
    shape_problem,
)


def test_a_named_shape_is_the_published_size() -> None:
    letter = read_shape("letter")
    assert (letter.rows, letter.d, letter.V) == (4096, 512, 33024)
    llm = read_shape("llm")
    assert (llm.rows, llm.d, llm.V) == (1024, 1024, 152064)
    tiger = read_shape("tiger")
    assert (tiger.rows, tiger.d, tiger.V) == (4096, 128, 1027)
    assert read_shape("letter-gpu").rows == 65536


def test_numbers_are_a_shape() -> None:
    shape = read_shape("2X3x4x5x6")
    assert shape == Shape("2x3x4x5x6", 2, 3, 4, 5, 6)
    assert read_shape(shape.text) == shape
    assert shape.rows == 2 * 3 * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("big", "shape 'big' is neither a name \\(letter, llm, tiger"),
        ("1x2x3x4", "five whole numbers such as 256x4x4x512x33024"),
        ("1x2x3x4x-5", "nor BxNxLxdxV"),
        ("1x2x0x4x5", "every size must be at least 1"),
        ("", "neither a name"),
    ],
)
def test_what_is_no_shape_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_shape(text)


def test_groups_stand_for_their_ops() -> None:
    assert read_ops([]) == list(OPS)
    assert read_ops(["reductions", "head-frozen"]) == [
        "head-frozen",
        "tb",
        "db",
        "subtb",
        "vargrad",
    ]
    assert read_ops(["tree", "tree"]) == ["tree", "tree-frozen"]
    with pytest.raises(ValueError, match="op 'beam' is unknown; groups: head, logprobs"):
        read_ops(["beam"])


def test_every_op_has_shapes_on_both_devices() -> None:
    for op in OPS:
        for device in ("cpu", "cuda"):
            shapes = default_shapes(op, device)
            assert shapes
            assert all(shape_problem(op, shape) is None for shape in shapes)
            assert all(NAMED[shape.name] == shape for shape in shapes)


def test_a_tree_needs_room_for_its_codes() -> None:
    """Codebooks are the last rows of the head, one of 256 per level."""
    least = Shape("least", 1, 1, 3, 8, 3 * CODES)
    assert least.first_code == 0
    assert shape_problem("tree", least) is None
    assert shape_problem("tree", Shape("less", 1, 1, 3, 8, 3 * CODES - 1)) == (
        "the tree needs V of at least L * 256 = 768, got 767"
    )
    assert shape_problem("head", Shape("less", 1, 1, 3, 8, 5)) is None


def test_peers_are_named() -> None:
    assert read_peers(None) == KEYS
    assert read_peers(["none"]) == ()
    assert read_peers(["trl", "torch"]) == ("torch", "trl")
    with pytest.raises(ValueError, match="peer 'jax' is unknown; expected none, or any of torch"):
        read_peers(["jax"])


def test_groups_cover_all_ops_once() -> None:
    assert sorted(OPS) == sorted(op for ops in GROUPS.values() for op in ops)
    assert len(set(OPS)) == len(OPS)
