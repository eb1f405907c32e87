"""A generative recommender as a GFlowNet: backbone, flow heads and prefix tree."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..item_ids import ItemIds
from ..ops import trajectory_logprobs
from ..rewards.fusion import RewardFusion
from ..tree import PrefixTree, item_flows
from .backbone import evaluating, output_head
from .branches import sequence_trajectories
from .exact_objective import distillation_loss, exact_loss
from .heads import PartitionHead, StateFlow, partial_log_reward
from .monitor import measurements
from .normalization import record_normalize
from .objective import (
    Head,
    balance_loss,
    flow_statistics,
    fusion_term,
    supervised_loss,
    term_counts,
    with_reference,
)
from .packed import trajectory_hidden_states
from .preference_objective import best_and_worst, preference_loss
from .prompts import TIGER_PROMPT, PromptLayout
from .reference import Reference
from .saved_model import SavedModel
from .settings import FlowSettings
from .vocabulary import IdentifierVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["FlowSettings", "GFlowModel"]


class GFlowModel(SavedModel):
    """What the trainer trains: an ordinary ``transformers`` backbone, and what GFlowGR adds to it.

    Args:
        backbone: a model that :func:`~gflowgr.models.trajectory_hidden_states` runs, with the
            tokens of ``vocabulary``.
        tree: prefix tree over all items' identifiers, in the backbone's token ids.
        vocabulary: the identifier tokens.
        settings: objective and its constants.
        prompt: how histories become prompts.
        tokenizer: saved with the model; a T5 over identifier tokens alone has none.
        item_ids: the items' ids in the data, saved with the model; None: their numbers are the ids.

    Raises:
        ValueError: ``item_ids`` are of another number of items than the tree's.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tree: PrefixTree,
        vocabulary: IdentifierVocabulary,
        settings: FlowSettings,
        prompt: PromptLayout = TIGER_PROMPT,
        tokenizer: PreTrainedTokenizerBase | None = None,
        item_ids: ItemIds | None = None,
    ) -> None:
        super().__init__()
        if item_ids is not None and len(item_ids) != tree.num_items:
            raise ValueError(
                f"item_ids must have one id for each of the tree's {tree.num_items:,} items; got "
                f"{len(item_ids):,}"
            )
        self.backbone = backbone
        record_normalize(backbone, settings.normalize)  # for searches that get the backbone alone
        self.tree = tree
        self.vocabulary = vocabulary
        self.settings = settings
        self.prompt = prompt
        self.tokenizer = tokenizer
        self.item_ids = item_ids
        self.partition: PartitionHead | None = None
        self.state_flow: StateFlow | None = None
        self.fusion: RewardFusion | None = None
        self.reference: Reference | None = None
        if settings.objective == "sft" or settings.has_exact_flows:
            return
        width = output_head(backbone)[0].shape[1]
        self.fusion = RewardFusion(len(settings.signals), settings.fusion)
        if settings.has_state_flow:
            self.state_flow = StateFlow(width, tree.max_length)
        elif settings.has_partition:
            self.partition = PartitionHead(width, settings.partition)

    def with_settings(self, **changes: Any) -> GFlowModel:
        """A deep copy with fresh flow heads, to fine-tune from here.

        Args:
            **changes: fields of :class:`FlowSettings` that differ from this model's.
        """
        settings = replace(self.settings, **changes)
        backbone = copy.deepcopy(self.backbone)
        parts = (self.tree, self.vocabulary, settings, self.prompt, self.tokenizer, self.item_ids)
        return GFlowModel(backbone, *parts)

    @property
    def _no_split_modules(self) -> Any:
        """The backbone's layers, each of which FSDP shards by itself."""
        return getattr(self.backbone, "_no_split_modules", None)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def item_tokens(self) -> Tensor:
        """Identifiers of all items [items, L], right-padded with -1, on the model's device."""
        tree = self._placed_tree()
        return tree.identifiers(torch.arange(tree.num_items, device=tree.device))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        tokens: Tensor,
        mask: Tensor | None = None,
        log_reward: Tensor | None = None,
        *,
        signals: Tensor | None = None,
        log_proposal: Tensor | None = None,
        states: Tensor | None = None,
        branches: Tensor | None = None,
        branch_mask: Tensor | None = None,
        observed: Tensor | None = None,
        catalogue_log_reward: Tensor | None = None,
        target_weights: Tensor | None = None,
        flow_share: float = 1.0,
    ) -> dict[str, Tensor]:
        """The joint objective (GFlowGR, eq. of the joint loss), through the fused losses.

        Args:
            input_ids: prompts [B, S].
            attention_mask: 1 for real prompt tokens [B, S]; None: every token is real.
            tokens: trajectories [B, N, L]; n = 0 is the observed positive. Alone (N = 1) it makes
                a supervised step of the objectives ``"sprec"`` and ``"ipa"``.
            mask: true for real tokens [B, N, L].
            log_reward: log R [B, N]; the flow objectives, ``"grpo"`` and ``"ipa"`` need it or
                ``signals``.
            signals: the reward's signals [B, N, K], >= 0, in the order of ``settings.signals``, for
                the model's fusion.
            log_proposal: log-probability with which a sampler drew each trajectory [B, N]; NaN for
                those that were not drawn, the positive among them. Read if
                ``settings.importance_clip`` is set.
            states: of whole sequences: where in its row each token is predicted [B, N, L], as in
                :class:`~gflowgr.models.sequences.SequencePrompts`. Then ``input_ids`` are
                sequences, and each of a row's N items with a real token is the one trajectory of
                its own prompt, of which there are T in all, row by row. Objective ``"sft"`` and
                those with exact flows.
            branches: of whole sequences: further trajectories of the T prompts [T, M, L].
            branch_mask: true for their real tokens [T, M, L].
            observed: of whole sequences: false for prompts whose item is no target [T]; None: all
                are. A prompt without one has the flow's term alone.
            catalogue_log_reward: log R of every item [B, items] ([T, items] with ``states``), -inf
                for none; objectives with exact flows need it, and take the trajectories' rewards
                from it: a trajectory without one has no flow loss, a positive its supervised term.
            target_weights: of objective ``"sft"``: multiply the prompts' losses [B] ([T] with
                ``states``); None: all alike.
            flow_share: multiplies the flow's, or the preference's, part of the loss. For a part of
                a larger batch, if that term is a mean over trajectories or pairs of the larger one,
                of which the parts have different numbers per prompt.

        Returns:
            ``loss``, ``loss_gr`` (token-summed negative log-likelihood of the positive, mean over
            prompts, their sum for the reduction "sum"). For the flow objectives also, detached:
            ``loss_gfn``; ``log_z`` and the group estimate ``log_z_group``, means over prompts, and
            ``log_z_gap_rms``, the root mean square of their difference; ``residual_mean`` and
            ``residual_rms``; ``loss_fusion`` (how far a learned fusion is from the sum) and
            ``importance`` (mean weight) where there is one; and what :mod:`.monitor` measures:
            ``entropy_first_token``, ``distinct_prefixes``, and ``kl_positive`` with exact flows.
            For the baselines ``loss_preference``, ``reference_divergence`` (per token), and
            ``preference_margin`` and ``preference_accuracy``: by how much and how often the
            positive has gained more over the reference than the best of the others.

        Raises:
            ValueError: neither or both of ``log_reward`` and ``signals``, no ``log_proposal`` where
                the settings ask for importance weights, or no ``catalogue_log_reward`` or frozen
                reference where they need one; or what the fused losses refuse.
        """
        settings = self.settings
        if states is not None or settings.has_exact_flows:
            return self._exact(
                input_ids,
                attention_mask,
                tokens,
                mask,
                states,
                (branches, branch_mask, observed),
                catalogue_log_reward,
                log_proposal,
                flow_share,
                target_weights,
            )
        alone = settings.in_rounds and tokens.shape[1] == 1
        if settings.objective == "sft" or alone:
            tokens = tokens[:, :1]
            mask = None if mask is None else mask[:, :1]
            hidden, _ = self._states(input_ids, attention_mask, tokens, mask)
            return self._supervised(hidden, tokens, mask, target_weights)
        if mask is None:
            mask = torch.ones_like(tokens, dtype=torch.bool)
        if settings.has_reference:
            prompts = (input_ids, attention_mask, tokens, mask)
            return self._preference(*prompts, log_reward, signals, flow_share)
        log_reward = self._log_reward(log_reward, signals)
        hidden, pooled = self._states(input_ids, attention_mask, tokens, mask)
        target = self._target(hidden, pooled, tokens, mask)
        trajectories = (self._head(), hidden, tokens, mask)
        log_reference = self._log_reference(input_ids, attention_mask, tokens, mask)
        further = (log_reward, target, log_proposal, log_reference)
        loss, logs = balance_loss(settings, *trajectories, *further, flow_share=flow_share)
        if signals is not None and self.fusion is not None and self.fusion.learned:
            valid = mask.any(-1)
            anchor, of_fusion = fusion_term(settings, self.fusion, signals, log_reward, valid)
            loss, logs = loss + settings.gfn_weight * flow_share * anchor, logs | of_fusion
        return {"loss": loss, **logs, **self._measured(hidden, tokens, mask)}

    def log_pf(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        tokens: Tensor,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Pooled prompt states [B, d] and forward log-probabilities [B, N, L] of trajectories."""
        hidden, pooled = self._states(input_ids, attention_mask, tokens, mask)
        return pooled, trajectory_logprobs(hidden, tokens=tokens, mask=mask, **self._head())

    @torch.no_grad()
    def log_probs(self, flow: dict[str, Tensor]) -> Tensor:
        """log P(trajectory | prompt) [B, N] of the inputs of :meth:`forward`, without dropout."""
        names = ("input_ids", "attention_mask", "tokens", "mask")
        with evaluating(self):
            return self.log_pf(*(flow[name] for name in names))[1].sum(-1)

    def freeze_reference(self) -> None:
        """Make the model as it is now the reference of the preference objectives."""
        self.reference = Reference.of(self.backbone)

    # ---- parts of the objective ----

    def _exact(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        tokens: Tensor,
        mask: Tensor | None,
        states: Tensor | None,
        further: tuple[Tensor | None, Tensor | None, Tensor | None],
        catalogue_log_reward: Tensor | None,
        log_proposal: Tensor | None,
        flow_share: float,
        target_weights: Tensor | None,
    ) -> dict[str, Tensor]:
        """:meth:`forward` of whole sequences, and of exact flows."""
        if mask is None:
            mask = torch.ones_like(tokens, dtype=torch.bool)
        if states is None:
            hidden, _ = self._states(input_ids, attention_mask, tokens, mask)
        else:
            hidden, tokens, mask = sequence_trajectories(
                self.backbone, input_ids, states, tokens, mask, *further
            )
        if not self.settings.has_exact_flows:
            return self._supervised(hidden, tokens, mask, target_weights)
        if catalogue_log_reward is None:
            raise ValueError(
                "catalogue_log_reward is required by the objective "
                f"{self.settings.objective!r}; got None"
            )
        head = (self.settings, self._head(), hidden, tokens, mask)
        if self.settings.objective == "distill":
            loss, logs = distillation_loss(*head, flow_share=flow_share)
        else:
            flows = item_flows(self._placed_tree(), catalogue_log_reward)
            log_reference = self._log_reference(input_ids, attention_mask, tokens, mask)
            given = (flows, log_proposal, log_reference)
            loss, logs = exact_loss(*head, *given, flow_share=flow_share)
        if (observed := further[2]) is not None:
            logs["loss_gr"] = logs["loss_gr"] * (len(observed) / observed.sum().clamp(min=1))
        return {"loss": loss, **logs, **self._measured(hidden, tokens, mask)}

    def _supervised(
        self, hidden: Tensor, tokens: Tensor, mask: Tensor | None, weights: Tensor | None
    ) -> dict[str, Tensor]:
        given = (self.settings, self._head(), hidden, tokens, mask)
        loss = supervised_loss(*given, tree=self._placed_tree(), weights=weights)
        return {"loss": loss, "loss_gr": loss.detach()}

    def _measured(self, hidden: Tensor, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        head = output_head(self.backbone)
        return measurements(self._placed_tree(), *head, hidden, tokens, mask)

    def _log_reference(
        self, input_ids: Tensor, attention_mask: Tensor | None, tokens: Tensor, mask: Tensor
    ) -> Tensor | None:
        """The reference's log P of trajectories [B, N], where the settings add it to the reward."""
        if not self.settings.reference:
            return None
        inputs = (input_ids, attention_mask, tokens, mask)
        return self._frozen().log_pf(self.backbone, *inputs, self._head()).sum(-1)

    def _frozen(self) -> Reference:
        if self.reference is None:
            raise ValueError(
                f"objective {self.settings.objective!r} needs a reference: call freeze_reference() "
                "before the training (GFlowGRTrainer does)"
            )
        return self.reference

    def _preference(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        tokens: Tensor,
        mask: Tensor,
        log_reward: Tensor | None,
        signals: Tensor | None,
        flow_share: float,
    ) -> dict[str, Tensor]:
        """:meth:`forward` of the objectives against a reference."""
        frozen = self._frozen()
        if self.settings.uses_reward:
            log_reward = self._log_reward(log_reward, signals)
        if self.settings.objective == "ipa":
            assert log_reward is not None
            tokens, mask = best_and_worst(tokens, mask, log_reward)
        trajectories = (input_ids, attention_mask, tokens, mask)
        reference = frozen.states(self.backbone, *trajectories)
        hidden, _ = self._states(*trajectories)
        loss, logs = preference_loss(
            self.settings,
            self._head(),
            hidden,
            tokens,
            mask,
            reference,
            log_reward,
            flow_share=flow_share,
        )
        return {"loss": loss, **logs}

    def _states(
        self, input_ids: Tensor, attention_mask: Tensor | None, tokens: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """States [B, N, L, d] that predict the tokens, and pooled prompt states [B, d]."""
        states = trajectory_hidden_states(self.backbone, input_ids, attention_mask, tokens, mask)
        return states.hidden, states.pooled

    def _head(self) -> Head:
        """The output head, as the ops take it."""
        weight, bias = output_head(self.backbone)
        normalize = self.settings.normalize
        tree = None if normalize == "vocab" else self._placed_tree()
        return {"weight": weight, "bias": bias, "tree": tree, "normalize": normalize}

    def _log_reward(self, log_reward: Tensor | None, signals: Tensor | None) -> Tensor:
        if (log_reward is None) == (signals is None):
            raise ValueError(
                f"log_reward or signals is required by the objective {self.settings.objective!r}, "
                f"and one of them only; got {'neither' if signals is None else 'both'}"
            )
        if signals is None:
            return cast(Tensor, log_reward)
        assert self.fusion is not None
        return cast(Tensor, self.fusion(signals))

    def _target(
        self, hidden: Tensor, pooled: Tensor, tokens: Tensor, mask: Tensor
    ) -> Tensor | None:
        """What the flow is balanced against: log Z [B], log F [B, N, L], or nothing for VarGrad."""
        if self.partition is not None:
            return cast(Tensor, self.partition(pooled))
        if self.state_flow is None:
            return None
        log_flow: Tensor = self.state_flow(hidden)
        if self.settings.forward_looking:
            log_flow = log_flow + partial_log_reward(tokens, mask, self.settings.beta)
        return log_flow

    # ---- where the flow starts ----

    @property
    def flow_started(self) -> bool:
        """Whether log Z or log F has its start, or needs none."""
        head = self.partition or self.state_flow
        return head is None or bool(head.initialised)

    @torch.no_grad()
    def term_counts(self, **flow: Tensor) -> Tensor:
        """How many prompts, and things that the loss's second term is a mean over, see
        :func:`gflowgr.models.objective.term_counts`; arguments as those of :meth:`forward`."""
        log_reward = None
        if self.settings.objective == "ipa" and flow["tokens"].shape[1] > 1:
            log_reward = self._log_reward(flow.get("log_reward"), flow.get("signals"))
        counts = term_counts(self.settings, flow["mask"], log_reward)
        if "branch_mask" in flow and self.settings.reduced_by == "mean":
            counts[1] += flow["branch_mask"].any(-1).sum()
        return counts

    @torch.no_grad()
    def flow_statistics(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        tokens: Tensor,
        mask: Tensor,
        log_reward: Tensor | None = None,
        *,
        signals: Tensor | None = None,
        log_proposal: Tensor | None = None,
    ) -> Tensor:
        """What a batch adds to the start of the flow [3, L + 1], see
        :func:`gflowgr.models.objective.flow_statistics`; arguments as those of :meth:`forward`."""
        with evaluating(self):
            _, log_pf = self.log_pf(input_ids, attention_mask, tokens, mask)
        log_reward = self._log_reward(log_reward, signals)
        log_reference = self._log_reference(input_ids, attention_mask, tokens, mask)
        log_reward = with_reference(self.settings, log_reward, log_reference)
        return flow_statistics(self.settings, log_pf, log_reward, tokens, mask)

    def start_flow(self, log_flow: Tensor) -> None:
        """Start log Z, or log F, at ``log_flow`` [L], as ``objective.flow_start`` gives it."""
        if self.partition is not None:
            self.partition.initialise(log_flow[0])
        elif self.state_flow is not None:
            self.state_flow.initialise(log_flow)

    def _placed_tree(self) -> PrefixTree:
        """The tree, on the model's device from now on."""
        if self.tree.device != self.device:
            self.tree = self.tree.to(self.device)
        return self.tree

    # ---- as the Trainer calls them ----

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute the backbone's activations in the backward pass; as ``transformers`` has it."""
        backbone: Any = self.backbone
        backbone.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The same by its earlier name."""
        backbone: Any = self.backbone
        backbone.gradient_checkpointing_enable(**options)
