"""A generative recommender as a GFlowNet: backbone, partition head and prefix tree."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from .. import files
from ..errors import DataError
from ..ops import tb_loss, trajectory_logprobs, vargrad_log_z, vargrad_loss
from ..tree import PrefixTree
from .backbone import encode_prompt, output_head, trajectory_hidden_states
from .partition import PartitionHead, PartitionMode
from .vocabulary import IdentifierVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FlowSettings", "GFlowModel", "Objective"]

Objective = Literal["sft", "tb"]
_FORMAT = 1


@dataclass(frozen=True)
class FlowSettings:
    """What :class:`GFlowModel` computes; saved with it.

    Attributes:
        objective: ``"sft"``: next-token prediction of the positive alone; ``"tb"``: joint with
            trajectory balance over the prompt's trajectories.
        partition: how log Z is had: ``"learned"``, ``"scalar"`` or ``"vargrad"``.
        gfn_weight: lambda of the joint loss ``L_GR + lambda * L_GFN``.
        beta: exponent of the reward (``beta * log_reward``).
        normalize: ``"vocab"``: softmax over the whole vocabulary; ``"children"``: over the children
            of the prefix-tree node only.
        max_history: items of a history that the prompt keeps.
    """

    objective: Objective = "sft"
    partition: PartitionMode = "learned"
    gfn_weight: float = 1.0
    beta: float = 1.0
    normalize: Literal["vocab", "children"] = "vocab"
    max_history: int = 20

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("objective", self.objective, get_args(Objective)),
            ("partition", self.partition, get_args(PartitionMode)),
            ("normalize", self.normalize, ("vocab", "children")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {value!r}")
        if not (math.isfinite(self.gfn_weight) and self.gfn_weight >= 0):
            raise ValueError(f"gfn_weight must be finite and >= 0; got {self.gfn_weight}")
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"beta must be finite and > 0; got {self.beta}")
        if self.max_history < 1:
            raise ValueError(f"max_history must be >= 1; got {self.max_history}")


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
        if settings.objective == "tb" and settings.partition != "vargrad":
            width = int(backbone.config.d_model)
            self.partition = PartitionHead(width, settings.partition)

    def with_settings(self, **changes: Any) -> GFlowModel:
        """A deep copy with a fresh partition head, to fine-tune from here.

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
    ) -> dict[str, Tensor]:
        """The joint objective (GFlowGR, eq. of the joint loss).

        Args:
            input_ids: prompts [B, S].
            attention_mask: 1 for real prompt tokens [B, S].
            tokens: trajectories [B, N, L]; n = 0 is the observed positive.
            mask: true for real tokens [B, N, L].
            log_reward: log R [B, N]; needed by the ``"tb"`` objective.

        Returns:
            ``loss``, ``loss_gr`` (token-summed negative log-likelihood of the positive, mean over
            prompts); for ``"tb"`` also ``loss_gfn``, ``log_z`` and ``log_z_group`` (means over
            prompts, detached).
        """
        if self.settings.objective == "sft":
            tokens = tokens[:, :1]
            mask = None if mask is None else mask[:, :1]
        pooled, log_pf = self.log_pf(input_ids, attention_mask, tokens, mask)
        loss_gr = -log_pf[:, 0].sum(-1).mean()
        if self.settings.objective == "sft":
            return {"loss": loss_gr, "loss_gr": loss_gr.detach()}
        if log_reward is None:
            raise ValueError("log_reward is required by the objective 'tb'")
        beta = self.settings.beta
        group = vargrad_log_z(log_pf.detach(), log_reward, mask=mask, beta=beta)
        if self.partition is None:
            log_z = group
            loss_gfn = vargrad_loss(log_pf, log_reward, mask=mask, beta=beta)
        else:
            log_z = self.partition(pooled)
            loss_gfn = tb_loss(log_pf, log_reward, log_z, mask=mask, beta=beta)
        return {
            "loss": loss_gr + self.settings.gfn_weight * loss_gfn,
            "loss_gr": loss_gr.detach(),
            "loss_gfn": loss_gfn.detach(),
            "log_z": log_z.detach().mean(),
            "log_z_group": group.mean(),
        }

    def log_pf(
        self, input_ids: Tensor, attention_mask: Tensor, tokens: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pooled prompt states [B, d] and forward log-probabilities [B, N, L] of trajectories."""
        prompt = encode_prompt(self.backbone, input_ids, attention_mask)
        hidden = trajectory_hidden_states(self.backbone, prompt, tokens, mask)
        weight, bias = output_head(self.backbone)
        tree = None
        if self.settings.normalize == "children":
            self._place_tree()
            tree = self.tree
        log_pf = trajectory_logprobs(hidden, weight, tokens, bias=bias, tree=tree, mask=mask)
        return prompt.pooled(), log_pf

    def _place_tree(self) -> None:
        if self.tree.device != self.device:
            self.tree = self.tree.to(self.device)

    def save_pretrained(self, folder: Path | str) -> None:
        """Save an ordinary ``transformers`` checkpoint, ``tree.safetensors``, the partition head
        (``partition.safetensors``) and ``gflowgr.json``."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.save_pretrained(folder)
        self.tree.save(folder / "tree.safetensors")
        if self.partition is not None:
            with files.atomic_path(folder / "partition.safetensors") as path:
                save_file({k: v.contiguous() for k, v in self.partition.state_dict().items()}, path)
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
        from safetensors.torch import load_file

        backbone = type(self.backbone).from_pretrained(folder)
        self.backbone.load_state_dict(backbone.state_dict())
        if self.partition is not None:
            self.partition.load_state_dict(load_file(Path(folder) / "partition.safetensors"))

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> GFlowModel:
        """Load what :meth:`save_pretrained` wrote.

        Raises:
            DataError: the folder is not a gflowgr checkpoint, of an unknown format, or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file
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
            if model.partition is not None:
                model.partition.load_state_dict(load_file(folder / "partition.safetensors"))
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{folder}: incomplete or damaged checkpoint: {reason}") from error
        return model
