"""Sampling of items against the exact distribution, by enumeration of tiny catalogues.

Seeds are fixed, so nothing here passes by luck: a test of a distribution asks for a p-value above
``LEVEL``, or for an estimate within 4 standard errors.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.identifier_shop import IdentifierShop, tiny_t5
from support.small_models import small_model
from torch import Tensor, nn

from gflowgr.decoding import SampledItems, item_logprobs, sample_items
from gflowgr.decoding import random_walk as _tree_walk
from gflowgr.decoding.keyed_noise import keyed_gumbel, keyed_uniform, prompt_keys
from gflowgr.samplers import keyed_random

LEVEL = 1e-3
FAMILIES = ["t5", "gpt2", "qwen3", "gemma2"]  # the last by whole sequences
MODEL = tiny_t5(seed=2)
# Different lengths; items 1 and 8 share an identifier; under 2 there is but one way on.
ITEMS = [(2, 3, 4), (3, 2), (4, 5, 6), (4, 5, 7), (4, 6, 6), (5,), (4, 5, 9), (6, 6, 6), (3, 2)]


def draw(shop: IdentifierShop, count: int, *, seed: object = 0, **options: object) -> SampledItems:
    return sample_items(shop.model, shop.ids, shop.mask, shop.tree, count, seed=seed, **options)


def repeated(
    rows: int, identifiers: list[tuple[int, ...]] = ITEMS, model: nn.Module = MODEL
) -> IdentifierShop:
    """The same prompt many times: with ``keys``, independent repetitions of one experiment."""
    shop = IdentifierShop(identifiers, model=model, seed=2, lengths=(4,))
    shop.ids, shop.mask = shop.ids.expand(rows, -1), shop.mask.expand(rows, -1)
    return shop


def p_value(counts: Tensor, expected: Tensor) -> float:
    """Pearson's chi-square test; cells that are expected to be rare are taken together."""
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum().reshape(1)]).double()
    wanted = torch.cat([expected[~rare], expected[rare].sum().reshape(1)]).double()
    assert (observed[wanted == 0] == 0).all()
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    if len(wanted) == 1:
        return 1.0  # one possible outcome, and no other was observed
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_p": 0.7},
    {"temperature": 3.0, "top_p": 0.6},
    {"allowed": [1, 3, 4, 5, 6]},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_draws_with_replacement_follow_the_distribution(settings: dict[str, object]) -> None:
    shop, count = IdentifierShop(ITEMS, model=MODEL, seed=2), 20_000
    options = dict(settings)
    allowed = options.pop("allowed", None)
    if allowed is not None:
        options["available"] = torch.zeros(len(ITEMS), dtype=torch.bool)
        options["available"][allowed] = True
    drawn = draw(shop, count, **options)
    for row in range(2):
        exact = shop.sampling(row, **settings)
        counts = drawn.items[row].bincount(minlength=len(ITEMS))
        assert p_value(counts, exact * count) > LEVEL
        expected = exact.log()[drawn.items[row]]
        torch.testing.assert_close(drawn.log_probs[row].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS)
