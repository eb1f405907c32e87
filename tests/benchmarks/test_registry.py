"""What can be asked for on the command line of the benchmark."""

from __future__ import annotations

import pytest
import torch

from benchmarks.beam_step import StepShape
from benchmarks.catalogue_scores import ScoreShape
from benchmarks.harness import ours, registry
from benchmarks.harness.case import Case, Variant
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.peers import KEYS, read_peers
from benchmarks.harness.registry import Table, build_case, read_shape, read_tables
from benchmarks.harness.shapes import CODES, LossShape
from benchmarks.search import SearchShape
from benchmarks.train_step import StepShape as TrainStepShape
from benchmarks.training import TrainingShape
from benchmarks.tree import TreeShape

TABLES = read_tables([])


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
    assert shape == LossShape("2x3x4x5x6", 2, 3, 4, 5, 6)
    assert read_shape(shape.text) == shape
    assert shape.rows == 2 * 3 * 4


def test_an_op_and_its_sizes_are_a_shape() -> None:
    assert read_shape("beam_step:64x20x33124x10m") == StepShape(64, 20, 33124, 10_000_000)
    assert read_shape("Search-T5:8x60x20x12k") == SearchShape("t5", 8, 60, 20, 12_000)
    assert read_shape("search-qwen3:1x512x20x12101") == SearchShape("qwen3", 1, 512, 20, 12101)
    assert read_shape("catalogue_scores:4x60x12101") == ScoreShape(4, 60, 12101)
    assert read_shape("tree:100m") == TreeShape(100_000_000)
    assert read_shape("tree:100m").text == "tree:100m"
    trained = TrainStepShape("t5", 128, 80, 4, 12101)
    assert read_shape("train_step-t5:128x80x4x12101") == read_shape(trained.text) == trained
    assert read_shape("training-tiger:2x3x4") == TrainingShape("tiger", 2, 3, 4)


def test_a_warm_up_is_of_few_prompts_and_items() -> None:
    assert read_shape("beam_step:64x20x1027x10m").small() == StepShape(2, 20, 1027, 1000)
    assert read_shape("beam_step:1x20x1027x9").small() == StepShape(1, 20, 1027, 9)
    assert read_shape("training-small:128x16x50").small() == TrainingShape("small", 128, 2, 50)
    assert read_shape("letter").small() == LossShape("letter", 2, 4, 4, 512, 33024)


def test_a_shape_fits_the_tables_of_its_op() -> None:
    kinds = (
        "2x2x2x2x2",
        "beam_step:1x1x1024x1",
        "search-t5:1x1x1x1",
        "catalogue_scores:1x1x1",
        "item_flows:1x1",
        "sequences:1x1x1",
        "tree:1",
        "train_step-t5:1x4x2x9",
        "training-small:2x1x9",
    )
    fitting = {text: [t.name for t in TABLES if t.fits(read_shape(text))] for text in kinds}
    assert sorted(name for names in fitting.values() for name in names) == sorted(
        table.name for table in TABLES
    )
    assert fitting["beam_step:1x1x1024x1"] == ["beam_step.logits", "beam_step.hidden"]
    assert fitting["catalogue_scores:1x1x1"] == ["catalogue_scores"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "beam_step:1x2x3",
            "must be beam_step:PROMPTSxBEAMSxVOCABxITEMS, such as beam_step:64x20x33124x10m",
        ),
        ("beam_step-t5:1x2x3x4", "must be beam_step:PROMPTSxBEAMSxVOCABxITEMS"),
        ("beam_step:1x2x1023x9", "VOCAB must be at least 1024; got 1023"),
        ("tree:10g", "must be tree:ITEMS, such as tree:10m"),
        ("train_step-qwen3:1x10x4x9", "SOURCE must be a multiple of 4; got 10"),
        ("search-t5:0x1x1x1", "every size must be at least 1; got 0"),
        ("search-bart:1x1x1x1", "MODEL must be any of t5, gpt2, qwen3, decoder; got 'bart'"),
        ("search:1x1x1x1", "MODEL must be any of t5, gpt2, qwen3, decoder; got ''"),
        (
            "bart:1x1x1x1",
            "before the colon must be any of beam_step, catalogue_scores, item_flows, search",
        ),
        ("flow_loss:1x1x1x1", "before the colon must be any of beam_step"),
        ("big", "shape must be a name \\(letter, llm, tiger"),
        ("1x2x3x4", "five whole numbers such as 256x4x4x512x33024"),
        ("1x2x3x4x-5", "BxNxLxdxV"),
        ("1x2x0x4x5", "every size must be at least 1"),
        ("", "must be a name"),
    ],
)
def test_what_is_no_shape_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_shape(text)


