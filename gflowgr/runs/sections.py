"""Sections of a run's configuration: the data, the collaborative model, the evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from ..extensions import is_outside
from ..models.prompts import PromptLayout
from ..models.vocabulary import IdentifierVocabulary
from ..plain_settings import make_plain

__all__ = [
    "COLLABORATIVE_NAMES",
    "CollaborativeConfig",
    "DataConfig",
    "EvaluationConfig",
    "OutsideGenerator",
    "collaborative_names",
]


@dataclass(frozen=True)
class DataConfig:
    """Which data.

    Attributes:
        path: folder of a dataset; none: the built-in one, generated under the output folder.
        identifiers: name of the data's identifiers (``index.<name>.json.gz``), or a path of an
            index file, or a method that makes them from texts (``kmeans``, ``rqvae``, ``letter``);
            none: the only ones there are, or, without any, residual k-means over the collaborative
            model's items.
        max_history: items of a history that prompts keep.
        split: ``"leave_one_out"``: each user's last item is the test target, the second-last that
            of validation; ``"temporal"``: training, validation and test are periods, the same for
            all users (:class:`~gflowgr.data.TemporalSplit`).
        held_out_share: temporal: share of the events in each of the last two periods.
        target_behaviour: behaviour of the targets, such as ``purchase``; all behaviours are learned
            from. None: any.
        users: users of the built-in dataset.
        items: items of the built-in dataset.
        popularity_bias: how far the built-in shop shows popular items rather than those that a user
            likes (:func:`~gflowgr.data.generate_builtin`).
    """

    path: str | None = None
    identifiers: str | None = None
    max_history: int = 20
    split: Literal["leave_one_out", "temporal"] = "leave_one_out"
    held_out_share: float = 0.1
    target_behaviour: str | None = None
    users: int = 3000
    items: int = 1200
    popularity_bias: float = 1.0

    def __post_init__(self) -> None:
        make_plain(self)
        _check_positive(self, "max_history", "users", "items")
        if not 0 < self.held_out_share < 0.5:
            raise ValueError(f"held_out_share must be in (0, 0.5); got {self.held_out_share}")
        if not 0 <= self.popularity_bias < math.inf:
            raise ValueError(f"popularity_bias must be finite and >= 0; got {self.popularity_bias}")


@dataclass(frozen=True)
class CollaborativeConfig:
    """The collaborative model, trained first.

    Attributes:
        kind: ``"sasrec"``: train one SASRec; ``"average"``: several that differ in their seeds,
            their log-softmax scores averaged; ``"cross_fitted"``: one per fold of the users,
            trained without them: no training prompt is scored by a model that has seen its user
            (:class:`~gflowgr.collaborative.CrossFitted`); ``"embeddings"``: use a table of item
            vectors; ``"none"``; one of your own, ``"module:Class"``, made with the split, a folder
            and a seed.
        models: how many ``"average"`` has; None: 3.
        folds: how many ``"cross_fitted"`` has, 2 to 4; None: 2.
        embeddings: file of the table (``.npy``, [items, d]), for ``"embeddings"``.
        epochs: upper bound on SASRec's epochs.
        batch_size: users per step.
        learning_rate: of AdamW.
        dropout: dropout rate.
        patience: evaluations without a better valid N@10 before stopping.
        exposure_power: inverse-propensity weights against exposure bias: a target counts in
            proportion to ``n^-exposure_power``, n the times that its item was engaged with or shown
            (side behaviours); 0: all alike.
    """

    kind: str = "sasrec"
    models: int | None = None
    folds: int | None = None
    embeddings: str | None = None
    epochs: int = 40
    batch_size: int = 128
    learning_rate: float = 1e-3
    dropout: float = 0.3
    patience: int = 3
    exposure_power: float = 0.0

    def __post_init__(self) -> None:
        make_plain(self)
        if self.kind not in COLLABORATIVE_NAMES and not is_outside(self.kind):
            raise ValueError(
                f"kind must be one of {list(COLLABORATIVE_NAMES)} or 'module:Class'; got "
                f"{self.kind!r}"
            )
        _check_positive(self, "epochs", "batch_size", "learning_rate", "patience")
        for name, kind in (("models", "average"), ("folds", "cross_fitted")):
            if getattr(self, name) is not None and self.kind != kind:
                raise ValueError(
                    f"{name} is of kind {kind!r}; got {getattr(self, name)} with kind {self.kind!r}"
                )
        if self.models is not None and self.models < 2:
            raise ValueError(f"models must be >= 2; got {self.models}")
        if self.folds is not None and not 2 <= self.folds <= 4:
            raise ValueError(f"folds must be in 2..4; got {self.folds}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}")
        if not 0 <= self.exposure_power <= 1:
            raise ValueError(f"exposure_power must be in [0, 1]; got {self.exposure_power}")

    @property
    def is_trained(self) -> bool:
        """Whether there is something to train."""
        return self.kind in ("sasrec", "average", "cross_fitted")


def collaborative_names(kind: str) -> list[str]:
    """What tables call the collaborative model of a kind: one name, or none for ``"none"``."""
    return COLLABORATIVE_NAMES.get(kind, [kind.partition(":")[2]])


COLLABORATIVE_NAMES: dict[str, list[str]] = {
    "sasrec": ["SASRec"],
    "average": ["SASRec average"],
    "cross_fitted": ["SASRec cross-fitted"],
    "embeddings": ["Item embeddings"],
    "none": [],
}
"""Kind of the collaborative model to its name in tables, if it has one."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How the final table is made.

    Attributes:
        num_beams: beams of the constrained beam search.
        collision: how items that share an identifier are scored: ``"item"`` or ``"string"``.
        mask_seen: leave the user's history out of the recommendations, which is the fair rule for
            data in which nobody comes back to an item; ``"both"``: report both rules.
        ks: lengths k of the lists that R@k and N@k are measured at; 10 is one of them.
        calibration: which reward, the same for all methods, generators are compared with:
            ``"signals"``: the sum of r_a, r_yhat and r_sim; ``"scores"``: the collaborative model's
            softmax, its temperature by the likelihood of validation items.
        value_weighted: also measure "V@k", the NDCG in which users count by the value of their
            target's behaviour (``finetune.behaviour_values``, the highest stars 10 by default).
        summed: also evaluate every generator together with the collaborative model: its beams in
            the order of the sum of both log-probabilities
            (:class:`~gflowgr.evaluation.SummedRecommender`).
        max_users: evaluate a fixed random subset of the test users only.
        examples: users whose recommendations the report shows.
    """

    num_beams: int = 20
    collision: Literal["item", "string"] = "item"
    mask_seen: bool | Literal["both"] = False
    calibration: Literal["signals", "scores"] = "signals"
    ks: list[int] = field(default_factory=lambda: [5, 10])
    value_weighted: bool = False
    summed: bool = False
    max_users: int | None = None
    examples: int = 3

    def __post_init__(self) -> None:
        make_plain(self)
        _check_positive(self, "num_beams", "max_users")
        if self.examples < 0:
            raise ValueError(f"examples must be >= 0; got {self.examples}")
        if not all(type(k) is int and k >= 1 for k in self.ks) or 10 not in self.ks:
            raise ValueError(f"ks must be integers >= 1, with 10 among them; got {self.ks}")
        object.__setattr__(self, "ks", sorted(set(self.ks)))


@runtime_checkable
class OutsideGenerator(Protocol):
    """A generator from outside the package: a dataclass whose fields are its settings.

    Attributes:
        kind: ``"module:Class"``, its own name.
    """

    kind: str

    def build(self, vocabulary: IdentifierVocabulary, *, max_history: int, seed: int) -> Any:
        """The untrained backbone, a model of ``transformers`` with the tokens of ``vocabulary``.

        Args:
            vocabulary: the identifier tokens.
            max_history: items of a history that a prompt may have.
            seed: of the weights.
        """
        ...

    def prompt(self, vocabulary: IdentifierVocabulary) -> PromptLayout:
        """How histories become prompts, such as ``TIGER_PROMPT``."""
        ...

    def summary(self) -> str:
        """What reports say of it."""
        ...


def _check_positive(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and > 0; got {value}")
