"""Reward signals (GFlowGR, reward section): each rates a trajectory in one respect.

A signal is a small class with a ``name`` and a ``__call__(context) -> [B, N]`` of numbers >= 0.
One of your own is named as ``"module:Class"`` in ``FlowSettings.signals``, and made without
arguments:

    class Fresh:
        name = "r_fresh"

        def __call__(self, context):
            return (context.items >= 900).float()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..extensions import is_outside, load_outside

__all__ = [
    "SIGNALS",
    "EstimatedScore",
    "FormatSimilarity",
    "GenerationProbability",
    "InteractionLevel",
    "RewardSignal",
    "SignalContext",
    "check_signal_names",
    "default_behaviour_values",
    "make_signals",
]

SIGNALS = ("r_a", "r_yhat", "r_generation", "r_sim")
CATALOGUE_SIGNAL = "r_cm"  # of every item: a reward for exact flows, see .catalogue
_TINY = 1e-6
_LIKED = 10.0
_KNOWN = {
    **dict.fromkeys(("purchase", "buy", "bought", "order", "transaction", "like"), _LIKED),
    **dict.fromkeys(("cart", "addtocart", "basket", "addtobasket"), 3.0),
    **dict.fromkeys(("favourite", "favorite", "fav", "wishlist", "addtowishlist"), 3.0),
    **dict.fromkeys(("click", "view", "pageview", "itemview", "productview", "pv"), 1.0),
}
"""r_a by the name of a behaviour, which is written in many ways: see :func:`_known_value`."""


@dataclass(frozen=True)
class SignalContext:
    """The inputs of signals.

    Attributes:
        tokens: [B, N, L]; n = 0 is the observed positive.
        mask: true for real tokens [B, N, L].
        items: item of each trajectory [B, N], -1 for padding.
        behaviours: behaviour code of each trajectory [B, N]; -1: observed, but the data does not
            say with which behaviour; -2: augmented, never observed; -3: shown and passed over.
        scores: the collaborative model's scores of the whole catalogue [B, items], or None.
        log_probs: gives log P(trajectory | prompt) [B, N] of the backbone, without gradients;
            calling it costs a forward pass.
    """

    tokens: Tensor
    mask: Tensor
    items: Tensor
    behaviours: Tensor
    scores: Tensor | None = None
    log_probs: Callable[[], Tensor] | None = None


class RewardSignal(Protocol):
    """One component of the reward."""

    @property
    def name(self) -> str:
        """Its name in logs."""
        ...

    def __call__(self, context: SignalContext) -> Tensor:
        """[B, N], finite and >= 0; anything at padding trajectories."""
        ...


def default_behaviour_values(names: Sequence[str]) -> dict[str, float]:
    """Default r_a of behaviours.

    Liked or bought 10 and clicked (viewed) 1 are the paper's example; cart 3 is ours, between the
    two, as is wish list. Names are compared without case and punctuation: ``add_to_cart`` is
    ``AddToCart``. Names that are numbers (stars) are scaled so that the highest counts 10.

    Raises:
        ValueError: a name is neither known nor a number >= 0; the message says what to give.
    """
    stars = {name: float(name) for name in names if name.replace(".", "", 1).isdigit()}
    highest = max(stars.values(), default=0.0)
    values = {name: _LIKED * star / highest if highest else 0.0 for name, star in stars.items()}
    known = {name: _known_value(name) for name in names}
    values.update({name: value for name, value in known.items() if value is not None})
    unknown = [name for name in names if name not in values]
    if unknown:
        raise ValueError(
            f"no reward is known for the behaviours {unknown}; give behaviour_values, such as "
            f"{{{unknown[0]!r}: 5.0}} (--behaviour-values {unknown[0]}=5 on the command line)"
        )
    return values


def _known_value(name: str) -> float | None:
    return _KNOWN.get("".join(letter for letter in name.casefold() if letter.isalnum()))


class InteractionLevel:
    """``r_a``: the value of a trajectory's behaviour; 0 for augmented items.

    Args:
        behaviour_values: behaviour name -> value, such as ``{"purchase": 10, "click": 1}``; those
            that are not in it have :func:`default_behaviour_values`.
        behaviour_names: names by behaviour code, as the dataset has them.
        default_value: value of an observed item whose behaviour is not recorded.
        side: which side behaviour the sampler ``"impressions"`` takes; its value is that of
            ``behaviour_values``, else 3 for a cart and 0 for an impression.

    Raises:
        ValueError: a value is negative or not finite, or a behaviour has none and no default.
    """

    name = "r_a"

    def __init__(
        self,
        behaviour_values: Mapping[str, float] | None = None,
        behaviour_names: Sequence[str] = (),
        *,
        default_value: float = _LIKED,
        side: str = "impression",
    ) -> None:
        given = dict(behaviour_values or {})
        rest = default_behaviour_values([name for name in behaviour_names if name not in given])
        behaviour_values = {**rest, **given}
        values = {**behaviour_values, "default_value": default_value}
        for name, value in values.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"behaviour_values[{name!r}] must be finite and >= 0; got {value}")
        table = [behaviour_values[name] for name in behaviour_names]
        # Shown (-3), augmented (-2) and not recorded (-1) come last, where negative indices find
        # them.
        shown = behaviour_values.get(side, 0.0 if side == "impression" else _known_value(side))
        if shown is None:
            raise ValueError(f"behaviour_values has no value for the side behaviour {side!r}")
        self._table = torch.tensor([*table, shown, 0.0, default_value], dtype=torch.float32)
        self._largest = max(table, default=default_value)

    def of_codes(self, behaviours: Tensor) -> Tensor:
        """Values of behaviour codes, of any shape; negative codes as in :class:`SignalContext`."""
        self._table = self._table.to(behaviours.device)
        return self._table[behaviours]

    def check_largest(self) -> None:
        """Raise ValueError where no behaviour has a value above 0, of which there are no shares."""
        if not self._largest > 0:
            raise ValueError("behaviour_values must have a value > 0; got 0 for every behaviour")

    def shares(self, behaviours: Tensor) -> Tensor:
        """``v / v_max`` in [0, 1] of behaviour codes, v_max being the largest of the data's."""
        return (self.of_codes(behaviours) / self._largest).clamp_max(1.0)

    def __call__(self, context: SignalContext) -> Tensor:
        return self.of_codes(context.behaviours)


