"""Settings of samplers, and the function that makes a sampler from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from ..extensions import is_outside, load_outside
from ..plain_settings import make_plain
from .base import TrajectorySampler
from .mixture import MixtureSampler
from .on_policy import ConfidenceSampler, OnPolicySampler
from .pool import CandidatePool, Exclude
from .proposer import BackboneProposer, ProposalMethod
from .replay import ReplaySampler
from .schedules import Schedule, ScheduleShape
from .strategies import (
    CurriculumSampler,
    ImpressionSampler,
    LogSampler,
    PopularitySampler,
    RandomSampler,
)
from .teacher import TeacherSampler

if TYPE_CHECKING:
    from ..data import Split
    from ..models.gflow_model import GFlowModel

__all__ = ["KINDS", "MakeSampler", "SamplerSettings", "make_sampler"]

MakeSampler = Callable[[CandidatePool, int], TrajectorySampler]
"""Makes a sampler of a pool and N, as the class of one does."""

KINDS = (
    "curriculum",
    "random",
    "popularity",
    "logs",
    "impressions",
    "on_policy",
    "confidence",
    "teacher",
)
_SCORED = ("curriculum", "confidence", "teacher")


@dataclass(frozen=True)
class SamplerSettings:
    """Which sampler, and its constants.

    Attributes:
        kind: one of :data:`KINDS`, or one of your own as ``"module:Class"``, a
            :class:`TrajectorySampler` made of a pool and N; or a mixture as weights by name.
        pool_size: curriculum: items of the pool (default 2 N - 1).
        schedule: curriculum: ``"linear"``, ``"cosine"``, ``"step"`` or ``"constant"``.
        schedule_start: curriculum: score quantile at the beginning.
        schedule_end: curriculum: score quantile at the end.
        schedule_steps: curriculum: stages of the schedule ``"step"``.
        alpha: popularity: exponent of the counts.
        window: logs: events before and after the positive that count as its neighbours.
        session_gap: logs: longest pause within a session, in the data's time units; None: the
            window alone.
        side: impressions: the side behaviour that they are, such as ``"cart"``.
        teacher_temperature: teacher: divides the collaborative scores. A mixture that suits a
            reward over the catalogue is ``{"teacher": 1, "on_policy": 1}`` with ``method``
            ``"sample_without_replacement"`` and ``refresh_steps`` 1.
        exclude: what may not be an augmented item, see :mod:`gflowgr.samplers.pool`; None: as the
            objective wants.
        method: on_policy: ``"beam"``, ``"sample"`` or ``"sample_without_replacement"``.
        temperature: on_policy, confidence: divides the backbone's logits.
        num_proposals: on_policy, confidence: items asked for per prompt (default 2 (N - 1)).
        refresh_steps: on_policy, confidence: the backbone is asked every so many steps.
        confidence_pool: confidence: best items of the collaborative model to choose from.
        fallback: on_policy, confidence: the sampler of users without proposals; default:
            ``"curriculum"`` with a collaborative model, else ``"random"``.
        replay_share: share of the items replayed by reward from earlier steps; 0: none.
        replay_slots: items kept per user for that.
        capacity: users whose items are kept, for replay and for proposals.
    """

    kind: str | Mapping[str, float] = "curriculum"
    pool_size: int | None = None
    schedule: ScheduleShape = "linear"
    schedule_start: float = 0.0
    schedule_end: float = 1.0
    schedule_steps: int = 4
    alpha: float = 0.75
    window: int = 10
    session_gap: float | None = None
    side: str = "impression"
    teacher_temperature: float = 1.0
    exclude: Exclude | None = None
    method: ProposalMethod = "beam"
    temperature: float = 1.0
    num_proposals: int | None = None
    refresh_steps: int = 10
    confidence_pool: int = 32
    fallback: str | None = None
    replay_share: float = 0.0
    replay_slots: int = 16
    capacity: int = 100_000

    def __post_init__(self) -> None:
        make_plain(self)
        if not self.weights:
            raise ValueError("sampler is an empty mixture; name at least one sampler")
        for name, weight in self.weights.items():
            if name not in KINDS and not is_outside(name):
                raise ValueError(
                    f"sampler must be one of {KINDS}, 'module:Class', or weights of them; "
                    f"got {name!r}"
                )
            if isinstance(weight, bool) or not 0 < weight < float("inf"):
                raise ValueError(
                    f"sampler: weight of {name!r} must be finite and > 0; got {weight}"
                )
        for name in (
            "pool_size",
            "window",
            "num_proposals",
            "refresh_steps",
            "confidence_pool",
            "replay_slots",
            "capacity",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1; got {value}")
        for name, low in (("alpha", 0.0), ("session_gap", 0.0)):
            value = getattr(self, name)
            if value is not None and not low <= value < float("inf"):
                raise ValueError(f"{name} must be finite and >= 0; got {value}")
        for name in ("temperature", "teacher_temperature"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be finite and > 0; got {value}")
        if self.exclude is not None and self.exclude not in get_args(Exclude):
            raise ValueError(f"exclude must be one of {get_args(Exclude)}; got {self.exclude!r}")
        if not 0 <= self.replay_share <= 1:
            raise ValueError(f"replay_share must be in [0, 1]; got {self.replay_share}")
        allowed = tuple(kind for kind in KINDS if kind not in ("on_policy", "confidence"))
        if self.fallback is not None and self.fallback not in allowed:
            raise ValueError(f"fallback must be one of {allowed}; got {self.fallback!r}")
        self.make_schedule()

    @property
    def weights(self) -> dict[str, float]:
        """The mixture's weights by name; a single sampler has weight 1."""
        return {self.kind: 1.0} if isinstance(self.kind, str) else dict(self.kind)

    @property
    def needs_scores(self) -> bool:
        """Whether a collaborative model is needed."""
        return self.fallback in _SCORED or any(name in _SCORED for name in self.weights)

    def make_schedule(self) -> Schedule:
        """The curriculum's schedule."""
        return Schedule(self.schedule, self.schedule_start, self.schedule_end, self.schedule_steps)


