"""Beam search against enumeration of the whole catalogue."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from gflowgr.decoding import constrained_beam_search
from gflowgr.models import (
    IdentifierVocabulary,
    TigerConfig,
    build_tiger,
    output_head,
    prompt_tokens,
    trajectory_hidden_states,
)
from gflowgr.ops import trajectory_logprobs
from gflowgr.tree import PrefixTree

SMALL = TigerConfig(d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, dropout=0.0)


class Shop:
    """A small random catalogue, a random model, and two prompts."""

    def __init__(self, *, ragged: bool = False, shared: bool = False, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        codes = rng.integers(0, [4, 5, 6], size=(40, 3))
        codes = np.unique(codes, axis=0)
        rng.shuffle(codes)
        if shared:
            codes[1], codes[2] = codes[0], codes[0]
        if ragged:
            codes[::3, 2] = -1
            codes = np.unique(codes, axis=0)
        self.vocabulary = IdentifierVocabulary.from_codes(codes)
        tokens = self.vocabulary.encode(codes)
        rows = [row[row >= 0].tolist() for row in tokens]
        self.tree = PrefixTree.from_identifiers(rows)
        self.item_tokens = torch.from_numpy(tokens)
        self.model: nn.Module = build_tiger(self.vocabulary, SMALL, seed=seed).eval()
        histories = torch.tensor([[0, 1, 2], [5, -1, -1]])
        self.ids, self.mask = prompt_tokens(histories, self.item_tokens)

    def exact(self, normalize: str) -> Tensor:
        """log P(identifier | prompt) of every item [B, items], by definition."""
        items = len(self.item_tokens)
        tokens = self.item_tokens.expand(2, items, -1)
        mask = tokens >= 0
        with torch.no_grad():
            hidden = trajectory_hidden_states(self.model, self.ids, self.mask, tokens, mask).hidden
            weight, _ = output_head(self.model)
            tree = self.tree if normalize == "children" else None
            log_pf = trajectory_logprobs(
                hidden, weight, tokens.masked_fill(~mask, 0), tree=tree, mask=mask
            )
        return log_pf.sum(-1)

    def search(self, **options: object) -> tuple[Tensor, Tensor, Tensor]:
        out = constrained_beam_search(self.model, self.ids, self.mask, self.tree, **options)
        return out.items, out.scores, out.tokens


class CodesShop(Shop):
    """The same with given codes [items, 3], right-padded with -1."""

    def __init__(self, codes: npt.NDArray[np.int64], *, seed: int = 0) -> None:
        self.vocabulary = IdentifierVocabulary.from_codes(codes)
        tokens = self.vocabulary.encode(codes)
        self.tree = PrefixTree.from_identifiers([row[row >= 0].tolist() for row in tokens])
        self.item_tokens = torch.from_numpy(tokens)
        self.model = build_tiger(self.vocabulary, SMALL, seed=seed).eval()
        histories = torch.tensor([[0, 1, 2], [1, -1, -1]])
        self.ids, self.mask = prompt_tokens(histories, self.item_tokens)


@pytest.mark.parametrize("normalize", ["vocab", "children"])
def test_a_float64_model_is_searched_in_float64(normalize: str) -> None:
    shop = Shop(ragged=True)
    shop.model.double()
    exact = shop.exact(normalize)
    assert exact.dtype == torch.float64
    items, scores, _ = shop.search(num_beams=len(shop.item_tokens), normalize=normalize)
    assert scores.dtype == torch.float32
    assert torch.equal(items, exact.argsort(descending=True, stable=True))
    torch.testing.assert_close(scores, exact.gather(1, items).float(), atol=1e-5, rtol=0)


def test_the_default_dtype_of_torch_does_not_matter() -> None:
    shop = Shop()
    want = shop.search(num_beams=5)
    torch.set_default_dtype(torch.float64)
    try:
        found = shop.search(num_beams=5)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)


def small_codes(seed: int, ragged: bool, shared: bool) -> npt.NDArray[np.int64]:
    """Codes of about 30 items: some prefixes of others (ragged), some items alike (shared)."""
    rng = np.random.default_rng(seed)
    codes = np.unique(rng.integers(0, [4, 3, 4], size=(40, 3)), axis=0)
    if ragged:
        codes[::3, 2] = -1
        codes[::7, 1:] = -1
        codes = np.unique(codes, axis=0)
    if shared:
        codes = np.concatenate([codes, codes[::2], codes[::5]])
    rng.shuffle(codes)
    return codes


@pytest.mark.parametrize("normalize", ["vocab", "children"])
@pytest.mark.parametrize("ragged", [False, True])
def test_as_many_beams_as_items_give_the_exact_ranking(normalize: str, ragged: bool) -> None:
    shop = Shop(ragged=ragged)
    exact = shop.exact(normalize)
    count = exact.shape[1]
    items, scores, tokens = shop.search(num_beams=count, normalize=normalize)
    best = exact.sort(dim=1, descending=True)
    assert items.tolist() == best.indices.tolist()
    torch.testing.assert_close(scores, best.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(tokens, shop.item_tokens[items])


def test_few_beams_equal_a_plain_beam_search_over_prefixes() -> None:
    shop, beams = Shop(seed=3), 4
    items, scores, _ = shop.search(num_beams=beams, normalize="vocab")
    for row in range(2):
        kept: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
        for _ in range(3):
            grown = []
            for prefix, score in kept:
                decoder = torch.tensor([[0, *prefix]])
                with torch.no_grad():
                    logits = shop.model(
                        input_ids=shop.ids[row : row + 1],
                        attention_mask=shop.mask[row : row + 1],
                        decoder_input_ids=decoder,
                    ).logits[0, -1]
                log_p = logits.log_softmax(-1)
                longer = {
                    tuple(t[: len(prefix) + 1])
                    for t in shop.item_tokens.tolist()
                    if tuple(t[: len(prefix)]) == prefix
                }
                grown += [(p, score + float(log_p[p[-1]])) for p in sorted(longer)]
            kept = sorted(grown, key=lambda pair: -pair[1])[:beams]
        expected = [shop.item_tokens.tolist().index(list(prefix)) for prefix, _ in kept]
        assert items[row].tolist() == expected
        torch.testing.assert_close(
            scores[row], torch.tensor([s for _, s in kept]), rtol=1e-5, atol=1e-5
        )


def test_more_beams_than_items_leave_flagged_empty_places() -> None:
    shop = Shop()
    count = len(shop.item_tokens)
    items, scores, tokens = shop.search(num_beams=count + 5)
    assert (items[:, :count] >= 0).all()
    assert (items[:, count:] == -1).all()
    assert (scores[:, count:] == -torch.inf).all()
    assert (tokens[:, count:] == -1).all()
    assert sorted(items[0, :count].tolist()) == list(range(count))


def test_items_sharing_an_identifier_follow_each_other_by_id() -> None:
    shop = Shop(shared=True)
    items, scores, _ = shop.search(num_beams=len(shop.item_tokens))
    place = items[0].tolist().index(0)
    assert items[0, place : place + 3].tolist() == [0, 1, 2]
    assert (scores[0, place : place + 3] == scores[0, place]).all()


def test_unavailable_items_never_appear_and_dead_ends_are_pruned() -> None:
    shop = Shop()
    available = torch.zeros(len(shop.item_tokens), dtype=torch.bool)
    available[[3, 7]] = True
    # Two beams suffice, however improbable the two items' prefixes are.
    items, _, _ = shop.search(num_beams=2, available=available)
    assert {frozenset(row) for row in items.tolist()} == {frozenset({3, 7})}


def test_excluded_items_never_appear() -> None:
    shop = Shop(shared=True)
    count = len(shop.item_tokens)
    everything, _, _ = shop.search(num_beams=count)
    exclude = torch.stack([everything[0, :4], torch.tensor([0, -1, -1, -1])])
    items, _, _ = shop.search(num_beams=count, exclude=exclude)
    for row in range(2):
        barred = set(exclude[row].tolist()) - {-1}
        expected = [item for item in everything[row].tolist() if item not in barred]
        assert items[row, : len(expected)].tolist() == expected
        assert (items[row, len(expected) :] == -1).all()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_excluding_equals_searching_alone_what_is_left(
    seed: int, ragged: bool, shared: bool
) -> None:
    shop = CodesShop(small_codes(seed, ragged, shared), seed=seed)
    count, generator = len(shop.item_tokens), torch.Generator().manual_seed(seed)
    for share in (0.3, 0.7, 0.95):
        excluded = torch.rand(2, count, generator=generator) < share
        exclude = torch.where(excluded, torch.arange(count), -1)
        exclude = torch.cat([exclude, exclude[:, : count // 2]], dim=1)  # some are listed twice
        stock = torch.rand(count, generator=generator) < 0.7
        for beams in (1, 3):
            for available in (None, stock):
                items, scores, tokens = shop.search(
                    num_beams=beams, exclude=exclude, available=available
                )
                left = ~excluded if available is None else ~excluded & available
                for row in range(2):
                    alone = shop.search(num_beams=beams, available=left[row])
                    assert items[row].tolist() == alone[0][row].tolist()
                    assert torch.equal(tokens[row], alone[2][row])
                    torch.testing.assert_close(scores[row], alone[1][row], rtol=1e-5, atol=1e-5)
                    # No dead end took a beam: one result at least while an item is left.
                    assert (int(items[row, 0]) >= 0) == bool(left[row].any())
                    assert all(left[row, item] for item in items[row].tolist() if item >= 0)


def test_beams_are_not_spent_on_prefixes_of_excluded_items() -> None:
    codes = np.array([[item, 0, 0] for item in range(60)])
    shop = CodesShop(codes)
    best = shop.search(num_beams=60)[0]
    items, _, _ = shop.search(num_beams=20, num_return=10, exclude=best[:, :20])
    for row in range(2):
        left = torch.ones(60, dtype=torch.bool)
        left[best[row, :20]] = False
        alone = shop.search(num_beams=20, num_return=10, available=left)[0]
        assert items[row].tolist() == alone[row].tolist()
        assert left[items[row]].all()
        assert len(set(items[row].tolist())) == 10


def test_an_excluded_prefix_of_an_identifier_leaves_the_longer_one() -> None:
    shop = CodesShop(np.array([[0, 1, -1], [0, 1, 2], [3, 1, -1]]))
    items, _, _ = shop.search(num_beams=1, exclude=torch.tensor([[0, 2], [1, 2]]))
    assert items.tolist() == [[1], [0]]
    items, _, _ = shop.search(num_beams=1, exclude=torch.tensor([[0, 1, 2]] * 2))
    assert items.tolist() == [[-1], [-1]]
    # The same through the stock: the sold-out short identifier takes no beam.
    items, _, _ = shop.search(num_beams=1, available=torch.tensor([False, True, False]))
    assert items.tolist() == [[1], [1]]


def test_no_prompts_give_empty_outputs() -> None:
    shop = Shop()
    shop.ids, shop.mask = shop.ids[:0], shop.mask[:0]
    exclude = torch.empty(0, 4, dtype=torch.long)
    items, scores, tokens = shop.search(num_beams=5, num_return=3, exclude=exclude)
    assert (items.shape, scores.shape, tokens.shape) == ((0, 3), (0, 3), (0, 3, 3))
    assert (items.dtype, scores.dtype, tokens.dtype) == (torch.int64, torch.float32, torch.int64)


def test_nan_scores_are_reported() -> None:
    shop = Shop()
    with torch.no_grad():
        next(shop.model.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the model's scores are NaN"):
        shop.search(num_beams=3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_beams": 0}, ValueError, "num_beams must be >= 1; got 0"),
        ({"num_return": 0}, ValueError, "num_return"),
        (
            {"normalize": "none"},
            ValueError,
            "normalize must be one of 'vocab', 'level', 'children'; got 'none'",
        ),
        ({"available": torch.ones(3)}, TypeError, "available must be bool"),
        ({"available": torch.ones(3).bool()}, ValueError, r"available must be \[items\]"),
        ({"exclude": torch.ones(2, 3)}, TypeError, "exclude must hold integer item ids"),
        ({"exclude": torch.ones(2).long()}, ValueError, r"exclude must be \[B, E\] with B = 2"),
        ({"exclude": torch.ones(1, 3).long()}, ValueError, r"B = 2; got \(1, 3\)"),
        ({"exclude": torch.tensor([[-2], [0]])}, ValueError, r"or -1; got -2\.\.0"),
        ({"exclude": torch.tensor([[999], [0]])}, ValueError, r"or -1; got 0\.\.999"),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Shop().search(**options)
