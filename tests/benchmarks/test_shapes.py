"""What can be asked for on the command line of the benchmark."""

from __future__ import annotations

import pytest

from benchmarks.harness.peers import KEYS, read_peers
from benchmarks.harness.shapes import (
    CODES,
    GROUPS,
    OPS,
    ScoreShape,
    SearchShape,
    Shape,
    StepShape,
    TrainShape,
    TreeShape,
    default_shapes,
    fits,
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


def test_a_kind_and_its_numbers_are_a_shape() -> None:
    assert read_shape("beam:64x20x33124x10m") == StepShape(64, 20, 33124, 10_000_000)
    assert read_shape("T5:8x60x20x12k") == SearchShape("t5", 8, 60, 20, 12_000)
    assert read_shape("qwen3:1x512x20x12101") == SearchShape("qwen3", 1, 512, 20, 12101)
    assert read_shape("score:4x60x12101") == ScoreShape(4, 60, 12101)
    assert read_shape("tree:100m") == TreeShape(100_000_000)
    assert read_shape("tree:100m").text == "tree:100m"
    trained = TrainShape("t5", 128, 80, 4, 12101)
    assert read_shape("train-t5:128x80x4x12101") == read_shape(trained.text) == trained


def test_a_shape_fits_the_ops_of_its_kind() -> None:
    kinds = (
        "2x2x2x2x2",
        "beam:1x1x1024x1",
        "t5:1x1x1x1",
        "score:1x1x1",
        "tree:1",
        "train-t5:1x4x2x9",
        "sft-small:2x1x9",
    )
    fitting = {text: [op for op in OPS if fits(op, read_shape(text))] for text in kinds}
    assert sorted(op for ops in fitting.values() for op in ops) == sorted(OPS)
    assert fitting["beam:1x1x1024x1"] == ["beam", "beam-hidden"]
    assert fitting["score:1x1x1"] == ["score"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beam:1x2x3", "expected beam:PROMPTSxBEAMSxVxITEMS, such as beam:64x20x33124x10m"),
        ("beam:1x2x1023x9", "V must be at least 1024"),
        ("tree:10g", "expected tree:ITEMS, such as tree:10m"),
        ("train-qwen3:1x10x4x9", "SOURCE must be a multiple of 4"),
        ("t5:0x1x1x1", "every size must be at least 1"),
        ("bart:1x1x1x1", "'bart' is none of beam, score, tree, t5, gpt2, qwen3"),
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
    assert read_ops(["children", "children"]) == ["children", "children-frozen"]
    assert read_ops(["decode"]) == ["beam", "beam-hidden", "search", "score"]
    with pytest.raises(ValueError, match="op 'ray' is unknown; groups: head, logprobs"):
        read_ops(["ray"])


def test_every_op_has_shapes_on_both_devices() -> None:
    for op in OPS:
        for device in ("cpu", "cuda"):
            shapes = default_shapes(op, device)
            assert shapes
            assert all(fits(op, shape) for shape in shapes)
            assert all(shape_problem(op, shape) is None for shape in shapes)
            assert all(read_shape(shape.name) == shape for shape in shapes)
            assert all(read_shape(shape.text).text == shape.text for shape in shapes)


def test_a_tree_needs_room_for_its_codes() -> None:
    """Codebooks are the last rows of the head, one of 256 per level."""
    least = Shape("least", 1, 1, 3, 8, 3 * CODES)
    assert least.first_code == 0
    assert shape_problem("children", least) is None
    assert shape_problem("children", Shape("less", 1, 1, 3, 8, 3 * CODES - 1)) == (
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
