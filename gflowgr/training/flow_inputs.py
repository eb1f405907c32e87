"""The model's inputs of a batch of prompts: sampled trajectories and their rewards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import files
from ..collaborative import CollaborativeModel, score_training_prompts
from ..data import Split
from ..errors import DataError
from ..models.gflow_model import GFlowModel
from ..rewards import BehaviourAwareReward, SignalContext, make_signals
from ..samplers import (
    AUGMENTED,
    CandidatePool,
    Exclude,
    MakeSampler,
    SampleRequest,
    TrajectorySampler,
    TrajectorySet,
    make_sampler,
)
from ..transfer import to_device
from .catalogue import PromptRewards
from .config import GFlowGRConfig
from .rounds import Rounds
from .step_log import Logs, Mean, histogram
from .target_weights import TargetWeights

__all__ = ["FlowInputs", "difficulty_of", "make_reward", "sample_request"]

_STATE = "sampler.npz"
_ASKS_BACKBONE = {"on_policy", "confidence"}
_OF_ITEMS = {"r_a", "r_yhat", "r_sim"}  # signals that never ask for log_probs

LogProbs = Callable[[dict[str, Tensor]], Tensor]


class FlowInputs:
    """Makes the inputs of :meth:`gflowgr.models.GFlowModel.forward`.

    Args:
        model: for its tree and settings.
        args: configuration.
        split: the data.
        collaborative: scores items for the sampler and for r_yhat; optional.
        sampler: makes the sampler, in place of the one that ``args`` name.

    Raises:
        ValueError: the sampler or the reward cannot be made of these.
    """

    def __init__(
        self,
        model: GFlowModel,
        args: GFlowGRConfig,
        split: Split,
        collaborative: CollaborativeModel | None,
        sampler: MakeSampler | None = None,
    ) -> None:
        self.item_tokens = model.item_tokens().to(args.device)
        self.collaborative = collaborative
        self.num_trajectories = args.num_trajectories
        self.sampler: TrajectorySampler | None = None
        self.reward: BehaviourAwareReward | None = None
        self.rewards: PromptRewards | None = None  # of every item, for exact flows
        self.weights = TargetWeights.of(model.settings, args, split)
        self.reads_model = False  # whether a call uses the model's parameters
        if model.settings.objective == "sft":
            return
        args.check_objective(model.settings)
        self.rounds = Rounds.of(model.settings, args)
        if model.settings.is_vargrad and args.num_trajectories < 2:
            raise ValueError(
                "num_trajectories must be >= 2 for partition 'vargrad', whose loss over a "
                f"single trajectory is 0; got {args.num_trajectories}"
            )
        self.balances = model.settings.balances
        self.weighs_proposals = model.settings.importance_clip is not None
        leaf_of = model.tree.leaf_of(torch.arange(model.tree.num_items, device=model.tree.device))
        # A reward of history and item alone may be shown the items of a user's future.
        usual: Exclude = "past" if model.settings.has_exact_flows else "known"
        exclude = args.sampler_settings.exclude or usual
        self.sampler = make_sampler(
            args.sampler_settings,
            CandidatePool.from_split(split, leaf_of.cpu().numpy(), args.seed, exclude),
            args.num_trajectories,
            split=split,
            model=model,
            has_scores=collaborative is not None,
            own=sampler,
        )
        if model.settings.has_exact_flows:
            self.rewards = PromptRewards(model.settings, args, split, collaborative)
            self.reads_model = not _ASKS_BACKBONE.isdisjoint(args.sampler_settings.weights)
            return
        self.reward = make_reward(model, args, split)
        self.reads_model = (
            not _ASKS_BACKBONE.isdisjoint(args.sampler_settings.weights)
            or not _OF_ITEMS.issuperset(model.settings.signals)
            or self.reward.fusion.learned
        )

    def __call__(
        self,
        inputs: dict[str, Any],
        *,
        epoch: int,
        step: int = 0,
        progress: float,
        log_probs: LogProbs,
    ) -> tuple[dict[str, Tensor], Logs]:
        """The model's inputs, and what is logged of trajectories and rewards: the histogram
        ``difficulty`` of sampled items, and means of signals.

        Args:
            inputs: a batch of :class:`~gflowgr.training.batches.PromptCollator`, its prompts on the
                device and the rest on the host, where it is read.
            epoch: number of the epoch.
            step: optimiser steps done; it may be one for the positives alone, see
                :mod:`~gflowgr.training.rounds`.
            progress: share of the training done, in [0, 1].
            log_probs: gives log P(trajectory | prompt) [B, N] for the model's inputs; called only
                if a signal asks for it.
        """
        flow = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        if self.sampler is None or self.rounds.is_supervised(step):
            targets = to_device(inputs["target"], flow["input_ids"].device)
            flow |= self._trajectories(targets[:, None])
            if self.weights is not None:
                flow |= self.weights(inputs["behaviour"], targets.device)
            return flow, {}
        request = sample_request(inputs, epoch, step, progress, self.scores(inputs))
        chosen = self.sample(request)
        if self.rewards is not None:
            assert request.scores is not None
            log_reward = self.rewards.of_prompts(
                request.scores, inputs["histories"], inputs["target"], inputs["behaviour"]
            )
            logs = difficulty_of(chosen) | self.rewards.logs(len(log_reward))
            return flow | self.of_catalogue(request, chosen, log_reward), logs
        return self.rewarded(flow, request, chosen, log_probs)

    def sample(self, request: SampleRequest) -> TrajectorySet:
        """The sampler's answer."""
        assert self.sampler is not None
        return self.sampler.sample(request)

    def of_catalogue(
        self, request: SampleRequest, chosen: TrajectorySet, log_reward: Tensor
    ) -> dict[str, Tensor]:
        """Trajectories beside the rewards of every item, [B, items].

        What is balanced along a trajectory needs its reward: items without one are no trajectories
        (the positive stays, for its supervised term).
        """
        device = log_reward.device
        items = to_device(chosen.items, device)
        if self.balances:
            found = log_reward.gather(1, items.clamp_min(0))
            assert self.sampler is not None
            self.sampler.observe(request, chosen, found)
            unrewarded = found == -torch.inf
            unrewarded[:, 0] = False
            items = items.masked_fill(unrewarded, -1)
        flow = self._trajectories(items) | {"catalogue_log_reward": log_reward}
        if self.weighs_proposals and self.balances:
            flow["log_proposal"] = self._proposed(chosen, device)
        return flow

    def _proposed(self, chosen: TrajectorySet, device: torch.device) -> Tensor:
        proposed = chosen.log_proposal
        if proposed is None:
            proposed = torch.full(chosen.items.shape, torch.nan)
        return to_device(proposed, device)

    def rewarded(
        self,
        prompts: dict[str, Tensor],
        request: SampleRequest,
        chosen: TrajectorySet,
        log_probs: LogProbs,
    ) -> tuple[dict[str, Tensor], Logs]:
        """The result of a call, from the sampler's answer to a request.

        Args:
            prompts: ``input_ids`` and ``attention_mask`` [B, S].
            request: what was asked for.
            chosen: the trajectories.
            log_probs: as of a call.
        """
        assert self.sampler is not None
        assert self.reward is not None
        device = prompts["input_ids"].device
        items = to_device(chosen.items, device)
        logs = difficulty_of(chosen)
        flow = prompts | self._trajectories(items)
        context = SignalContext(
            flow["tokens"],
            flow["mask"],
            items,
            to_device(chosen.behaviours, device),
            request.scores,
            lambda: log_probs(flow),
        )
        flow["signals"] = self.reward.measure(context)
        logs |= _signal_means(self.reward.names, flow["signals"], chosen)
        if self.weighs_proposals:
            flow["log_proposal"] = self._proposed(chosen, device)
        with torch.no_grad():
            self.sampler.observe(request, chosen, self.reward.fusion(flow["signals"]))
        return flow, logs

    def save_state(self, folder: Path) -> None:
        """Save what the sampler needs to go on, if anything (``sampler.npz``)."""
        state = {} if self.sampler is None else self.sampler.state_dict()
        if state:
            with files.atomic_path(folder / _STATE) as path:
                np.savez(path, **state)  # type: ignore[arg-type]

    def load_state(self, folder: Path) -> None:
        """Take back what :meth:`save_state` saved.

        Raises:
            DataError: there is none, though the sampler needs one, or it is another sampler's.
        """
        if self.sampler is None or not self.sampler.state_dict():
            return
        try:
            with np.load(folder / _STATE, allow_pickle=False) as state:
                self.sampler.load_state_dict(dict(state))
        except (OSError, KeyError, ValueError) as error:
            raise DataError(f"{folder / _STATE}: not a state of this sampler: {error}") from error

    def scores(self, inputs: dict[str, Any]) -> Tensor | None:
        """Collaborative scores of the whole catalogue for a batch [B, items], if there are any."""
        if self.collaborative is None:
            return None
        with torch.no_grad():
            scores = score_training_prompts(self.collaborative, inputs["user"], inputs["histories"])
        return to_device(scores, inputs["input_ids"].device)

    def _trajectories(self, items: Tensor) -> dict[str, Tensor]:
        tokens = self.item_tokens[items.clamp_min(0)]
        mask = (tokens >= 0) & (items >= 0).unsqueeze(-1)
        return {"tokens": tokens.masked_fill(~mask, 0), "mask": mask}


