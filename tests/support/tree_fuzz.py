"""Damage files of prefix trees at random, load what still loads, and use it in every way.

One process for all cases of a seed: should one die, its number is known from what it wrote before.
``python tests/support/tree_fuzz.py SEED CASES [FIRST]``
"""

from __future__ import annotations

import contextlib
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import gflowgr
from gflowgr import DataError, PrefixTree
from gflowgr.ops.beam_step.op import beam_step, beam_step_hidden

VOCABULARY, WIDTH = 64, 8
REFUSALS = (ValueError, TypeError, IndexError)


def sound_trees() -> Iterator[PrefixTree]:
    """Of one length; of several; with items that share an identifier; wide tokens; one item."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 16, (80, 3)) + np.array([0, 16, 32])
    distinct = np.unique(tokens, axis=0)
    yield PrefixTree.from_identifiers(distinct)
    yield PrefixTree.from_identifiers([*distinct.tolist(), *([a, 16 + a] for a in range(4))])
    yield PrefixTree.from_identifiers(np.concatenate([tokens, tokens[:20]]))
    yield PrefixTree.from_identifiers(random.choice(2**20, (60, 2), replace=False))
    yield PrefixTree.from_identifiers([[7]], items=[3])


def damage(content: bytes, random: np.random.Generator) -> bytes:
    """Some bits, bytes or words changed: in the file's header, the tree's header or its arrays."""
    raw = bytearray(content)
    head = 8 + int.from_bytes(content[:8], "little")
    places = [
        (0, head),
        (head, min(head + 256, len(raw))),
        (head, len(raw)),
        (head + 192, len(raw)),
    ]
    for _ in range(random.integers(1, 4)):
        low, high = places[random.choice(4, p=[0.1, 0.3, 0.2, 0.4])]
        at = int(random.integers(low, high))
        match int(random.integers(5)):
            case 0:
                raw[at] ^= 1 << int(random.integers(8))
            case 1:
                raw[at] = int(random.integers(256))
            case 2:
                at -= (at - head) % 4
                word = random.choice([0, 1, -1, 2**31 - 1, -(2**31), 2**30, len(raw)])
                raw[at : at + 4] = int(word).to_bytes(4, "little", signed=True)
            case 3:
                at -= (at - head) % 8
                word = random.choice([0, 1, -1, 2**62, -(2**62), 2**31, 2**40, len(raw)])
                raw[at : at + 8] = int(word).to_bytes(8, "little", signed=True)
            case _:
                at -= (at - head) % 4  # a value of the same array: in range, at the wrong place
                other = at + 4 * int(random.integers(-4, 5))
                raw[at : at + 4] = raw[max(0, other) : max(0, other) + 4]
    return bytes(raw[: len(content)])


def use(tree: PrefixTree, sound: PrefixTree) -> None:
    """Everything that reads a tree. What it refuses, it refuses with a Python exception."""
    draw = torch.Generator().manual_seed(0)
    nodes = torch.arange(min(tree.num_nodes, 64)).repeat(2, 1)
    scores = torch.zeros(nodes.shape)
    hidden = torch.randn(2, nodes.shape[1], WIDTH, generator=draw)
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw)
    logits = torch.randn(2, nodes.shape[1], VOCABULARY, generator=draw)
    live = torch.ones(tree.num_items, dtype=torch.bool) if tree.num_items < 2**20 else None
    known = sound.identifiers(sound.item_ids[:12].long()).unsqueeze(0)
    mask, known = known >= 0, known.clamp_min(0)
    states = torch.randn(*known.shape, WIDTH, generator=draw)

    def loss(**options: object) -> None:
        with gflowgr.ops.validation(False):
            own, head = states.clone().requires_grad_(), weight.clone().requires_grad_()
            zeros = torch.zeros(known.shape[:2])
            gflowgr.fused_tb_loss(
                own, head, known, zeros, zeros[:, 0], tree=tree, mask=mask, **options
            ).backward()

    def logprobs() -> None:
        head = weight.clone().requires_grad_()
        found = gflowgr.trajectory_logprobs(
            states, head, known, tree=tree, mask=mask, sparse_grad=True
        )
        found.sum().backward()

    def available() -> None:
        if live is not None:
            beam_step(
                logits, scores, nodes, tree, width=5, live=tree.available_nodes(live),
                live_leaves=torch.ones(tree.num_leaves, dtype=torch.bool),
            )  # fmt: skip

    calls = [
        lambda: tree.walk(torch.randint(0, 64, (200, tree.max_length), generator=draw)),
        lambda: tree.identifiers(tree.item_ids[:10].long()),
        lambda: tree.validate(tree.identifiers(tree.item_ids[:10].long())),
        lambda: [tree.children(node) for node in range(min(4, tree.num_nodes))],
        lambda: tree.items(0),
        lambda: tree.without_items(tree.item_ids[:1]),
        lambda: tree.with_items([[1, 2]], [tree.num_items]),
        available,
        loss,
        lambda: loss(normalize="level"),
        logprobs,
    ]
    for normalize in ("vocab", "level", "children"):
        options = {"width": 7, "normalize": normalize}
        calls += [
            lambda o=options: beam_step(logits, scores, nodes, tree, **o),
            lambda o=options: beam_step_hidden(hidden, weight, None, scores, nodes, tree, **o),
        ]
    for call in calls:
        with contextlib.suppress(*REFUSALS):
            call()


def main(seed: int, cases: int, first: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree.safetensors"
        trees = []
        for tree in sound_trees():
            tree.save(path)
            trees.append((tree, path.read_bytes()))
        for case in range(first, cases):
            random = np.random.default_rng([seed, case])
            sound, content = trees[case % len(trees)]
            path.write_bytes(damage(content, random))
            print(case, flush=True)
            try:
                tree = PrefixTree.load(path, mmap=bool(random.integers(2)))
            except DataError as error:
                outcomes["refused" if str(path) in str(error) else "refused without a name"] += 1
                continue
            outcomes["same" if torch.equal(tree.buffer, sound.buffer) else "another tree"] += 1
            use(tree, sound)
    print(dict(outcomes))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
