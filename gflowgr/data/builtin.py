"""The built-in data set: a seeded, simulated shop whose true utilities are known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gflowgr.data.dataset import Dataset
from gflowgr.data.index import from_codes
from gflowgr.data.ragged import Ragged
from gflowgr.data.shop_names import CATALOGUE, COLOURS, STYLES

BEHAVIOURS = ("click", "purchase")
REWARDS = (1.0, 10.0)

_MAX_PAIRS = 1 << 32  # of users and items: what is true of each takes 2 bytes
_DIM = 32  # latent dimensions d
_SLATE = 6  # items shown per visit m
_MIN_EVENTS, _MEAN_EVENTS, _MAX_EVENTS = 5, 10, 40
_ITEM_NOISE = 0.8
_ZIPF = 0.25
_INTEREST = 2.0  # kappa
_STAY_TYPE, _STAY_CATEGORY = 0.6, 0.25
_DRIFT = 0.7  # gamma
_TASTE_CONCENTRATION = 0.8
_POPULARITY_UTILITY = 0.1
_SHOP_SHARPNESS = 0.7
_CLICK = (1.2, 5.5)
_PURCHASE = (1.0, 7.5)


@dataclass(frozen=True)
class _Shop:
    """Items and users before any visit.

    All in float64: rounding, which depends on the linear algebra library and its threads, then has
    no part in who clicks what.
    """

    item_leaf: np.ndarray  # [items]
    items: np.ndarray  # v, float64 [items, d]
    log_popularity: np.ndarray  # float64 [items], mean 0
    leaf_vectors: np.ndarray  # c, float64 [leaves, d]
    leaf_taste: np.ndarray  # pi, float64 [users, leaves]


def generate_builtin(
    seed: int = 0, num_users: int = 3000, num_items: int = 1200, *, popularity_bias: float = 1.0
) -> Dataset:
    """Simulate a shop: catalogue, users, what they were shown, clicked and bought.

    The model (all constants are in this module; N is the normal distribution, sigma the logistic
    function):

    1. Catalogue. 8 departments x 4 categories x 4 product types = 128 leaves. A node of level l has
       ``e_node ~ N(0, I / d)``, d = 32; a leaf's vector is the sum along its path,
       ``c_leaf = e_department + e_category + e_type``. An item in a leaf (leaves drawn with
       probabilities ~ Dirichlet(4)) has ``v_i = c_leaf + N(0, 0.8^2 I / d)``, and a popularity
       ``p_i ~ rank^-0.25`` (Zipf, ranks in random order); ``b_i = log p_i`` less its mean.
    2. Tastes. User u's taste over leaves is a product along the tree, ``pi_u(leaf) =
       D(department) D(category | department) D(type | category)``, each factor ~ Dirichlet(0.8).
       The long-term vector is ``t_u = sum_leaf pi_u(leaf) c_leaf``.
    3. Session interest. A leaf of interest ``z_ut`` starts from ``pi_u``; from visit to visit it
       stays (0.6), becomes a type of the same category (0.25), or is drawn anew from ``pi_u``
       (0.15). The interest follows it: ``q_ut = (1 - gamma) q_u(t-1) + gamma c_z``, gamma = 0.7.
    4. Utility: ``x_uit = <t_u + kappa q_ut, v_i> + 0.1 b_i``, kappa = 2.
    5. Visit. The shop shows 6 different items that the user has not engaged with yet, drawn without
       replacement with probability ~ ``exp(0.7 x_uit + beta b_i)`` (Gumbel top 6), beta =
       ``popularity_bias``.
       ``P(click | shown) = sigma(1.2 (x - 5.5))``, ``P(purchase | click) = sigma(x - 7.5)``.
       A user has no use for an item they engaged with before.
    6. A user visits until they have ``n_u = 5 + Poisson(Gamma(2, 2.5))`` events (40 at most).

    The sequence holds the clicked and the bought items in time order; ``behaviours`` says which of
    the two each is. Items shown before the validation event and never engaged with are the side
    behaviour "impression". Index "hierarchy" gives each item 4 tokens: department, category in it,
    type in that, number within the type.

    ``truth[u, i]`` is the expected reward of showing item i to user u on the visit of their test
    event, under purchase = 10 and click = 1: ``P(click) (1 + 9 P(purchase | click))``, and 0 for
    items that the user engaged with earlier.

    Args:
        seed: equal seeds give equal data.
        num_users: number of users U, at least 1.
        num_items: number of items, at least 200.
        popularity_bias: beta, how far the shop shows what is popular rather than what the user
            likes: 0 not at all, and the more the larger. Utilities do not depend on it.

    Raises:
        ValueError: a size that is too small, a product that is too large, or a negative bias.
    """
    if num_users < 1:
        raise ValueError(f"num_users must be at least 1; got {num_users}")
    if num_items < 200:
        raise ValueError(f"num_items must be at least 200; got {num_items}")
    if num_users * num_items > _MAX_PAIRS:
        raise ValueError(
            f"num_users * num_items must be at most {_MAX_PAIRS:,}; got {num_users:,} * "
            f"{num_items:,}"
        )
    if not 0 <= popularity_bias < math.inf:
        raise ValueError(f"popularity_bias must be finite and >= 0; got {popularity_bias}")
    rng = np.random.default_rng(seed)
    shop = _make_shop(rng, num_users, num_items)
    log = _simulate(rng, shop, popularity_bias)
    name = f"builtin-{seed}"
    if popularity_bias != 1.0:
        name += f"-popularity-{popularity_bias:g}"
    return _to_dataset(rng, shop, log, name)


def _dirichlet(rng: np.random.Generator, alpha: float, shape: tuple[int, ...]) -> np.ndarray:
    draws = rng.standard_gamma(alpha, size=shape) + 1e-12
    return draws / draws.sum(axis=-1, keepdims=True)


def _make_shop(rng: np.random.Generator, num_users: int, num_items: int) -> _Shop:
    departments, categories, types = 8, 4, 4
    sizes = [(departments, 1, 1), (departments, categories, 1), (departments, categories, types)]
    leaf_vectors = np.zeros((departments, categories, types, _DIM))
    for size in sizes:
        leaf_vectors += rng.normal(scale=1.0 / np.sqrt(_DIM), size=(*size, _DIM))
    leaves = departments * categories * types
    flat_vectors = leaf_vectors.reshape(leaves, _DIM)

    item_leaf = np.sort(rng.choice(leaves, size=num_items, p=_dirichlet(rng, 4.0, (leaves,))))
    noise = rng.normal(scale=_ITEM_NOISE / np.sqrt(_DIM), size=(num_items, _DIM))
    log_popularity = -_ZIPF * np.log(1.0 + rng.permutation(num_items))
    taste = (
        _dirichlet(rng, _TASTE_CONCENTRATION, (num_users, 1, 1, departments)).reshape(
            num_users, departments, 1, 1
        )
        * _dirichlet(rng, _TASTE_CONCENTRATION, (num_users, departments, categories))[..., None]
        * _dirichlet(rng, _TASTE_CONCENTRATION, (num_users, departments, categories, types))
    )
    return _Shop(
        item_leaf=item_leaf,
        items=(flat_vectors[item_leaf] + noise),
        log_popularity=(log_popularity - log_popularity.mean()),
        leaf_vectors=flat_vectors,
        leaf_taste=taste.reshape(num_users, leaves),
    )


@dataclass(frozen=True)
class _Log:
    """All impressions in time order within a user, and each user's state at the end."""

    user: np.ndarray  # int64 [n]
    item: np.ndarray  # int64 [n]
    visit: np.ndarray  # int64 [n]
    place: np.ndarray  # int64 [n], position on the slate
    outcome: np.ndarray  # int8 [n]: -1 shown only, else index into BEHAVIOURS
    state: np.ndarray  # t_u + kappa q_ut at the last visit, float64 [users, d]


