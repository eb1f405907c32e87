"""Every way of loading a tree validates it before use."""

from __future__ import annotations

import json
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

import gflowgr
from gflowgr import DataError, PrefixTree
from gflowgr.ops.beam_step.op import beam_step, beam_step_hidden
from gflowgr.tree.build import host_module
from gflowgr.tree.check import check_numpy, read_layout
from gflowgr.tree.facts import accept
from gflowgr.tree.layout import LEVEL_WORDS, WORDS, Buffer, TreeLayout, build_numpy, section

Damage = Callable[[Buffer, TreeLayout], object]

# Nodes: 1..3 are (1,), (3,), (6,); 4..6 are (1, 2), (1, 4), (1, 7), the children of 1.
ROWS = [(1, 2, 0), (1, 2, 3), (1, 4), (1, 7, 5), (3, 2, 5), (3, 3, 1), (3, 3, 1), (6, 9, 9)]


def words(buffer: Buffer, layout: TreeLayout) -> npt.NDArray[np.int64]:
    return section(buffer, 0, WORDS + LEVEL_WORDS * layout.max_length, np.int64)


def put(name: str, index: int, value: int) -> Damage:
    """The damage of one value of one section."""

    def damage(buffer: Buffer, layout: TreeLayout) -> None:
        if name == "tokens":
            kind, offset, index_ = f"u{layout.token_bytes[1]}", layout.token_offset[1], index
        else:
            kind = f"i{layout.index_bytes}" if name == "child_begin" else "i4"
            offset, index_ = getattr(layout, name), index
        section(buffer, offset, index_ + 1, kind)[index_] = value

    return damage


def word(index: int, value: int) -> Damage:
    return lambda buffer, layout: words(buffer, layout).__setitem__(index, value)


def level_word(level: int, index: int, value: int) -> Damage:
    return word(WORDS + LEVEL_WORDS * level + index, value)


DAMAGES: list[tuple[Damage, str]] = [
    (word(15, 1), "vocab_size = 1, but the largest token is 9"),
    (word(15, 2**31), "vocab_size = 2147483648, but the largest token is 9"),
    (word(15, -1), "counts and offsets"),
    (word(7, 2**31 - 1), r"num_items = 2147483647, but the largest item id is 7"),
    (word(5, 6), "num_leaves = 6, but there are 7"),
    (word(8, 3), "counts and offsets"),
    (word(2, 2**40), "max_length"),
    (word(3, 2**62), "counts and offsets"),
    (level_word(1, 2, 10**6), "vocab_size = 10, but the largest token is 1000007"),
    (level_word(1, 2, 2**31 - 1), r"token_base\[1\] = 2147483647 makes a token of 2147483654"),
    (level_word(1, 2, -5), "counts and offsets"),
    (level_word(1, 2, 2**62), "counts and offsets"),
    (level_word(0, 4, 0), "counts and offsets"),
    (level_word(1, 4, 2), r"max_children\[1\] = 2, but it is 3"),
    (level_word(2, 0, 5), "counts and offsets"),
    (put("child_begin", 0, 0), r"child_begin\[0\] must be 1; got 0"),
    (put("child_begin", 1, 5), r"child_begin\[1\] must be 4; got 5"),
    (put("child_begin", 2, 3), r"child_begin\[2\] = 3 is below the one before it"),
    (put("child_begin", 3, -(2**31)), r"child_begin\[3\] = -2147483648 is below"),
    # Ascending, but node 2 would have a child at the next level but one.
    (put("child_begin", 3, 12), r"child_begin\[3\] must be at most 10; got 12"),
    (put("child_begin", 2, 4), r"node 1 has no child and ends no identifier"),
    (put("child_begin", 10, 2**30), r"child_begin\[10\] must be 16; got 1073741824"),
    (put("leaf_rank", 1, 1), r"leaf_rank\[1\] = 1 does not count leaves"),
    (put("leaf_rank", 6, 2**31 - 1), r"leaf_rank\[6\] = 2147483647 does not count leaves"),
    (put("leaf_rank", 7, -1), r"leaf_rank\[7\] = -1 does not count leaves"),
    (put("leaf_rank", 6, 0), r"node 5 has no child and ends no identifier"),
    (put("tokens", 1, 0), "the token of node 5 is not above the one of the child before it"),
    (put("tokens", 2, 2), "the token of node 6 is not above the one of the child before it"),
    (put("tokens", 5, 200), "vocab_size = 10, but the largest token is 202"),
    (put("item_ids", 0, 2**30), r"item_ids\[0\] must be 0\.\.7; got 1073741824"),
    (put("item_ids", 0, -(2**31)), r"item_ids\[0\] must be 0\.\.7; got -2147483648"),
    (put("item_ids", 3, 0), r"item_ids\[3\] = 0 is there twice|num_items"),
    (put("item_begin", 0, 1), r"item_begin\[0\] must be 0; got 1"),
    (put("item_begin", 2, 2**30), r"item_begin\[2\] = 1073741824 is not above|beyond"),
    (put("item_begin", 2, -(2**31)), r"item_begin\[2\] = -2147483648 is not above"),
    (put("item_begin", 7, 7), r"item_begin\[7\] = 7 is not above|must be 8; got"),
]


