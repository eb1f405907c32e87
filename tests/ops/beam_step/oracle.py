"""One step of a constrained beam search in plain Python: beam_step's oracle, simple and slow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from support.dict_trie import DictTrie


@dataclass(frozen=True)
class Candidate:
    """A child of a beam, in the order that a step returns them."""

    score: float
    parent: int
    token: int
    node: int

    @property
    def rank(self) -> tuple[bool, float, int, int]:
        """NaN first, then by descending score, ascending parent and token."""
        nan = math.isnan(self.score)
        return (not nan, 0.0 if nan else -self.score, self.parent, self.token)


@dataclass(frozen=True)
class Allowed:
    """What a prompt may take; None stands for everything."""

    live: Sequence[bool] | None = None
    barred: frozenset[int] = frozenset()
    live_leaves: Sequence[bool] | None = None
    barred_leaves: frozenset[int] = frozenset()

    def node(self, node: int) -> bool:
        return node not in self.barred and (self.live is None or self.live[node])

    def leaf(self, leaf: int) -> bool:
        live = self.live_leaves is None or self.live_leaves[leaf]
        return leaf >= 0 and live and leaf not in self.barred_leaves


def log_sum_exp(values: Sequence[float]) -> float:
    """As PyTorch has it where values are infinite or NaN."""
    if any(map(math.isnan, values)):
        return math.nan
    top = max(values)
    if math.isinf(top):
        return top
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def step_oracle(
    trie: DictTrie,
    logits: Sequence[Sequence[float]],
    scores: Sequence[float],
    nodes: Sequence[int],
    *,
    normalize: str,
    temperature: float = 1.0,
    allowed: Allowed | None = None,
) -> tuple[list[Candidate], list[Candidate]]:
    """All candidates of one prompt in their order: those that go on, and those that end.

    Args:
        trie: the identifiers.
        logits: of each beam, over the vocabulary.
        scores, nodes: of each beam; -inf or -1 for none.
    """
    allowed = allowed or Allowed()
    length = max(map(len, trie.prefixes))
    codebooks = [{p[k] for p in trie.prefixes if len(p) > k} for k in range(length)]
    open_ends, ends = [], []
    for parent, (row, score, node) in enumerate(zip(logits, scores, nodes, strict=True)):
        children = trie.children(trie.prefixes[node]) if node >= 0 and score != -math.inf else []
        if not children:
            continue
        row = [x / temperature for x in row]
        codebook = codebooks[len(children[0]) - 1]
        over = {
            "vocab": range(len(row)),
            "level": range(min(codebook), max(codebook) + 1),
            "children": [child[-1] for child in children],
        }[normalize]
        normaliser = log_sum_exp([row[token] for token in over])
        for child in children:
            number, token = trie.node[child], child[-1]
            forbidden = row[token] == -math.inf and not math.isnan(normaliser)
            if forbidden or not allowed.node(number):
                continue
            value = score + (row[token] - normaliser)
            if value == -math.inf:
                continue
            candidate = Candidate(value, parent, token, number)
            below = [trie.node[c] for c in trie.children(child)]
            leaf = trie.leaf(child)
            if below and (leaf < 0 or any(map(allowed.node, below))):
                open_ends.append(candidate)
            if allowed.leaf(leaf):
                ends.append(candidate)
    return sorted(open_ends, key=lambda c: c.rank), sorted(ends, key=lambda c: c.rank)
