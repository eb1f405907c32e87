"""Exact log-probabilities of items against a forward of the model for each item and token."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.identifier_shop import FIRST, VOCABULARY, IdentifierShop, tiny_t5
from support.small_models import small_model
from torch import Tensor, nn
from transformers import MT5Config, MT5ForConditionalGeneration

from gflowgr.decoding import item_logprobs
from gflowgr.decoding.decoders import T5Decoder
from gflowgr.decoding.tree_head import TreeHead
from gflowgr.identifiers import read_index
from gflowgr.models import IdentifierVocabulary, TigerConfig, build_tiger
from gflowgr.tree import PrefixTree

MODEL = tiny_t5()
tokens = st.integers(FIRST, VOCABULARY - 1)
catalogues = st.lists(st.lists(tokens, min_size=1, max_size=4), min_size=1, max_size=16)
# The last two by whole sequences: the fast path refuses them. Bart counts its positions from the
# start of the row, padding included, so padding on the left is another prompt to it.
FAMILIES = ["t5", "gpt2", "qwen3", "gemma2", "bart"]
PADDED = [(family, left) for family in FAMILIES for left in (False, True)][:-1]
NORMALIZERS = ["vocab", "level", "children"]
# Different lengths, two items of one identifier (0 and 5), an identifier that is another's prefix.
MIXED = [(2, 3, 4), (2, 3, 5), (2, 6), (7,), (7, 8, 9, 10), (2, 3, 4), (11, 2, 2)]


def score(shop: IdentifierShop, items: Tensor | None = None, **options: object) -> Tensor:
    return item_logprobs(shop.model, shop.ids, shop.mask, shop.tree, items, **options)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=1e-5)


@given(
    identifiers=catalogues,
    normalize=st.sampled_from(NORMALIZERS),
    temperature=st.sampled_from([1.0, 0.6, 3.0]),
    batch_bytes=st.sampled_from([None, 1, 10_000]),
    data=st.data(),
)
@settings(max_examples=30)
def test_any_catalogue_equals_a_forward_for_each_item(
    identifiers: list[list[int]],
    normalize: str,
    temperature: float,
    batch_bytes: int | None,
    data: st.DataObject,
) -> None:
    shop = IdentifierShop(identifiers, model=MODEL)
    options = {"normalize": normalize, "temperature": temperature, "batch_bytes": batch_bytes}
    exact = shop.exact(normalize, temperature)
    close(score(shop, **options), exact)

    wanted = st.lists(st.integers(-1, len(identifiers) - 1), min_size=5, max_size=5)
    items = torch.tensor([data.draw(wanted), data.draw(wanted)])
    expected = exact.gather(1, items.clamp_min(0)).masked_fill(items < 0, -torch.inf)
    close(score(shop, items, **options), expected)
    close(score(shop, items[1], **options)[1], expected[1])


def test_items_of_one_identifier_have_one_value() -> None:
    values = score(IdentifierShop(MIXED))
    assert torch.equal(values[:, 0], values[:, 5])


@given(identifiers=st.sets(st.tuples(tokens, tokens, tokens), min_size=1, max_size=20))
@settings(max_examples=20)
def test_children_probabilities_sum_to_one(identifiers: set[tuple[int, ...]]) -> None:
    values = score(IdentifierShop(sorted(identifiers), model=MODEL), normalize="children")
    close(values.exp().sum(1), torch.ones(2))


def test_items_without_an_identifier_and_padding_have_no_probability() -> None:
    shop = IdentifierShop([(2, 3), (4, 5)])
    exact = shop.exact()
    shop.tree = PrefixTree.from_identifiers([[2, 3], [4, 5]], items=[3, 1])
    values = score(shop)
    assert (values[:, [0, 2]] == -torch.inf).all()
    close(values[:, [3, 1]], exact)
    assert (score(shop, torch.tensor([-1, 2])) == -torch.inf).all()


class Counter:
    """How many nodes were decoded, of all prompts together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nodes = 0
        for name in ("first", "advance"):
            monkeypatch.setattr(T5Decoder, name, self._counting(getattr(T5Decoder, name)))

    def _counting(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*arguments: object) -> Tensor:
            hidden = step(*arguments)
            self.nodes += hidden.shape[0] * hidden.shape[1]
            return hidden

        return counted