def damaged(damage: Damage, index_bytes: int | None = None) -> Buffer:
    tokens = np.full((len(ROWS), 3), -1)
    for row, identifier in zip(tokens, ROWS, strict=True):
        row[: len(identifier)] = identifier
    buffer = build_numpy(tokens, None, index_bytes)
    damage(buffer, read_layout(buffer))
    return buffer


def write(path: Path, buffer: Buffer) -> Path:
    save_file({"tree": torch.from_numpy(buffer)}, path, {"format": "gflowgr.prefix_tree"})
    return path


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_tree_is_refused_by_every_loader(
    damage: Damage, message: str, tmp_path: Path
) -> None:
    buffer = damaged(damage)
    path = write(tmp_path / "tree.safetensors", buffer)
    for mmap in (False, True):
        with pytest.raises(DataError, match=rf"tree\.safetensors: .*({message})"):
            PrefixTree.load(path, mmap=mmap)
    with pytest.raises(ValueError, match=message):
        PrefixTree(torch.from_numpy(buffer))
    with pytest.raises(ValueError, match=message):
        torch.ops.gflowgr.tree_walk(torch.zeros(1, 1).long(), None, torch.from_numpy(buffer))


@pytest.mark.parametrize("index_bytes", [4, 8])
def test_cpp_and_numpy_say_the_same_of_every_damage(index_bytes: int) -> None:
    host = host_module()
    if host is None:
        pytest.skip("gflowgr._host was not built")
    sound = damaged(lambda *_: None, index_bytes)
    assert host.check_tree(sound) == check_numpy(sound, read_layout(sound)) == [7, 10, 10]
    refused = 0
    for damage, _ in DAMAGES:
        buffer = damaged(damage, index_bytes)
        try:
            layout = read_layout(buffer)
        except ValueError:
            continue  # the header: one check for both
        with pytest.raises(ValueError, match="damaged prefix tree: ") as by_numpy:
            check_numpy(buffer, layout)
        with pytest.raises(ValueError, match="damaged prefix tree: ") as by_cpp:
            host.check_tree(buffer)
        assert str(by_cpp.value) == str(by_numpy.value)
        refused += 1
    assert refused > 20


def test_cpp_and_numpy_say_the_same_of_random_flips() -> None:
    host = host_module()
    if host is None:
        pytest.skip("gflowgr._host was not built")
    random = np.random.default_rng(0)
    sound = damaged(lambda *_: None)
    header = 8 * len(words(sound, read_layout(sound)))
    outcomes = set()
    for _ in range(2_000):
        buffer = sound.copy()
        buffer[random.integers(header, len(buffer))] ^= 1 << random.integers(8)
        said = []
        for check in (
            lambda b=buffer: check_numpy(b, read_layout(b)),
            lambda b=buffer: host.check_tree(b),
        ):
            try:
                said.append(str(check()))
            except ValueError as error:
                said.append(str(error))
        assert said[0] == said[1]
        outcomes.add(said[0])
    assert len(outcomes) > 50