def make_reward(model: GFlowModel, args: GFlowGRConfig, split: Split) -> BehaviourAwareReward:
    """The reward of the model's signals and fusion, with the configuration's behaviour values.

    Raises:
        ValueError: a signal cannot be made, or a behaviour has no value.
    """
    signals = make_signals(
        model.settings.signals,
        behaviour_values=args.behaviour_values,
        behaviour_names=split.dataset.behaviour_names,
        default_value=args.default_behaviour_value,
        side=args.sampler_settings.side,
    )
    return BehaviourAwareReward(signals, model.fusion)


def sample_request(
    inputs: dict[str, Any], epoch: int, step: int, progress: float, scores: Tensor | None
) -> SampleRequest:
    """The request to a sampler for a batch; arguments as of :class:`FlowInputs`' call."""

    def array(name: str) -> npt.NDArray[np.int64]:
        values: npt.NDArray[np.int64] = inputs[name].numpy()
        return values

    return SampleRequest(
        examples=array("example"),
        users=array("user"),
        targets=array("target"),
        epoch=epoch,
        progress=progress,
        scores=scores,
        behaviours=array("behaviour"),
        step=step,
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
    )


def difficulty_of(chosen: TrajectorySet) -> Logs:
    """The histogram ``difficulty`` of sampled items, where there are scores."""
    # Asked of the items, which the host has: the difficulty may be on the device.
    if chosen.difficulty is None or not (chosen.items[:, 1:] >= 0).any():
        return {}
    return {"difficulty": histogram(chosen.difficulty)}


def _signal_means(names: list[str], signals: Tensor, chosen: TrajectorySet) -> Logs:
    """Mean of each signal over the positives, and over augmented and logged items apart."""
    logs: Logs = {}
    others, codes = chosen.items[:, 1:] >= 0, chosen.behaviours[:, 1:]
    kinds = {
        "reward": np.ones_like(chosen.items[:, :1], dtype=bool),
        "reward_augmented": others & (codes == AUGMENTED),
        "reward_logged": others & (codes != AUGMENTED),
    }
    for kind, which in kinds.items():
        if which.any():
            part = signals[:, :1] if kind == "reward" else signals[:, 1:]
            weight = to_device((which / which.sum()).astype(np.float32), signals.device)
            means = torch.einsum("bn,bnk->k", weight, part)
            count = float(which.sum())
            logs |= {f"{kind}/{name}": Mean(means[k], count) for k, name in enumerate(names)}
    return logs
