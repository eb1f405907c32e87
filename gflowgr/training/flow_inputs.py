"""From a batch of prompts to the model's inputs: trajectories are sampled and rewarded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..collaborative import CollaborativeModel
from ..data import LeaveOneOut
from ..models.gflow_model import GFlowModel
from ..rewards import BehaviourAwareReward, SignalContext, make_signals
from ..trajectories import (
    CandidatePool,
    CurriculumSampler,
    RandomSampler,
    SampleRequest,
    TrajectorySampler,
    TrajectorySet,
)
from .config import GFlowGRConfig

__all__ = ["FlowInputs", "make_reward", "make_sampler"]

Logs = dict[str, Tensor]
LogProbs = Callable[[dict[str, Tensor]], Tensor]


class FlowInputs:
    """Makes the inputs of :meth:`gflowgr.models.GFlowModel.forward`.

    Args:
        model: for its tree and settings.
        args: configuration.
        split: the data.
        collaborative: scores items for the sampler and for r_yhat; optional.

    Raises:
        ValueError: the sampler or the reward cannot be made of these.
    """

    def __init__(
        self,
        model: GFlowModel,
        args: GFlowGRConfig,
        split: LeaveOneOut,
        collaborative: CollaborativeModel | None,
    ) -> None:
        self.item_tokens = model.item_tokens().to(args.device)
        self.collaborative = collaborative
        self.sampler: TrajectorySampler | None = None
        self.reward: BehaviourAwareReward | None = None
        if model.settings.objective == "sft":
            return
        vargrad = model.settings.objective == "tb" and model.settings.partition == "vargrad"
        if vargrad and args.num_trajectories < 2:
            raise ValueError(
                "num_trajectories must be >= 2 for partition 'vargrad', whose loss over a "
                f"single trajectory is 0; got {args.num_trajectories}"
            )
        self.sampler = make_sampler(model, args, split, collaborative)
        self.reward = make_reward(model, args, split)

    def __call__(
        self, inputs: dict[str, Any], *, epoch: int, progress: float, log_probs: LogProbs
    ) -> tuple[dict[str, Tensor], Logs]:
        """The model's inputs, and what is logged of trajectories and rewards.

        Args:
            inputs: a batch of :class:`~gflowgr.training.batches.PromptCollator`, on the device.
            epoch: number of the epoch.
            progress: share of the training done, in [0, 1].
            log_probs: gives log P(trajectory | prompt) [B, N] for the model's inputs; called only
                if a signal asks for it.
        """
        device = inputs["input_ids"].device
        items = inputs["target"][:, None]
        flow = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        logs: Logs = {}
        chosen, scores = None, None
        if self.sampler is not None:
            scores = self._scores(inputs)
            chosen = self.sampler.sample(_request(inputs, epoch, progress, scores))
            items = torch.from_numpy(chosen.items).to(device)
            logs |= _difficulty_quantiles(chosen.difficulty)
        flow |= self._trajectories(items)
        if self.reward is not None and chosen is not None:
            context = SignalContext(
                flow["tokens"],
                flow["mask"],
                items,
                _behaviours(chosen, inputs["behaviour"]),
                scores,
                lambda: log_probs(flow),
            )
            flow["signals"] = self.reward.measure(context)
            logs |= _signal_means(self.reward.names, flow["signals"], items)
        return flow, logs

    def _scores(self, inputs: dict[str, Any]) -> Tensor | None:
        if self.collaborative is None:
            return None
        with torch.no_grad():
            scores = self.collaborative.score(inputs["histories"], None)
        return scores.to(inputs["input_ids"].device)

    def _trajectories(self, items: Tensor) -> dict[str, Tensor]:
        tokens = self.item_tokens[items.clamp_min(0)]
        mask = (tokens >= 0) & (items >= 0).unsqueeze(-1)
        return {"tokens": tokens.masked_fill(~mask, 0), "mask": mask}


def make_sampler(
    model: GFlowModel,
    args: GFlowGRConfig,
    split: LeaveOneOut,
    collaborative: CollaborativeModel | None,
) -> TrajectorySampler:
    """The sampler that the configuration names.

    Raises:
        ValueError: the curriculum without a collaborative model.
    """
    leaf_of = model.tree.leaf_of(torch.arange(model.tree.num_items, device=model.tree.device))
    pool = CandidatePool(split.known, leaf_of.cpu().numpy(), args.seed)
    if args.sampler == "random":
        return RandomSampler(pool, args.num_trajectories)
    if collaborative is None:
        raise ValueError(
            "sampler='curriculum' needs a collaborative model; pass one, or sampler='random'"
        )
    return CurriculumSampler(pool, args.num_trajectories, args.pool_size)


def make_reward(model: GFlowModel, args: GFlowGRConfig, split: LeaveOneOut) -> BehaviourAwareReward:
    """The reward of the model's signals and fusion, with the configuration's behaviour values.

    Raises:
        ValueError: a signal cannot be made, or a behaviour has no value.
    """
    signals = make_signals(
        model.settings.signals,
        behaviour_values=args.behaviour_values,
        behaviour_names=split.dataset.behaviour_names,
        default_value=args.default_behaviour_value,
    )
    return BehaviourAwareReward(signals, model.fusion)


def _request(
    inputs: dict[str, Any], epoch: int, progress: float, scores: Tensor | None
) -> SampleRequest:
    def array(name: str) -> npt.NDArray[np.int64]:
        values: npt.NDArray[np.int64] = inputs[name].cpu().numpy()
        return values

    return SampleRequest(
        examples=array("example"),
        users=array("user"),
        targets=array("target"),
        epoch=epoch,
        progress=progress,
        scores=scores,
    )


def _behaviours(chosen: TrajectorySet, of_positive: Tensor) -> Tensor:
    """Behaviour codes [B, N]: the positive's, and -2 for augmented items."""
    behaviours = of_positive.new_full(chosen.items.shape, -2)
    behaviours[:, 0] = of_positive
    return behaviours


def _difficulty_quantiles(difficulty: Tensor | None) -> Logs:
    if difficulty is None or bool(difficulty.isnan().all()):
        return {}
    values = difficulty.float()
    return {f"difficulty/q{q}": values.nanquantile(q / 100) for q in (10, 50, 90)}


def _signal_means(names: list[str], signals: Tensor, items: Tensor) -> Logs:
    """Mean of each signal over the positives, and over the augmented items apart."""
    positives = signals[:, 0].mean(0)
    logs = {f"reward/{name}": positives[k] for k, name in enumerate(names)}
    if items.shape[1] > 1:
        count = (items[:, 1:] >= 0).sum().clamp_min(1)
        others = signals[:, 1:].sum((0, 1)) / count
        logs |= {f"reward_augmented/{name}": others[k] for k, name in enumerate(names)}
    return logs