def make_sampler(
    settings: SamplerSettings,
    pool: CandidatePool,
    num_trajectories: int,
    *,
    split: Split,
    model: GFlowModel | None = None,
    has_scores: bool = False,
    own: MakeSampler | None = None,
) -> TrajectorySampler:
    """Build what the settings describe.

    Args:
        settings: which sampler.
        pool: what may be sampled.
        num_trajectories: N, the positive included.
        split: the data, for logs, impressions and popularity.
        model: the backbone, for on-policy samplers.
        has_scores: whether requests will carry a collaborative model's scores.
        own: makes the sampler, in place of the settings' ``kind``.

    Raises:
        ValueError: the settings need a collaborative model or a backbone that is not there, or do
            not fit N or the data.
    """
    if own is None and settings.needs_scores and not has_scores:
        name = next((n for n in settings.weights if n in _SCORED), settings.fallback)
        raise ValueError(
            f"sampler={name!r} needs a collaborative model; pass one, or sampler='random'"
        )
    count = num_trajectories

    def proposer() -> BackboneProposer:
        if model is None:
            raise ValueError("model is required by the samplers 'on_policy' and 'confidence'")
        return BackboneProposer(
            model, settings.method, temperature=settings.temperature, seed=pool.seed
        )

    def build(name: str) -> TrajectorySampler:
        if name == "random":
            return RandomSampler(pool, count)
        if name == "popularity":
            return PopularitySampler(pool, count, split.item_counts, settings.alpha)
        if name == "teacher":
            return TeacherSampler(pool, count, settings.teacher_temperature)
        if name == "curriculum":
            return CurriculumSampler(pool, count, settings.pool_size, settings.make_schedule())
        if name == "logs":
            return LogSampler(
                pool, count, split, window=settings.window, session_gap=settings.session_gap
            )
        if name == "impressions":
            return ImpressionSampler(pool, count, split, settings.side)
        if name not in KINDS:
            return _made(load_outside(name, "sampler"), repr(name), pool, count, has_scores)
        fallback = build(settings.fallback or ("curriculum" if has_scores else "random"))
        if name == "on_policy":
            return OnPolicySampler(
                proposer(),
                fallback,
                num_proposals=settings.num_proposals,
                refresh_steps=settings.refresh_steps,
                capacity=settings.capacity,
            )
        return ConfidenceSampler(
            proposer(),
            fallback,
            pool_size=settings.confidence_pool,
            num_proposals=settings.num_proposals,
            refresh_steps=settings.refresh_steps,
            capacity=settings.capacity,
        )

    weights = settings.weights
    sampler: TrajectorySampler
    if own is not None:
        sampler = _made(own, repr(own), pool, count, has_scores)
    elif len(weights) == 1:
        sampler = build(next(iter(weights)))
    else:
        sampler = MixtureSampler({name: build(name) for name in weights}, weights)
    if settings.replay_share > 0:
        sampler = ReplaySampler(
            sampler,
            settings.replay_share,
            slots=settings.replay_slots,
            capacity=settings.capacity,
        )
    return sampler


def _made(
    make: MakeSampler, name: str, pool: CandidatePool, count: int, has_scores: bool
) -> TrajectorySampler:
    """A sampler from outside the package."""
    try:
        made = make(pool, count)
    except TypeError as error:
        raise ValueError(f"sampler: cannot make {name}: {error}") from error
    if not isinstance(made, TrajectorySampler):
        raise ValueError(f"sampler must be a TrajectorySampler; got {name}, a {type(made)}")
    if made.needs_scores and not has_scores:
        raise ValueError(f"sampler={name} needs a collaborative model; pass one")
    return made
