"""A generative recommender as a GFlowNet: backbone, flow heads and prefix tree."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .. import files
from ..errors import DataError
from ..ops import trajectory_logprobs
from ..ops.flow_definitions import reduce_trajectories
from ..rewards.fusion import RewardFusion
from ..tree import PrefixTree
from .backbone import output_head, trajectory_hidden_states
from .flow_settings import FlowSettings
from .objective import Head, flow_logs, flow_start, joint_loss, supervised_loss
from .partition import PartitionHead
from .state_flow import StateFlow, partial_log_reward
from .vocabulary import IdentifierVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FlowSettings", "GFlowModel"]

_FORMAT = 1
_HEADS = ("partition", "state_flow", "fusion")


class GFlowModel(nn.Module):
    """What the trainer trains: an ordinary ``transformers`` backbone, and what GFlowGR adds to it.

    Args:
        backbone: a T5-family model whose vocabulary is ``vocabulary``.
        tree: prefix tree over all items' identifiers, in the backbone's token ids.
        vocabulary: the identifier tokens.
        settings: objective and its constants.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tree: PrefixTree,
        vocabulary: IdentifierVocabulary,
        settings: FlowSettings,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.tree = tree
        self.vocabulary = vocabulary
        self.settings = settings
        self.partition: PartitionHead | None = None
        self.state_flow: StateFlow | None = None
        self.fusion: RewardFusion | None = None
        if settings.objective == "sft":
            return
        width = output_head(backbone)[0].shape[1]
        self.fusion = RewardFusion(len(settings.signals), settings.fusion)
        if settings.objective in ("db", "subtb"):
            self.state_flow = StateFlow(width, tree.max_length)
        elif settings.partition != "vargrad":
            self.partition = PartitionHead(width, settings.partition)

    def with_settings(self, **changes: Any) -> GFlowModel:
        """A deep copy with fresh flow heads, to fine-tune from here.

        Args:
            **changes: fields of :class:`FlowSettings` that differ from this model's.
        """
        settings = replace(self.settings, **changes)
        return GFlowModel(copy.deepcopy(self.backbone), self.tree, self.vocabulary, settings)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def item_tokens(self) -> Tensor:
        """Identifiers of all items [items, L], right-padded with -1, on the model's device."""
        self._place_tree()
        return self.tree.identifiers(torch.arange(self.tree.num_items, device=self.tree.device))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        tokens: Tensor,
        mask: Tensor | None = None,
        log_reward: Tensor | None = None,
        *,
        signals: Tensor | None = None,
        log_proposal: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The joint objective (GFlowGR, eq. of the joint loss), through the fused losses.

        Args:
            input_ids: prompts [B, S].
            attention_mask: 1 for real prompt tokens [B, S].
            tokens: trajectories [B, N, L]; n = 0 is the observed positive.
            mask: true for real tokens [B, N, L].
            log_reward: log R [B, N]; the flow objectives need it or ``signals``.
            signals: the reward's signals [B, N, K], >= 0, in the order of ``settings.signals``, for
                the model's fusion.
            log_proposal: log-probability with which a sampler drew each trajectory [B, N]; NaN for
                those that were not drawn, the positive among them. Read if
                ``settings.importance_clip`` is set.

        Returns:
            ``loss``, ``loss_gr`` (token-summed negative log-likelihood of the positive, mean over
            prompts, their sum for the reduction "sum"). For the flow objectives also, detached:
            ``loss_gfn``; ``log_z`` and the group estimate ``log_z_group``, means over prompts, and
            ``log_z_gap_rms``, the root mean square of their difference; ``loss_fusion`` (how far a
            learned fusion is from the sum) and ``importance`` (mean weight) where there is one.

        Raises:
            ValueError: neither or both of ``log_reward`` and ``signals``, or no ``log_proposal``
                where the settings ask for importance weights; or what the fused losses refuse.
        """
        settings = self.settings
        if settings.objective == "sft":
            tokens = tokens[:, :1]
            mask = None if mask is None else mask[:, :1]
            hidden, _ = self._states(input_ids, attention_mask, tokens, mask)
            loss = supervised_loss(settings, self._head(), hidden, tokens, mask)
            return {"loss": loss, "loss_gr": loss.detach()}
        if mask is None:
            mask = torch.ones_like(tokens, dtype=torch.bool)
        log_reward = self._log_reward(log_reward, signals)
        hidden, pooled = self._states(input_ids, attention_mask, tokens, mask)
        target = self._target(hidden, pooled, tokens, mask)
        loss, log_pf, weights = joint_loss(
            settings, self._head(), hidden, tokens, mask, log_reward, target, log_proposal
        )
        logs = flow_logs(settings, log_pf, log_reward, target, mask)
        valid = mask.any(-1)
        if weights is not None:
            logs["importance"] = weights.masked_fill(~valid, 0.0).sum() / valid.sum()
        if signals is not None and self.fusion is not None and self.fusion.learned:
            departure = self.fusion.departure(signals, log_reward).masked_fill(~valid, 0.0)
            anchor = reduce_trajectories(departure, valid, settings.reduction)
            loss = loss + settings.gfn_weight * settings.fusion_anchor * anchor
            logs["loss_fusion"] = anchor.detach()
            if self.fusion.mode == "weighted":
                weights = self.fusion.weights().detach()
                logs |= {f"fusion/{n}": w for n, w in zip(settings.signals, weights, strict=True)}
        return {"loss": loss, **logs}

    def log_pf(
        self, input_ids: Tensor, attention_mask: Tensor, tokens: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pooled prompt states [B, d] and forward log-probabilities [B, N, L] of trajectories."""
        hidden, pooled = self._states(input_ids, attention_mask, tokens, mask)
        return pooled, trajectory_logprobs(hidden, tokens=tokens, mask=mask, **self._head())

    @torch.no_grad()
    def log_probs(self, flow: dict[str, Tensor]) -> Tensor:
        """log P(trajectory | prompt) [B, N] of the inputs of :meth:`forward`, without dropout."""
        was_training = self.training
        self.eval()
        names = ("input_ids", "attention_mask", "tokens", "mask")
        _, log_pf = self.log_pf(*(flow[name] for name in names))
        self.train(was_training)
        return log_pf.sum(-1)

    # ---- parts of the objective ----

    def _states(
        self, input_ids: Tensor, attention_mask: Tensor, tokens: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """States [B, N, L, d] that predict the tokens, and pooled prompt states [B, d]."""
        states = trajectory_hidden_states(self.backbone, input_ids, attention_mask, tokens, mask)
        return states.hidden, states.pooled

    def _head(self) -> Head:
        """The output head, as the ops take it."""
        weight, bias = output_head(self.backbone)
        tree = None
        if self.settings.normalize != "vocab":
            self._place_tree()
            tree = self.tree
        return {
            "weight": weight,
            "bias": bias,
            "tree": tree,
            "normalize": self.settings.normalize,
        }

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
    def estimate_flow(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        tokens: Tensor,
        mask: Tensor,
        log_reward: Tensor | None = None,
        *,
        signals: Tensor | None = None,
        log_proposal: Tensor | None = None,
    ) -> Tensor:
        """A start for :meth:`start_flow` from a batch [L], see
        :func:`gflowgr.models.objective.flow_start`; arguments as those of :meth:`forward`."""
        was_training = self.training
        self.eval()
        _, log_pf = self.log_pf(input_ids, attention_mask, tokens, mask)
        self.train(was_training)
        log_reward = self._log_reward(log_reward, signals)
        return flow_start(self.settings, log_pf, log_reward, tokens, mask)

    def start_flow(self, log_flow: Tensor) -> None:
        """Start log Z, or log F, at ``log_flow`` [L] for all prompts; see :meth:`estimate_flow`."""
        if self.partition is not None:
            self.partition.initialise(log_flow[0])
        elif self.state_flow is not None:
            self.state_flow.initialise(log_flow)

    def _place_tree(self) -> None:
        if self.tree.device != self.device:
            self.tree = self.tree.to(self.device)

    # ---- checkpoints ----

    def save_pretrained(self, folder: Path | str) -> None:
        """Save an ordinary ``transformers`` checkpoint, ``tree.safetensors``, the flow heads and
        the learned fusion (``heads.safetensors``) and ``gflowgr.json``."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.save_pretrained(folder)
        self.tree.save(folder / "tree.safetensors")
        heads = self._head_state()
        if heads:
            with files.atomic_path(folder / "heads.safetensors") as path:
                save_file({name: value.contiguous() for name, value in heads.items()}, path)
        files.write_json(
            folder / "gflowgr.json",
            {
                "format": _FORMAT,
                "vocabulary": self.vocabulary.to_dict(),
                "settings": asdict(self.settings),
            },
        )

    def load_weights(self, folder: Path | str) -> None:
        """Load the weights that :meth:`save_pretrained` wrote into this model, in place."""
        backbone = type(self.backbone).from_pretrained(folder)
        self.backbone.load_state_dict(backbone.state_dict())
        self._load_heads(Path(folder))

    def _head_state(self) -> dict[str, Tensor]:
        """Weights of everything beside the backbone, by their names in this model."""
        state: dict[str, Tensor] = {}
        for name in _HEADS:
            module: nn.Module | None = getattr(self, name)
            if module is not None:
                state |= module.state_dict(prefix=f"{name}.")
        return state

    def _load_heads(self, folder: Path) -> None:
        from safetensors.torch import load_file

        mine = self._head_state()
        if not mine:
            return
        saved = load_file(folder / "heads.safetensors")
        if saved.keys() != mine.keys():
            different = sorted(saved.keys() ^ mine.keys())
            raise RuntimeError(f"heads.safetensors and the settings disagree on {different}")
        self.load_state_dict(saved, strict=False)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> GFlowModel:
        """Load what :meth:`save_pretrained` wrote.

        Raises:
            DataError: the folder is not a gflowgr checkpoint, of an unknown format, or damaged.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForSeq2SeqLM

        folder = Path(folder)
        description = folder / "gflowgr.json"
        if not description.is_file():
            raise DataError(f"{folder} is not a gflowgr checkpoint: it has no gflowgr.json")
        values: dict[str, Any] = files.read_json(description, expect=dict)
        if values.get("format") != _FORMAT:
            raise DataError(f"{description}: format {values.get('format')!r}, expected {_FORMAT}")
        try:
            vocabulary = IdentifierVocabulary.from_dict(values["vocabulary"])
            settings = FlowSettings(**values["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{description}: not what this version writes: {error!r}") from error
        try:
            backbone = AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True)
            tree = PrefixTree.load(folder / "tree.safetensors")
            model = cls(backbone, tree, vocabulary, settings)
            model._load_heads(folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{folder}: incomplete or damaged checkpoint: {reason}") from error
        return model