def test_who_trusts_a_file_is_not_delayed_and_its_tokens_still_bound_the_head(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "tree.safetensors", damaged(word(15, 1)))
    tree = PrefixTree.load(path, mmap=True, trust=True)
    assert tree.vocab_size == 10  # what the tokens say, not the header
    with pytest.raises(ValueError, match="vocab_size = 1"):
        pickle.loads(pickle.dumps(tree))  # trust does not travel


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("backend", [None, "torch", "cpp"])
def test_no_op_indexes_a_head_by_a_header(backend: str | None, validate: bool) -> None:
    """The header says that one token is enough; the head has three rows, the tree needs ten."""
    if backend == "cpp" and gflowgr.backends.cpp_missing() is not None:
        pytest.skip(str(gflowgr.backends.cpp_missing()))
    tree = PrefixTree(torch.from_numpy(damaged(word(15, 1))), trust=True)
    hidden, weight = torch.randn(1, 1, 3, 4), torch.randn(3, 4, requires_grad=True)
    tokens, nodes = torch.tensor([[[1, 2, 0]]]), torch.zeros(1, 1).long()
    scores, step = torch.zeros(1, 1), ("children", 1.0, None, None, 2)
    head, raw = (hidden, weight, None, tokens, None), tree.buffer
    empty = torch.empty(0)
    calls = [
        lambda: gflowgr.trajectory_logprobs(hidden, weight, tokens, tree=tree),
        lambda: gflowgr.trajectory_logprobs(hidden, weight, tokens, tree=tree, sparse_grad=True),
        lambda: gflowgr.trajectory_logprobs(hidden, weight, tokens, tree=tree, normalize="level"),
        lambda: beam_step(hidden[0, :, :1, :3], scores, nodes, tree, width=2),
        lambda: beam_step_hidden(
            hidden[0, :, :1], weight, None, scores, nodes, tree, width=2, normalize="level"
        ),
        # Below the checks of the Python functions.
        lambda: torch.ops.gflowgr.children_logprobs(*head, raw, 1.0, 0, False),
        lambda: torch.ops.gflowgr.children_backward(
            tokens.float(), *head, raw, 1.0, tokens.float(), empty, tokens, True, True, False, False
        ),
        lambda: torch.ops.gflowgr.beam_step(hidden[0, :, :1, :3], scores, nodes, raw, *step),
        lambda: torch.ops.gflowgr.beam_step_hidden(
            hidden[0, :, :1], weight, None, scores, nodes, raw, *step
        ),
    ]
    with gflowgr.ops.validation(validate), gflowgr.backend(backend):
        for call in calls:
            with pytest.raises(ValueError, match=r"must cover every token|holds tokens up to 9"):
                call()


def test_the_compiled_ops_compare_tokens_with_the_head_themselves() -> None:
    if gflowgr.backends.cpp_missing() is not None:
        pytest.skip(str(gflowgr.backends.cpp_missing()))
    raw = torch.from_numpy(damaged(word(15, 1)))
    hidden, weight, tokens = torch.randn(1, 1, 3, 4), torch.randn(3, 4), torch.tensor([[[1, 2, 0]]])
    nodes, scores = torch.zeros(1, 1).long(), torch.zeros(1, 1)
    step = (None, "children", 1.0, None, None, None, None, 2)
    cpp = torch.ops.gflowgr_cpp
    for call in (
        lambda: cpp.children_logprobs(hidden, weight, None, tokens, None, raw, 1.0, 0),
        lambda: cpp.beam_step(hidden[0, :, :1, :3].contiguous(), scores, nodes, raw, *step),
        lambda: cpp.beam_step_hidden(
            hidden[0, :, :1].contiguous(), weight, None, scores, nodes, raw, *step
        ),
    ):
        with pytest.raises((RuntimeError, IndexError), match="the tree holds token"):
            call()


def test_a_buffer_written_to_is_proved_again() -> None:
    tree = PrefixTree.from_identifiers(ROWS)
    assert tree.walk([[1, 4]]).tolist() == [[1, 5]]
    tree.buffer[:128].view(torch.int64)[15] = 1
    with pytest.raises(ValueError, match="vocab_size = 1"):
        tree.walk([[1, 4]])


def test_a_buffer_is_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs = []
    check = gflowgr.tree.facts.check_tree
    monkeypatch.setattr(
        "gflowgr.tree.facts.check_tree", lambda *given: proofs.append(1) or check(*given)
    )
    buffer = PrefixTree.from_identifiers(ROWS).buffer.clone()
    for _ in range(3):
        PrefixTree(buffer).walk([[1, 4]])
        torch.ops.gflowgr.tree_walk(torch.zeros(1, 1).long(), None, buffer)
    assert proofs == [1]
    PrefixTree.from_identifiers(ROWS).walk([[1, 4]])  # the builder needs no proof
    assert proofs == [1]