def test_every_inner_node_is_decoded_once_for_each_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = IdentifierShop(MIXED)
    inner = {row[:depth] for row in MIXED for depth in range(len(row))}
    counter = Counter(monkeypatch)
    score(shop, normalize="vocab")
    assert counter.nodes == 2 * len(inner)
    counter.nodes = 0
    some = torch.tensor([[1, 5], [3, 2]])
    score(shop, some, normalize="vocab")  # (), 2, 2 3 for both items; and (), 2
    assert counter.nodes == 2 * 3  # the second prompt's place is padding


def test_nodes_with_a_single_child_cost_nothing_when_children_are_normalised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two choices: the first token, and the one after 6 7.
    shop = IdentifierShop([(2, 3, 4, 5), (6, 7, 8, 9), (6, 7, 10, 11)])
    exact = shop.exact("children")
    counter = Counter(monkeypatch)
    close(score(shop, normalize="children"), exact)
    assert counter.nodes == 2 * 3  # (), 6 and 6 7
    chain = IdentifierShop([(2, 3, 4, 5)])
    assert (score(chain, normalize="children") == 0).all()
    assert (score(chain, normalize="level") == 0).all()


@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize(("family", "left"), PADDED)
def test_every_family_equals_forwards_without_padding(
    family: str, left: bool, normalize: str
) -> None:
    shop = IdentifierShop(MIXED, model=small_model(family), lengths=(9, 1, 4))
    if left:
        shop.pad_left()
    exact = shop.exact(normalize)
    close(score(shop, normalize=normalize), exact)
    close(score(shop, normalize=normalize, batch_bytes=1), exact)  # a leaf at a time
    items = torch.tensor([[3, -1, 0], [1, 1, 5], [6, 2, 4]])
    expected = exact.gather(1, items.clamp_min(0)).masked_fill(items < 0, -torch.inf)
    close(score(shop, items, normalize=normalize), expected)


def test_prompts_are_scored_in_groups() -> None:
    shop = IdentifierShop(MIXED, lengths=[1 + n % 5 for n in range(19)])
    exact = shop.exact()
    close(score(shop, batch_bytes=1), exact)
    items = torch.arange(19)[:, None].add(torch.arange(3)) % len(MIXED)
    close(score(shop, items, batch_bytes=1), exact.gather(1, items))