class EstimatedScore:
    """``r_yhat``: ``softplus(z)``, z the collaborative score standardised over the catalogue.

    Mean 0 and variance 1 per user. The softplus is ours: the paper says "standardised", and a sum
    of standardised scores could be negative. It is z itself for the items that matter (within 0.05
    from z = 3 on). Zero without a collaborative model.
    """

    name = "r_yhat"

    def __call__(self, context: SignalContext) -> Tensor:
        if context.scores is None:
            return torch.zeros(context.items.shape, device=context.items.device)
        scores = context.scores.float()
        # Relative to one of them, so that equal scores are exactly 0 from their mean. Not by
        # torch.std_mean, which on a CPU takes ten times as long.
        scores = scores - scores[:, :1]
        centred = scores - scores.mean(dim=1, keepdim=True)
        norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
        std = norm / math.sqrt(scores.shape[1])
        z = centred.gather(1, context.items.clamp_min(0)) / std.clamp_min(_TINY)
        return torch.nn.functional.softplus(z).clamp_min(_TINY)


class GenerationProbability:
    """``r_generation``: the backbone's own probability of the identifier, per token.

    ``P(trajectory | prompt)^(1 / tokens)``, the geometric mean of its tokens' probabilities, in
    (0, 1]: the paper's alternative to ``r_yhat``. Needs no collaborative model; costs a forward
    pass without gradients per step.
    """

    name = "r_generation"

    def __call__(self, context: SignalContext) -> Tensor:
        if context.log_probs is None:
            raise ValueError("the signal 'r_generation' needs context.log_probs")
        length = context.mask.sum(-1).clamp_min(1)
        return (context.log_probs() / length).exp()


class FormatSimilarity:
    """``r_sim``: positions at which the tokens equal the positive's."""

    name = "r_sim"

    def __call__(self, context: SignalContext) -> Tensor:
        tokens, mask = context.tokens, context.mask
        return ((tokens == tokens[:, :1]) & mask & mask[:, :1]).sum(-1).float()


def check_signal_names(names: object) -> list[str]:
    """The names as a list.

    Raises:
        ValueError: none, a repeated one, or one that is neither built in nor ``"module:Class"``.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ValueError(f"signals must be a list of names such as {list(SIGNALS)}; got {names!r}")
    known = [*SIGNALS, CATALOGUE_SIGNAL]
    for name in names:
        if name not in known and not is_outside(name):
            raise ValueError(f"signals: {name!r} is neither one of {known} nor 'module:Class'")
    if len(set(names)) < len(names):
        raise ValueError(f"signals must not repeat one; got {list(names)}")
    return list(names)


def make_signals(
    names: Sequence[str],
    *,
    behaviour_values: Mapping[str, float] | None = None,
    behaviour_names: Sequence[str] = (),
    default_value: float = _LIKED,
    side: str = "impression",
) -> list[RewardSignal]:
    """The signals of these names, see the module's docstring.

    Args:
        names: of :data:`SIGNALS`, or ``"module:Class"``.
        behaviour_values, behaviour_names, default_value, side: of :class:`InteractionLevel`.

    Raises:
        ValueError: an unknown name, a class that cannot be had or is no signal, two signals of one
            name, or what :class:`InteractionLevel` refuses.
    """
    made: list[RewardSignal] = []
    if CATALOGUE_SIGNAL in check_signal_names(names):
        raise ValueError(
            f"signals must be of trajectories; got {CATALOGUE_SIGNAL!r}, which is of all items: "
            "see CatalogueReward"
        )
    for name in names:
        if name == "r_a":
            made.append(
                InteractionLevel(
                    behaviour_values, behaviour_names, default_value=default_value, side=side
                )
            )
        elif name == "r_yhat":
            made.append(EstimatedScore())
        elif name == "r_generation":
            made.append(GenerationProbability())
        elif name == "r_sim":
            made.append(FormatSimilarity())
        else:
            made.append(_load(name))
    labels = [signal.name for signal in made]
    if len(set(labels)) < len(labels):
        raise ValueError(f"signals must have different names; got {labels}")
    return made


def _load(path: str) -> RewardSignal:
    make = load_outside(path, "signals")
    try:
        signal: RewardSignal = make()
    except TypeError as error:
        raise ValueError(f"signals: cannot make {path!r}: {error}") from error
    if not isinstance(getattr(signal, "name", None), str) or not callable(signal):
        raise ValueError(f"signals: {path!r} needs a `name` and `__call__(context)`")
    return signal