def _draw_leaf(rng: np.random.Generator, taste: np.ndarray) -> np.ndarray:
    edges = np.cumsum(taste, axis=1)
    point = rng.random((len(taste), 1)) * edges[:, -1:]
    return np.minimum((edges < point).sum(axis=1), taste.shape[1] - 1)


def _utility(shop: _Shop, state: np.ndarray) -> np.ndarray:
    return state @ shop.items.T + _POPULARITY_UTILITY * shop.log_popularity


def _probabilities(utility: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(P(click | shown), P(purchase | click))."""
    click = 1.0 / (1.0 + np.exp(-_CLICK[0] * (utility - _CLICK[1])))
    purchase = 1.0 / (1.0 + np.exp(-_PURCHASE[0] * (utility - _PURCHASE[1])))
    return click, purchase


def _simulate(rng: np.random.Generator, shop: _Shop, popularity_bias: float) -> _Log:
    num_users, num_items = len(shop.leaf_taste), len(shop.items)
    extra = rng.poisson(rng.gamma(2.0, (_MEAN_EVENTS - _MIN_EVENTS) / 2.0, size=num_users))
    wanted = np.minimum(_MIN_EVENTS + extra, _MAX_EVENTS)
    long_term = shop.leaf_taste @ shop.leaf_vectors
    leaf = _draw_leaf(rng, shop.leaf_taste)
    interest = shop.leaf_vectors[leaf].copy()
    engaged = np.zeros((num_users, num_items), dtype=bool)
    count = np.zeros(num_users, dtype=np.int64)
    state = np.zeros((num_users, _DIM))
    parts = []
    visit = 0
    active = np.arange(num_users)
    while len(active):
        if visit:
            move = rng.random(len(active))
            sibling = leaf[active] // 4 * 4 + rng.integers(4, size=len(active))
            fresh = _draw_leaf(rng, shop.leaf_taste[active])
            moved = np.where(move < _STAY_TYPE + _STAY_CATEGORY, sibling, fresh)
            leaf[active] = np.where(move < _STAY_TYPE, leaf[active], moved)
            interest[active] += _DRIFT * (shop.leaf_vectors[leaf[active]] - interest[active])
        state[active] = long_term[active] + _INTEREST * interest[active]
        utility = _utility(shop, state[active])
        score = _SHOP_SHARPNESS * utility + popularity_bias * shop.log_popularity
        # Gumbel noise: the best of (score + noise) are a draw without replacement.
        noise = rng.standard_exponential(score.shape)
        score -= np.log(np.maximum(noise, 1e-300))
        score[engaged[active]] = -np.inf
        slate = np.argpartition(-score, _SLATE, axis=1)[:, :_SLATE]
        slate = rng.permuted(slate, axis=1)
        click, purchase = _probabilities(np.take_along_axis(utility, slate, axis=1))
        clicked = rng.random(slate.shape) < click
        bought = clicked & (rng.random(slate.shape) < purchase)
        # A user leaves the shop for good at event n_u: what the slate still holds is not seen.
        before = count[active, None] + np.cumsum(clicked, axis=1) - clicked
        seen = before < wanted[active, None]
        rows, places = np.nonzero(seen)
        users, items = active[rows], slate[rows, places]
        outcome = np.where(bought, 1, np.where(clicked, 0, -1))[rows, places].astype(np.int8)
        parts.append((users, items, np.full(len(users), visit), places, outcome))
        hit = outcome >= 0
        engaged[users[hit], items[hit]] = True
        count += np.bincount(users[hit], minlength=num_users)
        active = active[count[active] < wanted[active]]
        visit += 1
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = np.lexsort((columns[3], columns[2], columns[0]))
    user, item, when, place, outcome = (column[order] for column in columns)
    return _Log(user, item, when, place, outcome, state)


def _to_dataset(rng: np.random.Generator, shop: _Shop, log: _Log, name: str) -> Dataset:
    num_users, num_items = len(shop.leaf_taste), len(shop.items)
    # A visit about every three days from 1 January 2024, half a minute per item looked at.
    start = 1_704_067_200 + rng.integers(30 * 86_400, size=num_users)
    times = start[log.user] + log.visit * 3 * 86_400 + log.place * 30
    event = log.outcome >= 0
    sequences = Ragged.from_lengths(
        np.bincount(log.user[event], minlength=num_users), log.item[event].astype(np.int32)
    )
    event_times = times[event]
    valid_time = event_times[sequences.offsets[1:] - 2]

    pairs = log.user * num_items + log.item
    engaged = np.unique(pairs[event])
    shown = ~event & (times < valid_time[log.user]) & ~np.isin(pairs, engaged)
    impressions = np.unique(pairs[shown])
    side = Ragged.from_lengths(
        np.bincount(impressions // num_items, minlength=num_users),
        (impressions % num_items).astype(np.int32),
    )

    click, purchase = _probabilities(_utility(shop, log.state))
    truth = click * (REWARDS[0] + (REWARDS[1] - REWARDS[0]) * purchase)
    history = np.ones(len(sequences.values), dtype=bool)
    history[sequences.offsets[1:] - 1] = False
    truth[sequences.row_of_values()[history], sequences.values[history]] = 0.0

    texts, codes = _describe(rng, shop.item_leaf)
    return Dataset(
        name=name,
        user_ids=[str(user) for user in range(num_users)],
        sequences=sequences,
        num_items=num_items,
        behaviours=log.outcome[event],
        behaviour_names=BEHAVIOURS,
        times=event_times,
        side={"impression": side},
        texts=texts,
        indexes={"hierarchy": from_codes(codes)},
        truth=truth.astype(np.float16),
    )


def _describe(
    rng: np.random.Generator, item_leaf: np.ndarray
) -> tuple[list[dict[str, str]], np.ndarray]:
    """(texts, codes int64 [items, 4]); items of a leaf are numbered in id order."""
    paths = [
        (department, category, kind)
        for department, categories in CATALOGUE.items()
        for category, kinds in categories.items()
        for kind in kinds
    ]
    first = np.searchsorted(item_leaf, item_leaf)  # item_leaf is sorted
    number = np.arange(len(item_leaf)) - first
    codes = np.stack([item_leaf // 16, item_leaf // 4 % 4, item_leaf % 4, number], axis=1)
    styles = rng.integers(len(STYLES), size=len(item_leaf))
    colours = rng.integers(len(COLOURS), size=len(item_leaf))
    texts = []
    for leaf, style, colour, n in zip(item_leaf, styles, colours, number, strict=True):
        department, category, kind = paths[leaf]
        title = f"{STYLES[style].capitalize()} {kind}, {COLOURS[colour]} #{n + 1}"
        texts.append({"title": title, "categories": f"{department} > {category} > {kind}"})
    return texts, codes