def test_ordered_draws_without_replacement_follow_the_distribution(
    settings: dict[str, object],
) -> None:
    rows = 10_000
    shop, options = repeated(rows), dict(settings)
    allowed = options.pop("allowed", None)
    if allowed is not None:
        others = [item for item in range(len(ITEMS)) if item not in allowed]
        options["exclude"] = torch.tensor([others]).expand(rows, -1)
    drawn = draw(shop, 2, replacement=False, keys=torch.arange(rows), **options)
    exact = repeated(1).sampling(0, **settings)
    # Gumbel-top-k: the first is i with probability q_i, the second then j with q_j / (1 - q_i).
    pairs = {
        (i, j): float(exact[i] * exact[j] / (1 - exact[i]))
        for i, j in itertools.permutations(range(len(ITEMS)), 2)
        if exact[j] > 0
    }
    found = torch.zeros(len(ITEMS), len(ITEMS)).long()
    found.index_put_((drawn.items[:, 0], drawn.items[:, 1]), torch.tensor(1), accumulate=True)
    counts = torch.tensor([int(found[pair]) for pair in pairs])
    assert int(counts.sum()) == rows
    assert p_value(counts, torch.tensor(list(pairs.values())) * rows) > LEVEL
    torch.testing.assert_close(
        drawn.log_probs.double(), exact.log()[drawn.items], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_sampled_by_its_own_distribution(family: str, left: bool) -> None:
    model, count = small_model(family), 5_000
    shop = IdentifierShop(ITEMS, model=model, seed=2, lengths=(3, 6))
    if left:
        shop.pad_left()
    drawn = draw(shop, count, temperature=4.0)
    first = draw(repeated(1000, model=model), 1, replacement=False, keys=torch.arange(1000))
    for row in range(2):
        exact = shop.sampling(row, temperature=4.0)
        assert p_value(drawn.items[row].bincount(minlength=len(ITEMS)), exact * count) > LEVEL
    exact = repeated(1, model=model).sampling(0)
    assert p_value(first.items[:, 0].bincount(minlength=len(ITEMS)), exact * 1000) > LEVEL


def test_inclusion_probabilities_are_those_of_gumbel_top_k() -> None:
    rows, count = 10_000, 4
    identifiers = ITEMS[:6]
    drawn = draw(
        repeated(rows, identifiers), count, replacement=False, keys=torch.arange(rows), seed=5
    )
    exact = repeated(1, identifiers).sampling(0)
    inclusion = torch.zeros(6, dtype=torch.float64)
    for order in itertools.permutations(range(6), count):
        probability, left = 1.0, 1.0
        for item in order:
            probability *= float(exact[item]) / left
            left -= float(exact[item])
        inclusion[list(order)] += probability
    share = torch.stack([(drawn.items == item).any(1).double().mean() for item in range(6)])
    error = (inclusion * (1 - inclusion) / rows).sqrt()
    assert ((share - inclusion).abs() < 4 * error).all()


def test_the_largest_perturbed_log_probability_is_a_standard_gumbel() -> None:
    # Its scale is what the threshold's weights rest on. Mean: Euler's gamma; variance: pi^2 / 6.
    rows = 10_000
    drawn = draw(repeated(rows), 1, replacement=False, keys=torch.arange(rows))
    largest = drawn.perturbed[:, 0].double()
    assert abs(float(largest.mean()) - np.euler_gamma) < 4 * (np.pi**2 / 6 / rows) ** 0.5
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    below = (largest[:, None] < -(-quantiles.log()).log()).double().mean(0)
    assert ((below - quantiles).abs() < 4 * (quantiles * (1 - quantiles) / rows).sqrt()).all()


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("off_policy", [False, True])
def test_weighted_estimates_are_unbiased(replacement: bool, count: int, off_policy: bool) -> None:
    rows = 10_000
    shop = repeated(rows)
    options = {"replacement": replacement, "temperature": 1.5, "normalize": "vocab"}
    drawn = draw(shop, count, keys=torch.arange(rows), seed=1, **options)
    values = torch.randn(len(ITEMS), generator=torch.Generator().manual_seed(2)).double() + 1
    one = repeated(1)
    exact = one.sampling(0, temperature=1.5)
    target = None
    if off_policy:  # under the model's own probabilities, which sum to less than 1
        exact, target = one.exact("vocab")[0].exp(), drawn.model_log_probs
    weights = drawn.log_weights(target).double().exp()
    estimates = (weights * values[drawn.items]).sum(1)
    error = float(estimates.std()) / rows**0.5
    assert error > 0
    assert abs(float(estimates.mean() - (exact * values).sum())) < 4 * error


def test_as_many_draws_as_items_return_every_item_exactly_once() -> None:
    shop = IdentifierShop(ITEMS, model=MODEL, seed=2)
    for count in (len(ITEMS), len(ITEMS) + 3):
        drawn = draw(shop, count, replacement=False)
        real = drawn.items[:, : len(ITEMS)]
        assert real.sort(1).values.tolist() == [list(range(len(ITEMS)))] * 2
        assert (drawn.perturbed.diff(dim=1)[:, : len(ITEMS) - 1] <= 0).all()
        for empty in (drawn.log_probs, drawn.model_log_probs, drawn.perturbed, drawn.log_weights()):
            assert (empty[:, len(ITEMS) :] == -torch.inf).all()
        assert (drawn.items[:, len(ITEMS) :] == -1).all()
        assert (drawn.tokens[:, len(ITEMS) :] == -1).all()
        assert (drawn.threshold == -torch.inf).all()
        # Everything was drawn, so the estimate of an expectation is the expectation itself.
        torch.testing.assert_close(drawn.log_weights().exp().sum(1), torch.ones(2))


def test_more_draws_without_replacement_continue_fewer() -> None:
    shop = IdentifierShop(ITEMS, model=MODEL, seed=2)
    few, many = (draw(shop, count, replacement=False) for count in (3, 6))
    assert torch.equal(few.items, many.items[:, :3])
    torch.testing.assert_close(few.perturbed, many.perturbed[:, :3])
    torch.testing.assert_close(few.threshold, many.perturbed[:, 3])


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("normalize", ["vocab", "level", "children"])
@pytest.mark.parametrize("family", FAMILIES)
def test_model_log_probs_are_those_of_the_items(
    replacement: bool, normalize: str, family: str
) -> None:
    shop = IdentifierShop(ITEMS, model=small_model(family), seed=2)
    drawn = draw(shop, 5, replacement=replacement, normalize=normalize, temperature=0.7, top_p=0.9)
    scores = item_logprobs(shop.model, shop.ids, shop.mask, shop.tree, normalize=normalize)
    expected = scores.gather(1, drawn.items.clamp_min(0)).masked_fill(drawn.items < 0, -torch.inf)
    torch.testing.assert_close(drawn.model_log_probs, expected, rtol=0, atol=1e-5)
    real = drawn.items[0] >= 0
    identifiers = [tuple(t for t in row if t >= 0) for row in drawn.tokens[0][real].tolist()]
    assert identifiers == [ITEMS[item] for item in drawn.items[0][real].tolist()]


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_draws_do_not_depend_on_the_batch(family: str, left: bool, replacement: bool) -> None:
    model = small_model(family)
    shop = IdentifierShop(ITEMS, model=model, seed=2, lengths=(3, 6, 5))
    padded = copy.copy(shop)
    if left:
        padded.pad_left()
    together = draw(padded, 6, replacement=replacement, seed=3)
    for row, length in enumerate((3, 6, 5)):
        alone = IdentifierShop(ITEMS, model=model, seed=2, lengths=(1,))
        alone.ids, alone.mask = shop.ids[row : row + 1, :length], shop.mask[row : row + 1, :length]
        single = draw(alone, 6, replacement=replacement, seed=3)
        assert torch.equal(single.items[0], together.items[row])
        torch.testing.assert_close(
            single.log_probs[0], together.log_probs[row], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("replacement", [True, False])
def test_seeds_and_keys_decide_the_draws(replacement: bool) -> None:
    shop = repeated(3)

    def items(**options: object) -> list[list[int]]:
        return draw(shop, 8, replacement=replacement, **options).items.tolist()

    first = items(seed=1)
    assert first == items(seed=1)
    assert first != items(seed=2)
    assert first[0] == first[1] == first[2]  # equal prompts
    keyed = items(seed=1, keys=torch.tensor([5, 6, 5]))
    assert keyed[0] == keyed[2]
    assert keyed[0] != keyed[1]
    generator = torch.Generator().manual_seed(0)
    drawn = items(seed=generator)
    assert drawn != items(seed=generator)
    assert drawn == items(seed=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("replacement", [True, False])
def test_only_admissible_items_are_drawn(replacement: bool) -> None:
    shop = IdentifierShop(ITEMS, model=MODEL, seed=2)
    available = torch.ones(len(ITEMS), dtype=torch.bool)
    available[[0, 2]] = False
    exclude = torch.tensor([[1, 3, -1], [5, 4, 7]])
    drawn = draw(shop, 40, replacement=replacement, available=available, exclude=exclude, seed=4)
    left = [{4, 5, 6, 7, 8}, {1, 3, 6, 8}]
    for row in range(2):
        assert set(drawn.items[row].tolist()) - {-1} == left[row]
    # An item alone of its identifier's is not given the other's share.
    exact = shop.sampling(0, allowed=sorted(left[0])).log()
    real = drawn.items[0][drawn.items[0] >= 0]
    torch.testing.assert_close(
        drawn.log_probs[0, : len(real)].double(), exact[real], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("replacement", [True, False])
def test_a_prompt_without_admissible_items_gets_none(replacement: bool) -> None:
    shop = IdentifierShop(ITEMS, model=MODEL, seed=2)
    exclude = torch.stack([torch.arange(len(ITEMS)), torch.full((len(ITEMS),), -1)])
    drawn = draw(shop, 4, replacement=replacement, exclude=exclude)
    assert drawn.items[0].tolist() == [-1] * 4
    assert (drawn.log_probs[0] == -torch.inf).all()
    assert (drawn.log_weights()[0] == -torch.inf).all()
    assert (drawn.items[1] >= 0).all()


@pytest.mark.parametrize("replacement", [True, False])
def test_no_prompts_give_empty_outputs(replacement: bool) -> None:
    shop = IdentifierShop(ITEMS, model=MODEL, seed=2)
    shop.ids, shop.mask = shop.ids[:0], shop.mask[:0]
    drawn = draw(shop, 4, replacement=replacement)
    assert drawn.items.shape == drawn.log_probs.shape == drawn.log_weights().shape == (0, 4)
    assert drawn.tokens.shape == (0, 4, 3)
    assert (drawn.perturbed is None) == replacement


def test_a_vanishing_nucleus_is_the_greedy_walk() -> None:
    shop = IdentifierShop(ITEMS, model=MODEL, seed=2)
    drawn = draw(shop, 10, top_p=1e-9)
    for row in range(2):
        exact = shop.sampling(row, top_p=1e-9)
        assert set(drawn.items[row].tolist()) <= set(exact.nonzero()[:, 0].tolist())
    alone = draw(shop, 10, top_p=1e-9, replacement=False)  # support smaller than the draws
    for row in range(2):
        support = set(shop.sampling(row, top_p=1e-9).nonzero()[:, 0].tolist())
        assert set(alone.items[row].tolist()) == support | {-1}


def test_nan_is_reported() -> None:
    shop = IdentifierShop(ITEMS)
    with torch.no_grad():
        next(shop.model.parameters()).fill_(torch.nan)
    for replacement in (True, False):
        with pytest.raises(FloatingPointError, match="scores are NaN"):
            draw(shop, 2, replacement=replacement)


def test_an_identifier_that_is_a_prefix_of_another_is_refused() -> None:
    shop = IdentifierShop([(2, 3), (4,), (4, 5)])
    with pytest.raises(ValueError, match="the identifier of item 1 is a prefix of another"):
        draw(shop, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 0}, ValueError, "num_samples must be >= 1; got 0"),
        ({"temperature": -1.0}, ValueError, r"temperature must be finite and > 0; got -1\.0"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\]; got 0\.0"),
        ({"normalize": "all"}, ValueError, "normalize must be 'vocab', 'level' or 'children'"),
        ({"keys": torch.ones(2)}, TypeError, "keys must hold integers"),
        ({"keys": torch.ones(3).long()}, ValueError, r"keys must be \[B\] = \(2,\); got \(3,\)"),
        ({"available": torch.ones(3)}, TypeError, "available must be bool"),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {"count": 2} | options
    with pytest.raises(error, match=message):
        draw(IdentifierShop(ITEMS, model=MODEL, seed=2), **arguments)


def split_mix(bits: int) -> int:
    """SplitMix64's finaliser in plain integers, as its authors give it (Steele et al., 2014)."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
    return bits ^ (bits >> 31)


def test_the_hash_of_the_noise_is_split_mix() -> None:
    # The generator seeded with 0 adds the golden ratio and finalises: its published first outputs.
    golden = 0x9E3779B97F4A7C15
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [split_mix((n + 1) * golden % 2**64) for n in range(3)] == published
    for seed, *keys in ((-7, 0), (-7, 1), (3, 2**40), (0, -1, 5), (2**63 + 5, 11, -(2**50), 0)):
        bits = split_mix(seed % 2**64)
        for key in keys:
            bits = split_mix((bits + key * golden) % 2**64)
        tensors = [torch.tensor([key]) for key in keys]
        for given in (tensors, tensors[:1] + keys[1:]):
            assert keyed_uniform(seed, *given).tolist() == [((bits >> 12) + 0.5) / 2**52]


def test_the_trajectory_samplers_hash_is_split_mix_too() -> None:
    seed, key, row, columns = -7, 3, 2**40, 4
    base = split_mix((seed + split_mix(key)) % 2**64)
    start = split_mix((base + row * 0x9E3779B97F4A7C15) % 2**64)
    bits = [split_mix((start + n * 0xD1B54A32D192ED03) % 2**64) for n in range(1, columns + 1)]
    found = keyed_random.keyed_uniform(seed, key, np.array([row]), columns)
    assert found.tolist() == [[(word >> 11) / 2**53 for word in bits]]


@pytest.mark.parametrize("replacement", [True, False])
def test_no_noise_is_used_twice(replacement: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by two nodes nor by a node and an item: else the draws would depend on each other."""
    name = "keyed_uniform" if replacement else "keyed_gumbel"
    used: list[tuple[int, ...]] = []

    def recorded(seed: int, *keys: Any) -> Tensor:
        keys = tuple(map(torch.as_tensor, keys))
        used.extend(torch.stack(torch.broadcast_tensors(*keys), -1).flatten(0, -2).tolist())
        return (keyed_uniform if replacement else keyed_gumbel)(seed, *keys)

    monkeypatch.setattr(_tree_walk, name, recorded)
    # Two ways on everywhere and two beams: no padding, whose noise nobody looks at.
    identifiers = [(2, 4), (2, 5), (3, 4), (3, 5)] * 2
    draw(IdentifierShop(identifiers, model=MODEL, seed=2), 1, replacement=replacement)
    assert len(used) == (2 * 3 if replacement else 2 * (1 + 2 + 4 + 4))
    assert len({tuple(row) for row in used}) == len(used)


def test_items_of_one_identifier_are_drawn_equally_often() -> None:
    shop, count = IdentifierShop([(2, 3), (2, 4), (2, 3), (2, 4)], model=MODEL, seed=2), 5_000
    drawn = draw(shop, count)
    for row in range(2):
        exact = shop.sampling(row)
        assert p_value(drawn.items[row].bincount(minlength=4), exact * count) > LEVEL


def test_noise_is_uniform_and_never_at_the_ends() -> None:
    number = keyed_uniform(0, torch.arange(200)[:, None], torch.arange(500))
    assert ((number > 0) & (number < 1)).all()
    counts = torch.histc(number.float().flatten(), bins=50, min=0, max=1)
    assert p_value(counts, torch.full((50,), 2000.0)) > LEVEL
    assert keyed_gumbel(0, torch.arange(200_000)).isfinite().all()


def test_the_key_of_a_prompt_is_that_of_its_real_tokens() -> None:
    ids = torch.tensor([[5, 6, 0, 0], [0, 0, 5, 6], [6, 5, 0, 0], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    keys = prompt_keys(ids, mask).tolist()
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_beauty_gives_as_many_different_items_as_asked_for(data_root: Path) -> None:
    from gflowgr.identifiers import read_index
    from gflowgr.models import IdentifierVocabulary, TigerConfig, build_tiger
    from gflowgr.tree import PrefixTree

    codes = np.asarray(read_index(data_root / "Beauty" / "index.letter_official.json.gz").codes)
    vocabulary = IdentifierVocabulary.from_codes(codes)
    small = TigerConfig(d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2)
    model = build_tiger(vocabulary, small, seed=0).eval()
    ids = torch.randint(2, vocabulary.size, (3, 20), generator=torch.Generator().manual_seed(0))
    tree = PrefixTree.from_identifiers(vocabulary.encode(codes))
    drawn = sample_items(model, ids, torch.ones_like(ids), tree, 200, seed=0, replacement=False)
    for row in drawn.items.tolist():
        assert len(set(row) - {-1}) == 200
    assert (drawn.perturbed > drawn.threshold[:, None]).all()
