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
from ..models.prompts import PromptLayout, prompt_tokens
from ..models.sequences import check_sequences, sequence_prompts
from ..samplers import MakeSampler, SampleRequest
from ..transfer import to_device
from .augmentation import augmented_batch, draw_items, random_positions
from .catalogue import PromptRewards, position_histories
from .config import GFlowGRConfig
from .flow_inputs import FlowInputs, difficulty_of
from .packing import cut_windows
from .step_log import Logs
from .target_weights import TargetWeights

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
        """``example``, ``user``, ``begin`` (the place of the first item among all training events),
        ``items`` int64 [n + 1], oldest first, and ``behaviours`` of the n targets (-1 where the
        data has none)."""
        begin = int(self._begin[index])
        end = begin + int(self.lengths[index]) + 1
        behaviours = np.full(end - begin - 1, -1, np.int64)
        if self._behaviours is not None:
            behaviours = self._behaviours[begin + 1 : end].astype(np.int64)
        return {
            "example": int(index),
            "user": int(self._user[index]),
            "begin": begin,
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
        with -1; ``example``, ``user`` and ``begin`` [W]; ``targets``, how many, int64 []."""
        items = pad_histories([example["items"] for example in examples])
        prompts = sequence_prompts(items, self.item_tokens, self.layout)
        batch = prompts._asdict() | {
            "items": items,
            "behaviours": pad_histories([example["behaviours"] for example in examples]),
            "targets": (items[:, 1:] >= 0).sum(),
        }
        for name in ("example", "user", "begin", "joint"):
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

    reward = None  # of sampled trajectories alone

    def __init__(
        self,
        model: GFlowModel,
        args: GFlowGRConfig,
        split: Split,
        collaborative: CollaborativeModel | None,
        sampler: MakeSampler | None = None,
    ) -> None:
        settings = model.settings
        if settings.objective != "sft" and not settings.has_exact_flows:
            raise ValueError(
                "sequences must be off for objectives of sampled trajectories; got "
                f"{settings.objective!r}: use 'sft', 'flow_kl', or flows 'exact'"
            )
        if settings.is_vargrad and args.positions_per_sequence is None:
            raise ValueError(
                "positions_per_sequence must be given for partition 'vargrad', whose loss over a "
                "prompt's single trajectory is 0; got None"
            )
        if settings.objective == "distill" and args.positions_per_sequence is None:
            raise ValueError(
                "positions_per_sequence must be given for objective 'distill', which needs items "
                "that the sampler draws; got None"
            )
        for name in ("reference", "importance_clip"):
            if value := getattr(settings, name):
                raise ValueError(f"sequences must be off with {name}; got {name} {value}")
        check_sequences(model.backbone, model.prompt, settings.max_history + 1)
        self.item_tokens = model.item_tokens().to(args.device)
        self.layout = model.prompt
        self.args = args
        self.weights = TargetWeights.of(settings, args, split)
        self.rewards: PromptRewards | None = None
        self.prompts: FlowInputs | None = None  # samples trajectories at positions
        self.augment_share = 0.0
        if not settings.has_exact_flows:
            return
        if args.augment_share and settings.objective != "flow_kl":
            raise ValueError(
                f"augment_share is of the objective 'flow_kl'; got {args.augment_share} with "
                f"objective {settings.objective!r}"
            )
        self.augment_share = args.augment_share
        if args.positions_per_sequence is None:
            self.rewards = PromptRewards(settings, args, split, collaborative)
            return
        self.prompts = FlowInputs(model, args, split, collaborative, sampler)
        self.rewards = self.prompts.rewards
        # Of each training example where among all events its positive is.
        self._ends = np.asarray(split.train.bounds[:, 1], np.int64)

    @property
    def reads_model(self) -> bool:
        """Whether a call uses the model's parameters."""
        return self.prompts is not None and self.prompts.reads_model

    def augmented(self, batch: dict[str, Tensor], epoch: int) -> dict[str, Tensor]:
        """What :func:`.augmentation.augmented_batch` adds to a batch, before it is divided."""
        if self.augment_share == 0:
            return {}
        return augmented_batch(
            batch,
            self.item_tokens.cpu(),
            self.layout,
            self.augment_share,
            seed=self.args.seed,
            epoch=epoch,
        )

    def __call__(
        self,
        inputs: dict[str, Any],
        *,
        epoch: int = 0,
        step: int = 0,
        progress: float = 0.0,
        **_: Any,
    ) -> tuple[dict[str, Tensor], Logs]:
        """The model's inputs, and what is logged of rewards and sampled trajectories.

        Args:
            inputs: a batch of :class:`SequenceCollator`, on the host, with what :meth:`augmented`
                adds.
            epoch: number of the epoch.
            step: optimiser steps done.
            progress: share of the training done, in [0, 1].
        """
        device = self.item_tokens.device
        names = ("input_ids", "attention_mask", "tokens", "mask", "states")
        flow = {name: to_device(inputs[name], device) for name in names}
        items, observed = inputs["items"], inputs.get("observed")
        if self.rewards is None:
            if self.weights is not None:
                flow |= self.weights(inputs["behaviours"][items[:, 1:] >= 0], device)
            return flow, {}
        scores = self.rewards.sequence_scores(items, inputs["user"], device)
        log_reward = self.rewards.of_sequences(
            scores, items, inputs["behaviours"], observed, overwrite=self.prompts is None
        )
        flow["catalogue_log_reward"] = log_reward
        logs = self.rewards.logs(int(inputs["targets"]))
        if self.prompts is None and observed is None:
            return flow, logs
        width = 1 if self.prompts is None else self.prompts.num_trajectories - 1
        shape = (len(log_reward), width, self.item_tokens.shape[1])
        branches = torch.zeros(shape, dtype=torch.int64, device=device)
        branch_mask = torch.zeros(shape, dtype=torch.bool, device=device)
        if self.prompts is not None:
            at, request = self._request(inputs, scores, (epoch, step, progress))
            chosen = self.prompts.sample(request)
            sampled = self.prompts.of_catalogue(request, chosen, log_reward[at])
            branches[at], branch_mask[at] = sampled["tokens"][:, 1:], sampled["mask"][:, 1:]
            logs |= difficulty_of(chosen)
        if observed is not None:
            rows, targets = len(inputs["augmented"]), int(inputs["targets"])
            valid = items[-rows:, 1:] >= 0
            drawn = draw_items(
                log_reward[targets:],
                inputs["augmented"],
                valid,
                seed=self.args.seed,
                epoch=epoch,
            )
            tokens = self.item_tokens[drawn]
            branches[targets:, 0], branch_mask[targets:, 0] = tokens.clamp_min(0), tokens >= 0
            flow["observed"] = to_device(observed, device)
        return flow | {"branches": branches, "branch_mask": branch_mask}, logs

    def _request(
        self, inputs: dict[str, Any], scores: Tensor, when: tuple[int, int, float]
    ) -> tuple[Tensor, SampleRequest]:
        """Which of the prompts have sampled trajectories [K], and the request for these."""
        assert self.prompts is not None
        epoch, step, progress = when
        rows = len(inputs["example"])
        items, behaviours = inputs["items"][:rows], inputs["behaviours"][:rows]
        valid = items[:, 1:] >= 0
        count = self.args.positions_per_sequence or 0
        chosen = random_positions(valid, inputs["example"], count, seed=self.args.seed, epoch=epoch)
        at = chosen[valid].nonzero()[:, 0]
        row, place = chosen.nonzero(as_tuple=True)
        prompt: dict[str, Tensor] = {}
        if self.reads_model:
            histories = position_histories(items[:, :-1], chosen)
            ids, mask = prompt_tokens(histories, self.item_tokens.cpu(), self.layout)
            prompt = {
                "input_ids": to_device(ids, scores.device),
                "attention_mask": to_device(mask, scores.device),
            }
        ends = (inputs["begin"][row] + 1 + place).numpy()
        at = to_device(at, scores.device)
        return at, SampleRequest(
            examples=np.searchsorted(self._ends, ends),
            users=inputs["user"][row].numpy(),
            targets=items[:, 1:][chosen].numpy(),
            epoch=epoch,
            progress=progress,
            scores=scores[at],
            behaviours=behaviours[chosen].numpy(),
            step=step,
            **prompt,
        )

    def save_state(self, folder: Path) -> None:
        """Save what the sampler needs to go on, if anything."""
        if self.prompts is not None:
            self.prompts.save_state(folder)

    def load_state(self, folder: Path) -> None:
        """Take back what :meth:`save_state` saved."""
        if self.prompts is not None:
            self.prompts.load_state(folder)