@pytest.mark.parametrize("compiled", [True, False])
def test_an_update_of_a_damaged_tree_raises(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr("gflowgr.tree.update.host_module", lambda: None)
    for damage in (put("child_begin", 2, 2**30), put("item_ids", 0, -(2**31)), word(7, 2**31 - 1)):
        tree = PrefixTree(torch.from_numpy(damaged(damage)), trust=True)
        with pytest.raises(ValueError, match="damaged prefix tree"):
            tree.without_items([1])
        with pytest.raises(ValueError, match="damaged prefix tree"):
            tree.with_items([(5, 5)], [100])


def test_what_is_no_buffer_is_named() -> None:
    buffer = PrefixTree.from_identifiers(ROWS).buffer
    for wrong, message in (
        (buffer[:-64], "it must be .* bytes; got"),
        (buffer[1:], "multiple of 8"),
        (buffer.repeat_interleave(2)[::2], "contiguous"),
        (buffer.view(torch.int8), "uint8"),
        (buffer[:100], "uint8"),
        (torch.zeros(4096, dtype=torch.uint8), "mark"),
    ):
        with pytest.raises(ValueError, match=message):
            PrefixTree(wrong)
    with pytest.raises(TypeError, match="buffer of a prefix tree; got bytes"):
        accept(buffer.numpy().tobytes())  # type: ignore[arg-type]


def test_the_proof_takes_less_than_a_fifth_of_a_second_per_100_megabytes() -> None:
    if host_module() is None:
        pytest.skip("gflowgr._host was not built: the proof is NumPy's")
    tokens = np.random.default_rng(0).integers(0, 256, (500_000, 4), dtype=np.int32)
    buffer = PrefixTree.from_identifiers(tokens).buffer.numpy()
    layout = read_layout(buffer)
    best = min(_seconds(lambda: host_module().check_tree(buffer)) for _ in range(7))
    assert best / layout.total_bytes < 0.2 / 100e6


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()  # other processes do not count
    call()
    return time.process_time() - start


# ---------------------------------------------------------------------- the file's own header

SMALL = PrefixTree.from_identifiers([(1, 2), (3, 4)]).buffer.numpy().tobytes()
N = len(SMALL)
META = {"__metadata__": {"format": "gflowgr.prefix_tree"}}


def entry(**changed: object) -> dict[str, object]:
    return {**META, "tree": {"dtype": "U8", "shape": [N], "data_offsets": [0, N], **changed}}


@pytest.mark.parametrize(
    "header",
    [
        entry(data_offsets=[0.0, float(N)]),
        entry(data_offsets=["0", "1"]),
        entry(data_offsets=[-8, N - 8]),
        entry(data_offsets=[64, N + 64]),
        entry(data_offsets=[2**63, 2**63 + N]),
        entry(data_offsets=[False, N]),
        entry(data_offsets=None),
        entry(shape=[N, 1]),
        entry(dtype="F32"),
        {**META, "tree": [1, 2]},
        {**META, "tree": {"data_offsets": [0, N]}},
        {"__metadata__": "x", "tree": entry()["tree"]},
        {"__metadata__": {"format": [[]]}, "tree": entry()["tree"]},
        {"tree": entry()["tree"]},
        [],
        1,
        b"[" * 60_000,
        b"[" * 100_000,
        b"\xff\xfe{}",
        json.dumps(entry()).replace("[0,", "[NaN,").encode(),
        json.dumps(entry()).replace("[0,", "[" + "9" * 5_000 + ",").encode(),
    ],
)
def test_a_damaged_safetensors_header_is_a_data_error(header: object, tmp_path: Path) -> None:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "tree.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head + SMALL)
    for mmap in (False, True):
        with pytest.raises(DataError, match=r"tree\.safetensors: "):
            PrefixTree.load(path, mmap=mmap)


@pytest.mark.parametrize(
    "content", [b"", b"1234567", struct.pack("<Q", 2**63) + b"x" * 100, struct.pack("<Q", 0)]
)
def test_what_is_no_safetensors_file_is_a_data_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    path.write_bytes(content)
    for mmap in (False, True):
        with pytest.raises(DataError, match=r"tree\.safetensors: "):
            PrefixTree.load(path, mmap=mmap)
        with pytest.raises(DataError, match="must be a file; got a folder"):
            PrefixTree.load(tmp_path, mmap=mmap)
