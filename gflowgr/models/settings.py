"""What a :class:`~gflowgr.models.GFlowModel` computes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from ..extensions import is_outside
from ..plain_settings import make_plain
from ..rewards.fusion import FusionMode
from ..rewards.signals import CATALOGUE_SIGNAL, SIGNALS, check_signal_names
from .heads import PartitionMode

__all__ = ["FlowSettings", "Flows", "Normalize", "Objective", "Reduction"]

Objective = Literal[
    "sft", "tb", "db", "subtb", "flow_kl", "distill", "dpo", "sdpo", "grpo", "sprec", "ipa"
]
Normalize = Literal["vocab", "level", "children"]
Reduction = Literal["prompt", "mean", "sum"]
Flows = Literal["exact", "learned"]

_LABELS = {
    "sft": "SFT",
    "tb": "GFlowGR-TB",
    "db": "GFlowGR-DB",
    "subtb": "GFlowGR-SubTB",
    "flow_kl": "GFlowGR-FlowKL",
    "distill": "Distillation",
    "dpo": "DPO",
    "sdpo": "S-DPO",
    "grpo": "GRPO",
    "sprec": "SPRec",
    "ipa": "IPA",
}
_BALANCE = ("tb", "db", "subtb")  # objectives over sampled trajectories
_PAPER_SIGNALS = ("r_a", "r_yhat", "r_sim")
_EXACT_CLIP = 3.0
# Of log-ratios to the reference, or of the divergence from it, as released with each method.
_REFERENCE_WEIGHTS = {"dpo": 0.1, "sdpo": 1.0, "grpo": 1e-3, "sprec": 0.1, "ipa": 0.1}


@dataclass(frozen=True)
class FlowSettings:
    """What :class:`GFlowModel` computes; saved with it.

    Attributes:
        objective: ``"sft"``: next-token prediction of the positive alone; joint with it over the
            prompt's trajectories: ``"tb"``, trajectory balance; ``"db"``, detailed balance;
            ``"subtb"``, balance of all sub-trajectories; ``"flow_kl"``, the divergence of the model
            from the exact flow's policy at the trajectories' prefixes, over all children of each.
            The baselines: ``"distill"``, the negative log-likelihood of items that the sampler
            ``"teacher"`` draws at its ``teacher_temperature``, their mean per prompt (forward KL by
            samples, where ``"flow_kl"`` has the whole distribution); and against a frozen reference
            (the model when the fine-tuning began): ``"dpo"``, the positive against one other
            trajectory; ``"sdpo"``, against several; ``"grpo"``, the policy gradient of the
            reward in the group of the positive and the trajectories that the model generated;
            and in rounds, see :mod:`gflowgr.training.rounds`: ``"sprec"``, self-play by SFT and
            DPO in turn; ``"ipa"``, SFT and DPO between generated trajectories.
            One of your own, ``"module:function"``, is called with log_pf [B, N, L] (0 at padding),
            beta * log_reward [B, N], log_z [B] and mask [B, N, L], and gives the losses of the
            trajectories [B, N] in nats squared or nats; it takes the place of ``"tb"``.
        flows: what ``"tb"``, ``"db"`` and ``"subtb"`` balance against. ``"exact"``: log Z and the
            log-flows that follow from the reward of every item, computed on the tree, as
            ``"flow_kl"`` always has them; no head is made, and what follows is a residual of 0
            exactly where P_F is proportional to R. ``"learned"``: heads (the paper's way). None:
            exact where the reward is one of every item, that is ``signals`` has ``"r_cm"``.
        partition: how ``"tb"`` has log Z where it is learned: ``"learned"``, ``"scalar"`` or
            ``"vargrad"``, the prompt's own estimate, also beside exact flows. The others have it in
            the flow of the empty prefix.
        subtb_lambda: a sub-trajectory of m tokens has the weight ``subtb_lambda^m``.
        forward_looking: the state flow of ``"db"`` and ``"subtb"`` is a learned residual plus the
            partial reward ``beta * log(1 + r_sim of the prefix)``; see
            :func:`~gflowgr.models.heads.partial_log_reward`.
        gfn_weight: lambda of the joint loss ``L_GR + lambda * L_GFN``; for the baselines, of
            ``sft_weight * L_GR + lambda * L_baseline``, for ``"ipa"`` of ``L_GR + lambda * L_DPO``.
        sft_weight: weight of L_GR in the loss of ``"dpo"``, ``"sdpo"`` and ``"grpo"``.
        label_smoothing: of ``"sft"``: the share of every target that goes to the whole catalogue,
            ``(1 - share) NLL + share KL(U || P_F)`` at the positive's prefixes, where U draws each
            item of the catalogue alike; in [0, 1). No probability is wanted where no item is.
        behaviour_temperature: of ``"sft"``: weigh every target by ``exp((v / v_max - 1) / this)``,
            v being the value of its behaviour (reward-weighted regression on r_a); None: all alike.
        preference_beta: weight of the log-ratios to the reference, in ``"grpo"`` of the divergence
            from it; None: 0.1, for ``"sdpo"`` 1, for ``"grpo"`` 0.001.
        residual_clip: residual in nats from which the losses of ``"tb"`` and ``"db"`` are linear
            (Huber); 0: squared throughout; None: 3 with exact flows, else 0.
        reference: add log P of the model as it was when the training began to the trajectories'
            log-reward, ``beta * log R + log pi_ref`` (the target of KL-regularised tuning): with
            learned flows, or ``partition`` ``"vargrad"``, since exact ones would need it of every
            item.
        reward_temperature: of exact flows, whose reward is the softmax of the collaborative
            model's scores over the catalogue: what divides the scores; None: chosen by the
            likelihood of the validation items.
        seen_items: what that reward is of items of the prompt's own past: ``"zero"``, for data
            without repeats, or ``"keep"``.
        observed_share: alpha of that reward, ``(1 - alpha) * softmax + alpha * 1[observed]``, the
            latter times the observed behaviour's value over the largest.
        signals: the reward's signals by name. Of learned flows and the baselines, see
            :mod:`gflowgr.rewards.signals`. Of exact flows, see
            :class:`~gflowgr.rewards.CatalogueReward`: ``"r_cm"``, which the default stands for
            there, and ``"module:Class"``.
        fusion: how signals become a reward: ``"sum"``, ``"weighted"`` or ``"mlp"``; the latter two
            are learned, see :mod:`gflowgr.rewards.fusion`.
        fusion_anchor: weight that keeps a learned fusion near the sum.
        beta: exponent of the reward (``beta * log_reward``); ``"dpo"``, ``"sdpo"`` and
            ``"sprec"`` use none.
        log_reward_floor: least ``beta * log_reward``, nats; None: no floor.
        normalize: over what a token's probability is normalised. ``"vocab"``: the vocabulary;
            ``"level"``: the codebook of its position; ``"children"``: the children of the
            prefix-tree node.
        reduction: ``"prompt"``: mean over prompts of the sum over trajectories (the paper's);
            ``"mean"`` over trajectories; ``"sum"``. None: ``"mean"`` for ``"tb"``, ``"db"`` and
            ``"subtb"`` with exact flows, so that ``gfn_weight`` means the same for any number of
            trajectories, else ``"prompt"``. The baselines' losses are one number per prompt, and
            ``"mean"`` is ``"prompt"``.
        importance_clip: weigh each drawn trajectory's flow loss by ``P_F / proposal``, detached
            and at most this, to estimate the on-policy loss from off-policy samples; None: no
            weights (all these losses are valid off-policy as they are).
        max_history: items of a history that the prompt keeps.
    """

    objective: Objective | str = "sft"
    flows: Flows | None = None
    partition: PartitionMode = "learned"
    subtb_lambda: float = 0.9
    forward_looking: bool = False
    gfn_weight: float = 1.0
    sft_weight: float = 0.0
    label_smoothing: float = 0.0
    behaviour_temperature: float | None = None
    preference_beta: float | None = None
    residual_clip: float | None = None
    reference: bool = False
    reward_temperature: float | None = None
    seen_items: Literal["zero", "keep"] = "zero"
    observed_share: float = 0.0
    signals: list[str] = field(default_factory=lambda: list(_PAPER_SIGNALS))
    fusion: FusionMode = "sum"
    fusion_anchor: float = 1.0
    beta: float = 1.0
    log_reward_floor: float | None = None
    normalize: Normalize = "vocab"
    reduction: Reduction | None = None
    importance_clip: float | None = None
    max_history: int = 20

    def __post_init__(self) -> None:
        make_plain(self)
        if self.objective not in get_args(Objective) and not self.is_outside:
            raise ValueError(
                f"objective must be one of {get_args(Objective)} or 'module:function'; got "
                f"{self.objective!r}"
            )
        if self.is_outside and (self.partition == "vargrad" or self.importance_clip is not None):
            raise ValueError(
                f"objective {self.objective!r} needs a learned log Z and no importance_clip; got "
                f"partition {self.partition!r}, importance_clip {self.importance_clip}"
            )
        for name in (
            "gfn_weight",
            "beta",
            "subtb_lambda",
            "importance_clip",
            "preference_beta",
            "reward_temperature",
            "behaviour_temperature",
        ):
            number: float | None = getattr(self, name)
            if number is not None and not (math.isfinite(number) and number > 0):
                hint = "; for no flow loss: objective 'sft'" if name == "gfn_weight" else ""
                raise ValueError(f"{name} must be finite and > 0; got {number}{hint}")
        for name in ("fusion_anchor", "sft_weight", "residual_clip"):
            number = getattr(self, name)
            if number is not None and not (math.isfinite(number) and number >= 0):
                raise ValueError(f"{name} must be finite and >= 0; got {number}")
        if not 0 <= self.observed_share <= 1:
            raise ValueError(f"observed_share must be in [0, 1]; got {self.observed_share}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1); got {self.label_smoothing}")
        if self.log_reward_floor is not None and not math.isfinite(self.log_reward_floor):
            raise ValueError(f"log_reward_floor must be finite; got {self.log_reward_floor}")
        if self.max_history < 1:
            raise ValueError(f"max_history must be >= 1; got {self.max_history}")
        object.__setattr__(self, "signals", check_signal_names(self.signals))
        if self.forward_looking and not self.has_state_flow:
            raise ValueError(
                f"forward_looking needs objective 'db' or 'subtb'; got {self.objective!r}"
            )
        if self.forward_looking and "r_sim" not in self.signals:
            raise ValueError(f"forward_looking needs the signal 'r_sim'; signals: {self.signals}")
        self._check_kind()

    @property
    def is_outside(self) -> bool:
        """Whether the objective is one of the user's own."""
        return is_outside(self.objective)

    @property
    def has_state_flow(self) -> bool:
        """Whether the objective learns log F of prefixes."""
        return self.objective in ("db", "subtb")

    @property
    def has_partition(self) -> bool:
        """Whether the objective learns log Z of prompts."""
        return self.is_outside or (self.objective == "tb" and self.partition != "vargrad")

    @property
    def has_reference(self) -> bool:
        """Whether the objective is one of those against a frozen reference."""
        return self.objective in _REFERENCE_WEIGHTS

    @property
    def uses_reward(self) -> bool:
        """Whether the objective depends on rewards."""
        return self.objective not in ("sft", "dpo", "sdpo", "sprec")

    @property
    def has_exact_flows(self) -> bool:
        """Whether the objective reads the flows of every item's reward, computed on the tree."""
        if self.objective not in _BALANCE:
            return self.objective in ("flow_kl", "distill")
        return self.flows == "exact" or (self.flows is None and CATALOGUE_SIGNAL in self.signals)

    @property
    def balances(self) -> bool:
        """Whether the objective is a balance along trajectories: TB, DB or SubTB."""
        return self.objective in _BALANCE

    @property
    def catalogue_signals(self) -> list[str]:
        """Signals of exact flows' reward."""
        return self.signals if CATALOGUE_SIGNAL in self.signals else [CATALOGUE_SIGNAL]

    @property
    def is_vargrad(self) -> bool:
        """Whether log Z is each prompt's own estimate."""
        return self.objective == "tb" and self.partition == "vargrad"

    @property
    def clip(self) -> float | None:
        """``residual_clip``, or what it is by default; None: no end."""
        if self.residual_clip is not None:
            return self.residual_clip or None
        clipped = self.objective in ("tb", "db") and self.has_exact_flows
        return _EXACT_CLIP if clipped else None

    @property
    def reduced_by(self) -> Reduction:
        """``reduction``, or what it is by default."""
        if self.reduction is not None:
            return self.reduction
        return "mean" if self.balances and self.has_exact_flows else "prompt"

    @property
    def keeps_reference(self) -> bool:
        """Whether the model as it was when the training began is kept beside."""
        return self.has_reference or self.reference

    @property
    def in_rounds(self) -> bool:
        """Whether the objective is one of those with supervised steps in between."""
        return self.objective in ("sprec", "ipa")

    @property
    def counts_apart(self) -> bool:
        """Whether the loss's second term is a mean over other things than prompts: over
        trajectories, or over the prompts that have a pair to compare."""
        if self.reduced_by == "sum" or self.objective in ("sft", "flow_kl", "distill"):
            return False
        if self.has_reference:
            return self.objective != "grpo"
        return self.reduced_by == "mean"

    @property
    def label(self) -> str:
        """The method's name in tables."""
        if self.objective == "sft" and self.behaviour_temperature is not None:
            return "Weighted SFT"
        return _LABELS.get(self.objective, self.objective.partition(":")[2])

    @property
    def reference_weight(self) -> float:
        """``preference_beta``, or what it is by default."""
        if self.preference_beta is not None:
            return self.preference_beta
        return _REFERENCE_WEIGHTS[self.objective]

    def _check_kind(self) -> None:
        """Refuse what the objective would ignore."""
        unread = {
            "reward_temperature": self.reward_temperature is not None,
            "observed_share": self.observed_share > 0,
        }
        for name, given in unread.items():
            if given and self.objective == "distill":
                raise ValueError(
                    f"{name} is of flows; got {getattr(self, name)} with objective 'distill', "
                    "whose draws have the sampler's teacher_temperature"
                )
            if given and not self.has_exact_flows:
                raise ValueError(
                    f"{name} is of exact flows (objective 'flow_kl', or flows 'exact'); got "
                    f"{getattr(self, name)} with objective {self.objective!r}"
                )
        for name in ("label_smoothing", "behaviour_temperature"):
            if getattr(self, name) and self.objective != "sft":
                raise ValueError(
                    f"{name} is of the objective 'sft'; got {getattr(self, name)} with objective "
                    f"{self.objective!r}"
                )
        self._check_flows()
        if self.balances and self.has_exact_flows:
            self._check_exact()
        if self.sft_weight > 0 and (self.in_rounds or not self.has_reference):
            raise ValueError(
                "sft_weight is of the objectives 'dpo', 'sdpo' and 'grpo'; got "
                f"{self.sft_weight} with objective {self.objective!r}"
            )
        if not self.has_reference:
            if self.preference_beta is not None:
                raise ValueError(
                    f"preference_beta is of the objectives {', '.join(_REFERENCE_WEIGHTS)}; got "
                    f"{self.preference_beta} with objective {self.objective!r}"
                )
            return
        if self.fusion != "sum":
            raise ValueError(
                f"fusion {self.fusion!r} is learned by flow losses; objective {self.objective!r} "
                "needs 'sum'"
            )
        if self.importance_clip is not None:
            raise ValueError(
                f"importance_clip is of the flow objectives; got {self.importance_clip} with "
                f"objective {self.objective!r}"
            )

    def _check_flows(self) -> None:
        """Refuse options of other objectives, and flows that the reward does not fit."""
        objective = f"objective {self.objective!r}"
        if self.flows is not None and not (self.balances or self.objective == "flow_kl"):
            raise ValueError(
                f"flows is of the objectives 'tb', 'db', 'subtb' and 'flow_kl'; got {self.flows!r} "
                f"with {objective}"
            )
        if self.flows == "learned" and self.objective == "flow_kl":
            raise ValueError("flows must be 'exact' for objective 'flow_kl'; got 'learned'")
        if self.objective == "distill" and self.reduction not in (None, "prompt"):
            raise ValueError(
                "reduction must be 'prompt' for objective 'distill', which is a mean over each "
                f"prompt's draws; got {self.reduction!r}"
            )
        if self.residual_clip is not None and self.objective not in ("tb", "db"):
            raise ValueError(
                f"residual_clip is of the objectives 'tb' and 'db'; got {self.residual_clip} with "
                f"{objective}"
            )
        of_items = CATALOGUE_SIGNAL in self.signals
        if of_items and self.objective != "sft" and not self.has_exact_flows:
            raise ValueError(
                f"signals must be without {CATALOGUE_SIGNAL!r}, a reward of exact flows; got "
                f"{self.signals} with {objective}, flows {self.flows!r}"
            )
        if of_items and (others := [name for name in SIGNALS if name in self.signals]):
            raise ValueError(
                f"signals must be {CATALOGUE_SIGNAL!r} and 'module:Class' for a reward of every "
                f"item; got {others} beside"
            )
        if not self.reference:
            return
        if not self.balances:
            raise ValueError(
                f"reference is of the objectives 'tb', 'db' and 'subtb'; got {objective}"
            )
        if self.has_exact_flows and not self.is_vargrad:
            raise ValueError(
                "reference must be false for exact flows, which would need the frozen model's "
                "probability of every item of the catalogue; got true: use flows 'learned', or "
                "objective 'tb' with partition 'vargrad'"
            )
        if self.log_reward_floor is not None:
            raise ValueError(
                "log_reward_floor must be None with reference, whose log-probabilities have no "
                f"floor; got {self.log_reward_floor}"
            )

    def _check_exact(self) -> None:
        """Refuse what is of learned flows, or of the reward of sampled trajectories."""
        wanted: dict[str, tuple[bool, str]] = {
            "partition": (self.partition != "scalar", "'learned' (unread) or 'vargrad'"),
            "forward_looking": (not self.forward_looking, "false"),
            "fusion": (self.fusion == "sum", "'sum'"),
            "beta": (self.beta == 1.0, "1 (reward_temperature divides the scores)"),
            "log_reward_floor": (self.log_reward_floor is None, "None"),
            "signals": (
                CATALOGUE_SIGNAL in self.signals or self.signals == list(_PAPER_SIGNALS),
                f"[{CATALOGUE_SIGNAL!r}], and more as 'module:Class'",
            ),
        }
        for name, (good, value) in wanted.items():
            if not good:
                raise ValueError(
                    f"{name} must be {value} for exact flows; got {getattr(self, name)!r} (or use "
                    "flows 'learned')"
                )
