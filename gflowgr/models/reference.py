"""The frozen reference of an objective: the model as the fine-tuning began.

Only weights that train can differ from it, so only those are kept: with LoRA the adapters and the
identifier tokens' rows (which make the reference the model with its adapters switched off), else
the weights of the backbone. Memory: one more copy of the weights that train; no gradients.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import files
from ..errors import DataError
from ..ops import trajectory_logprobs
from .backbone import evaluating, output_head
from .packed import trajectory_hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Reference", "ReferenceStates"]

_FILE = "reference.safetensors"

ReferenceStates = tuple[Tensor, Tensor, Tensor | None]
"""States [B, N, L, d] of trajectories, and weight and bias of the head, without gradient."""


class Reference:
    """Frozen weights, which take the place of a backbone's own for one forward pass.

    Args:
        weights: by their names in the backbone.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    @classmethod
    def of(cls, backbone: PreTrainedModel) -> Reference:
        """A copy of the weights that train, with their present values."""
        return cls({name: value.detach().clone() for name, value in _trained(backbone).items()})

    @torch.no_grad()
    def states(
        self,
        backbone: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        tokens: Tensor,
        mask: Tensor | None,
    ) -> ReferenceStates:
        """The reference's states of trajectories, without dropout; arguments as those of
        :func:`gflowgr.models.trajectory_hidden_states`."""
        weights = {f"backbone.{name}": value for name, value in self.weights.items()}
        inputs = (input_ids, attention_mask, tokens, mask)
        with evaluating(backbone):
            states = functional_call(_States(backbone), weights, inputs)
        return cast(ReferenceStates, states)

    @torch.no_grad()
    def log_pf(
        self,
        backbone: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        tokens: Tensor,
        mask: Tensor | None,
        head: dict[str, Any],
    ) -> Tensor:
        """The reference's log-probabilities [B, N, L] of trajectories; 0 at padding.

        Args:
            backbone, input_ids, attention_mask, tokens, mask: as in :meth:`states`.
            head: tree and normalisation of the model's own head.
        """
        inputs = (input_ids, attention_mask, tokens, mask)
        hidden, weight, bias = self.states(backbone, *inputs)
        own = head | {"weight": weight, "bias": bias}
        return trajectory_logprobs(hidden, tokens=tokens, mask=mask, **own)

    def save(self, folder: Path) -> None:
        """Write ``reference.safetensors``."""
        from safetensors.torch import save_file

        with files.atomic_path(folder / _FILE) as path:
            save_file({name: value.contiguous() for name, value in self.weights.items()}, path)

    @classmethod
    def load(cls, folder: Path, backbone: PreTrainedModel) -> Reference:
        """Read what :meth:`save` wrote, to where the backbone is.

        Raises:
            DataError: the file is not there, damaged, or of another model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        mine = _trained(backbone)
        try:
            weights = load_file(folder / _FILE)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{folder / _FILE}: no reference to be read: {error}") from error
        shapes, wanted = ({k: v.shape for k, v in side.items()} for side in (weights, mine))
        if shapes != wanted:
            raise DataError(f"{folder / _FILE} is the reference of another model")
        return cls({name: weights[name].to(value) for name, value in mine.items()})


class _States(nn.Module):
    """Hidden states and head as one call, so that weights can be put into both."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, *inputs: Any) -> ReferenceStates:
        backbone = cast("PreTrainedModel", self.backbone)
        return (trajectory_hidden_states(backbone, *inputs).hidden, *output_head(backbone))


def _trained(backbone: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value for name, value in backbone.named_parameters() if value.requires_grad}
