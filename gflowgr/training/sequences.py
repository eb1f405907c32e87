"""Whole sequences as training examples: windows, their collation, and the inputs of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..collaborative import CollaborativeModel
from ..data import Split, pad_histories
from ..models.gflow_model import GFlowModel
from ..models.prompts import PromptLayout
from ..models.sequences import check_sequences, sequence_prompts
from ..transfer import to_device
from .catalogue import PromptRewards
from .config import GFlowGRConfig
from .packing import cut_windows
from .step_log import Logs

__all__ = ["SequenceCollator", "SequenceExamples", "SequenceInputs"]


class SequenceExamples(Dataset[dict[str, Any]]):
    """The training sequences of a split, cut into windows; every item but a window's first is a
    target.

    Args:
        split: the data.
        max_history: most items that a target's history has within a window.

    Attributes:
        lengths: targets of each window [E].
    """

    def __init__(self, split: Split, max_history: int) -> None:
        self._items = split.train_sequences.values
        self._behaviours = split.train.behaviours
        self._begin, self.lengths, self._user = cut_windows(split.train_sequences, max_history)

    def __len__(self) -> int:
        return len(self._begin)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``example``, ``user``, ``items`` int64 [n + 1], oldest first, and ``behaviours`` of the n
        targets (-1 where the data has none)."""
        begin = int(self._begin[index])
        end = begin + int(self.lengths[index]) + 1
        behaviours = np.full(end - begin - 1, -1, np.int64)
        if self._behaviours is not None:
            behaviours = self._behaviours[begin + 1 : end].astype(np.int64)
        return {
            "example": int(index),
            "user": int(self._user[index]),
            "items": self._items[begin:end].astype(np.int64),
            "behaviours": behaviours,
        }


class SequenceCollator:
    """Turns windows into a batch of :class:`~gflowgr.models.sequences.SequencePrompts`.

    Args:
        item_tokens: identifiers of all items [items, L], right-padded with -1 (on the CPU).
        layout: what stands around them.
    """

    def __init__(self, item_tokens: Tensor, layout: PromptLayout) -> None:
        self.item_tokens = item_tokens
        self.layout = layout

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The fields of ``SequencePrompts``; ``items`` [W, P + 1] and ``behaviours`` [W, P], padded
        with -1; ``example`` and ``user`` [W]; ``targets``, how many the batch has, int64 []."""
        items = pad_histories([example["items"] for example in examples])
        prompts = sequence_prompts(items, self.item_tokens, self.layout)
        batch = prompts._asdict() | {
            "items": items,
            "behaviours": pad_histories([example["behaviours"] for example in examples]),
            "targets": (items[:, 1:] >= 0).sum(),
        }
        for name in ("example", "user", "joint"):
            if name in examples[0]:
                values: npt.NDArray[np.int64] = np.array([example[name] for example in examples])
                batch[name] = torch.from_numpy(values)
        return batch


class SequenceInputs:
    """Makes the inputs of :meth:`gflowgr.models.GFlowModel.forward` from batches of windows.

    Args:
        model: for its tree, prompts and settings.
        args: configuration.
        split: the data.
        collaborative: scores items for the reward; ``"sft"`` needs none.

    Raises:
        ValueError: the model's prompts are no beginnings of one another, or the objective needs
            sampled trajectories.
    """

    reads_model = False  # no call uses the model's parameters
    reward = None  # of trajectories

    def __init__(
        self,
        model: GFlowModel,
        args: GFlowGRConfig,
        split: Split,
        collaborative: CollaborativeModel | None,
    ) -> None:
        settings = model.settings
        if settings.objective not in ("sft", "flow_kl"):
            raise ValueError(
                "sequences must be off for objectives of sampled trajectories; got "
                f"{settings.objective!r}: use 'sft' or 'flow_kl'"
            )
        check_sequences(model.backbone, model.prompt, settings.max_history + 1)
        self.item_tokens = model.item_tokens().to(args.device)
        self.rewards: PromptRewards | None = None
        if settings.has_exact_flows:
            self.rewards = PromptRewards(settings, args, split, collaborative)

    def __call__(self, inputs: dict[str, Any], **_: Any) -> tuple[dict[str, Tensor], Logs]:
        """The model's inputs, and nothing to log.

        Args:
            inputs: a batch of :class:`SequenceCollator`.
        """
        device = self.item_tokens.device
        names = ("input_ids", "attention_mask", "tokens", "mask", "states")
        flow = {name: to_device(inputs[name], device) for name in names}
        if self.rewards is not None:
            flow["catalogue_log_reward"] = self.rewards.of_sequences(
                inputs["items"], inputs["behaviours"], inputs["user"], device
            )
        return flow, {}

    def save_state(self, folder: Path) -> None:
        """Nothing has to be saved."""

    def load_state(self, folder: Path) -> None:
        """Nothing was saved."""