def test_an_op_stands_for_its_tables() -> None:
    def names(*asked: str) -> list[str]:
        return [table.name for table in read_tables(asked)]

    assert len(set(names())) == len(names()) == len(TABLES)
    assert names("flow_loss", "logprobs_dense.fused") == [
        "flow_loss.tb",
        "flow_loss.db",
        "flow_loss.subtb",
        "flow_loss.vargrad",
        "logprobs_dense.fused",
    ]
    assert names("beam_step", "beam_step") == ["beam_step.logits", "beam_step.hidden"]
    for unknown in ("ray", "beam_step.ray", "harness", "readme_results", ""):
        with pytest.raises(ValueError, match=f"op must be any of beam_step, .*got '{unknown}'"):
            names(unknown)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_table_has_shapes(table: Table) -> None:
    assert table.on_cpu
    assert bool(table.on_gpu) == (table.op not in ("tree", "item_flows", "sequences"))
    for shape in (*table.on_cpu, *table.on_gpu):
        assert table.fits(shape)
        assert table.refuse(shape) is None
        assert read_shape(shape.label) == shape
        assert read_shape(shape.text).text == shape.text


def test_a_tree_needs_room_for_its_codes() -> None:
    """Codebooks are the last rows of the head, one of 256 per level."""
    (children,) = read_tables(["logprobs_children.fused"])
    (dense,) = read_tables(["logprobs_dense.fused"])
    least = LossShape("least", 1, 1, 3, 8, 3 * CODES)
    assert least.first_code == 0
    assert children.refuse(least) is None
    less = LossShape("less", 1, 1, 3, 8, 3 * CODES - 1)
    assert children.refuse(less) == "V must be at least L * 256 = 768; got 767"
    assert dense.refuse(LossShape("less", 1, 1, 3, 8, 5)) is None


def test_another_op_joins_by_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_TABLES", dict(registry._TABLES))

    def build(name: str, shape: LossShape, device: torch.device, *rest: object) -> Case:
        case = Case(name, shape, device, torch.float32, lambda seed: Inputs({}), {})
        case.variants.append(Variant("gflowgr", "", lambda inputs: 1, "nothing", trains=False))
        return case

    toy = Table("toy.first", build, LossShape, on_cpu=(LossShape("1x1x1x1x1", 1, 1, 1, 1, 1),))
    registry.register(toy)
    assert read_tables(["toy"]) == read_tables(["toy.first"]) == [toy]
    assert toy in read_tables([])
    case = build_case("toy.first", toy.on_cpu[0], torch.device("cpu"), torch.float32, ())
    assert case.title == "toy.first, 1x1x1x1x1, float32 (T 1 = B 1, N 1, L 1; d 1, V 1)"
    with pytest.raises(ValueError, match=r"name of a table must be new; got 'toy.first' again"):
        registry.register(toy)


def test_peers_are_named() -> None:
    assert read_peers(None) == KEYS
    assert read_peers(["none"]) == ()
    assert read_peers(["trl", "torch"]) == ("torch", "trl")
    with pytest.raises(ValueError, match=r"peer must be none, or any of torch.*got 'jax'"):
        read_peers(["jax"])


def test_a_name_that_no_op_has_is_an_error_and_not_a_table_without_our_kernels() -> None:
    with pytest.raises(ValueError, match=r"ops must be the beginning of one of .*got 'head_'"):
        ours.usable_backends("head_", torch.device("cpu"), torch.float32)
