"""Cases of a beam step from one seed, and their comparison with plain Python loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from support.dict_trie import DictTrie
from torch import Tensor

from gflowgr.ops.beam_step.op import BeamStep, beam_step, beam_step_hidden
from gflowgr.tree import PrefixTree

from .oracle import Allowed, Candidate, step_oracle

NORMALIZERS = ("vocab", "level", "children")
TOLERANCE = 3e-5


class StepCase:
    """A catalogue, beams at any of its nodes, a model's output, and masks; from one seed."""

    def __init__(self, identifiers: list[tuple[int, ...]], seed: int) -> None:
        made = torch.Generator().manual_seed(seed)

        def pick(count: int) -> int:
            return int(torch.randint(count, (), generator=made))

        self.trie = DictTrie(identifiers, range(len(identifiers)))
        self.tree = PrefixTree.from_identifiers([list(row) for row in identifiers])
        prompts, beams = (1, 2, 3)[pick(3)], (1, 2, 12)[pick(3)]
        vocab, width = self.tree.vocab_size + pick(4), (3, 16, 21)[pick(3)]
        self.nodes = torch.randint(-1, self.tree.num_nodes, (prompts, beams), generator=made)
        if pick(3) == 0:
            self.nodes.clamp_(max=0)  # all at the root, which then is shared
        self.scores = torch.randn(prompts, beams, generator=made)
        self.scores[torch.rand(prompts, beams, generator=made) < 0.2] = -math.inf
        self.hidden = torch.randn(prompts, beams, width, generator=made)
        self.weight = torch.randn(vocab, width, generator=made)
        self.bias = torch.randn(vocab, generator=made) if pick(2) else None
        self.temperature = (1.0, 0.6)[pick(2)]
        self.width = (1, 2, 5, 40)[pick(4)]

        def mask(count: int) -> Tensor | None:
            return torch.rand(count, generator=made) < 0.7 if pick(2) else None

        def keys(count: int) -> Tensor | None:
            chosen = torch.rand(prompts * count, generator=made) < 0.3
            return chosen.nonzero()[:, 0] if pick(2) else None

        self.live, self.live_leaves = mask(self.tree.num_nodes), mask(self.tree.num_leaves)
        self.barred, self.barred_leaves = keys(self.tree.num_nodes), keys(self.tree.num_leaves)

    @property
    def options(self) -> dict[str, Any]:
        masks = ("live", "barred", "live_leaves", "barred_leaves")
        return {name: getattr(self, name) for name in ("width", "temperature", *masks)}

    def allowed(self, prompt: int) -> Allowed:
        def own(keys: Tensor | None, count: int) -> frozenset[int]:
            found = [] if keys is None else keys.tolist()
            return frozenset(key % count for key in found if key // count == prompt)

        return Allowed(
            None if self.live is None else self.live.tolist(),
            own(self.barred, self.tree.num_nodes),
            None if self.live_leaves is None else self.live_leaves.tolist(),
            own(self.barred_leaves, self.tree.num_leaves),
        )

    def check_both(self, normalize: str, device: str = "cpu") -> None:
        """Run both ops on the backend that is chosen and compare them with the oracle."""
        logits = torch.nn.functional.linear(self.hidden, self.weight, self.bias)

        def there(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        beams = (there(self.scores), there(self.nodes), self.tree.to(device))
        options = {name: there(value) for name, value in self.options.items()}
        found = beam_step(there(logits), *beams, normalize=normalize, **options)
        self.check(found, logits, normalize)
        head = map(there, (self.hidden, self.weight, self.bias))
        found = beam_step_hidden(*head, *beams, normalize=normalize, **options)
        self.check(found, logits, normalize)

    def check(self, found: BeamStep, logits: Tensor, normalize: str) -> None:
        for prompt in range(len(self.nodes)):
            open_ends, ends = step_oracle(
                self.trie,
                logits[prompt].tolist(),
                self.scores[prompt].tolist(),
                self.nodes[prompt].tolist(),
                normalize=normalize,
                temperature=self.temperature,
                allowed=self.allowed(prompt),
            )
            kept = [part[prompt].tolist() for part in found]
            _compare(list(zip(*kept[:4], strict=True)), open_ends)
            tokens = [self.trie.prefixes[node][-1] if node >= 0 else -1 for node in kept[5]]
            _compare(list(zip(kept[4], kept[6], tokens, kept[5], strict=True)), ends)


def _compare(slots: list[tuple[float, int, int, int]], expected: list[Candidate]) -> None:
    """Slots hold the best of the expected candidates, in order, up to rounding of the scores."""
    count = min(len(slots), len(expected))
    assert slots[count:] == [(-math.inf, -1, -1, -1)] * (len(slots) - count)
    kept = [Candidate(*slot) for slot in slots[:count]]
    assert kept == sorted(kept, key=lambda c: c.rank)
    scores = {(c.parent, c.token, c.node): c.score for c in expected}
    assert len({(c.parent, c.token, c.node) for c in kept}) == count
    for one, best in zip(kept, expected, strict=False):
        assert one.score == pytest.approx(best.score, abs=TOLERANCE)
        assert one.score == pytest.approx(
            scores[one.parent, one.token, one.node], abs=TOLERANCE, nan_ok=True
        )


@st.composite
def catalogues(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Identifiers of one or of several lengths, over narrow and wide codebooks, some full."""
    length, codes = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 5, 40, 400]))
    offset = draw(st.sampled_from([0, 3]))
    shortest = draw(st.sampled_from([1, length]))
    step = draw(st.sampled_from([0, codes]))  # codebooks that follow each other, or are shared
    token = st.integers(offset, offset + codes - 1)
    row = st.lists(token, min_size=shortest, max_size=length)
    row = row.map(lambda ids: tuple(code + step * k for k, code in enumerate(ids)))
    return draw(st.lists(row, min_size=1, max_size=60))