class Adapted(nn.Linear):
    """A linear layer whose weight alone is not what it computes, as adapters make them."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + hidden.sum(-1, keepdim=True)


def variants() -> dict[str, nn.Module]:
    adapted = tiny_t5()
    attention = adapted.decoder.block[1].layer[0].SelfAttention
    adapted_query = Adapted(16, 12, bias=False)
    adapted_query.weight = attention.q.weight
    attention.q = adapted_query
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 4, "num_heads": 3, "num_layers": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    mt5 = MT5Config(vocab_size=VOCABULARY, **sizes, **special)
    return {
        "gated, head of its own": tiny_t5(
            feed_forward_proj="gated-gelu", tie_word_embeddings=False
        ),
        "narrower than its heads": tiny_t5(d_kv=20),
        "float64": tiny_t5().double(),
        "adapted": adapted,
        "mT5": MT5ForConditionalGeneration(mt5).eval(),
    }


@pytest.mark.parametrize("kind", variants())
def test_other_models_of_the_family(kind: str) -> None:
    model = variants()[kind]
    shop = IdentifierShop(MIXED, model=model)
    values = score(shop)
    close(values, shop.exact())
    assert values.dtype == (torch.float64 if kind == "float64" else torch.float32)


def test_half_precision_models_are_scored_in_float32() -> None:
    shop = IdentifierShop(MIXED)
    exact = shop.exact()
    shop.model = copy.deepcopy(shop.model).bfloat16()
    values = score(shop)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), exact, rtol=0.1, atol=0.5)


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    shop = IdentifierShop(MIXED)
    exact = shop.exact()
    shop.model.train()
    shop.model.encoder.eval()  # a frozen part keeps a mode of its own
    close(score(shop), exact)
    assert shop.model.training
    assert shop.model.decoder.training
    assert not shop.model.encoder.training


def test_no_prompts_and_no_items() -> None:
    shop = IdentifierShop(MIXED)
    assert score(shop, torch.empty(2, 0, dtype=torch.long)).shape == (2, 0)
    shop.ids, shop.mask = shop.ids[:0], shop.mask[:0]
    assert score(shop).shape == (0, len(MIXED))


def test_nan_is_reported() -> None:
    shop = IdentifierShop(MIXED)
    with torch.no_grad():
        next(shop.model.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="scores are NaN"):
        score(shop)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"normalize": "none"}, ValueError, "normalize must be 'vocab', 'level' or 'children'"),
        ({"temperature": 0.0}, ValueError, r"temperature must be finite and > 0; got 0\.0"),
        ({"batch_bytes": 0}, ValueError, "batch_bytes must be >= 1; got 0"),
        ({"items": torch.ones(3, 2).long()}, ValueError, r"\[B, M\] with B = 2; got \(3, 2\)"),
        ({"items": torch.ones(2)}, TypeError, "items must be integers"),
        ({"items": torch.tensor([9])}, ValueError, r"items must be 0\.\.6 or -1; got ids 9\.\.9"),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        score(IdentifierShop(MIXED), **options)


def test_a_tree_in_other_tokens_is_refused() -> None:
    shop = IdentifierShop([(2, 40)])
    with pytest.raises(ValueError, match="the tree has token 40, the model's head only 12 tokens"):
        score(shop, normalize="vocab")


def test_the_catalogue_of_beauty(data_root) -> None:
    index = read_index(data_root / "Beauty" / "index.letter_official.json.gz")
    vocabulary = IdentifierVocabulary.from_codes(np.asarray(index.codes))
    identifiers = torch.from_numpy(vocabulary.encode(np.asarray(index.codes)))
    small = TigerConfig(d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2)
    model = build_tiger(vocabulary, small, seed=0).eval()
    ids = torch.randint(2, vocabulary.size, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    tree = PrefixTree.from_identifiers(identifiers)
    values = item_logprobs(model, ids, mask, tree, normalize="vocab")
    assert values.shape == (2, 12_101)
    some = torch.arange(0, 12_101, 97)
    start = torch.zeros(len(some), 1, dtype=torch.long)
    for row in range(2):
        with torch.no_grad():
            logits = model(
                input_ids=ids[row : row + 1].expand(len(some), -1),
                decoder_input_ids=torch.cat([start, identifiers[some, :-1]], dim=1),
            ).logits
        log_p = logits.log_softmax(-1).gather(-1, identifiers[some].unsqueeze(-1))
        close(values[row, some], log_p.sum((1, 2)))


@pytest.mark.parametrize("normalize", ["vocab", "level", "children"])
def test_edges_do_not_depend_on_how_many_nodes_are_computed_at_a_time(normalize: str) -> None:
    tree = PrefixTree.from_identifiers([(2, 5), (2, 6), (3, 5), (3, 7), (4, 6)])
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(8, 4, generator=generator), torch.randn(8, generator=generator)
    hidden = torch.randn(2, 3, 4, generator=generator)
    parents, tokens = torch.tensor([[2, 0, 1, 0]]), torch.tensor([[6, 5, 7, 6]])
    logits = (hidden @ weight.T + bias) / 0.7
    for block_bytes in (1, 2 * 4 * 8 * 2, 2**20):
        head = TreeHead(
            (weight, bias), tree, normalize=normalize, temperature=0.7, block_bytes=block_bytes
        )
        chosen, normaliser = head.edges(hidden, 1, torch.tensor([[1, 2, 3]]), parents, tokens)
        torch.testing.assert_close(chosen, logits[:, parents[0], tokens[0]])
        columns = {
            "vocab": [range(8)] * 3, "level": [range(5, 8)] * 3, "children": [[5, 6], [5, 7], [6]]
        }[normalize]  # fmt: skip
        for node in range(3):
            expected = logits[:, node, list(columns[node])].logsumexp(-1)
            torch.testing.assert_close(normaliser[:, node], expected)
