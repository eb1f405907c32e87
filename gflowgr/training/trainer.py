"""Fine-tuning of a generator as a GFlowNet, on the ``transformers`` Trainer."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINING_ARGS_NAME

from ..collaborative import CollaborativeModel
from ..data import LeaveOneOut
from ..decoding import GenerativeRecommender
from ..evaluation import evaluate
from ..models.gflow_model import GFlowModel
from ..rewards import BehaviourAwareReward
from ..trajectories import (
    CandidatePool,
    CurriculumSampler,
    RandomSampler,
    SampleRequest,
    TrajectorySampler,
)
from .batches import LengthBucketSampler, PromptCollator
from .config import GFlowGRConfig

__all__ = ["GFlowGRTrainer"]

DEFAULT_BEHAVIOUR_VALUES = {"purchase": 10.0, "click": 1.0}
"""The paper's example: liked 10, clicked 1."""


class GFlowGRTrainer(Trainer):
    """Trains a :class:`~gflowgr.models.GFlowModel` by SFT or by joint SFT + trajectory balance.

    Everything of ``transformers.Trainer`` works as usual (resume, early stopping, accumulation, AMP,
    ``accelerate launch``). Beside the loss it logs ``loss_gr``, ``loss_gfn``, ``log_z`` and its group
    estimate ``log_z_group``, the mean of each reward component (``reward/...``; of positives
    and of augmented items apart), quantiles of the sampled items' difficulty, and tokens per second.

    Args:
        model: backbone, tree and settings.
        args: configuration.
        split: the data, split leave-one-out.
        collaborative: scores items for the curriculum and for r_yhat; optional.
        callbacks: further callbacks.

    Raises:
        ValueError: the curriculum is asked for without a collaborative model, or the collaborative
            model or the tree has another number of items than the data.
    """

    model: GFlowModel
    args: GFlowGRConfig

    def __init__(
        self,
        model: GFlowModel,
        args: GFlowGRConfig,
        split: LeaveOneOut,
        *,
        collaborative: CollaborativeModel | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        num_items = split.dataset.num_items
        for name, other in (("tree", model.tree), ("collaborative", collaborative)):
            if other is not None and other.num_items != num_items:
                raise ValueError(
                    f"{name} has {other.num_items} items, but the data has {num_items}"
                )
        self.split = split
        self.collaborative = collaborative
        if isinstance(collaborative, nn.Module):
            collaborative.eval().requires_grad_(False)
        item_tokens = model.item_tokens().cpu()
        self._item_tokens = item_tokens
        self._order = LengthBucketSampler(split.train.lengths, args.train_batch_size, seed=args.seed)
        self._sampler: TrajectorySampler | None = None
        self._reward: BehaviourAwareReward | None = None
        if model.settings.objective != "sft":
            self._sampler = self._make_sampler(model, args)
            self._reward = BehaviourAwareReward(
                args.behaviour_values or DEFAULT_BEHAVIOUR_VALUES, split.dataset.behaviour_names
            )
        self._logged: dict[str, list[Tensor]] = {}
        self._logged_tokens = 0
        self._logged_since = time.perf_counter()
        super().__init__(
            model=model,
            args=args,
            train_dataset=split.train,
            eval_dataset=split.train,  # never read: `evaluate` ranks the split's validation users
            data_collator=PromptCollator(item_tokens, model.settings.max_history),
            callbacks=[_EpochOrder(self._order), *(callbacks or [])],
        )
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    # ---- the objective ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sample trajectories, reward them, and compute the model's objective."""
        flow = self._flow_inputs(inputs)
        plain = self.accelerator.unwrap_model(model)
        if plain.partition is not None and not bool(plain.partition.initialised):
            self._initialise_partition(plain, flow)
        output = model(**flow)
        self._remember({k: v for k, v in output.items() if k != "loss"})
        self._logged_tokens += int(flow["attention_mask"].sum()) + int(flow["mask"].sum())
        return (output["loss"], output) if return_outputs else output["loss"]

    def _flow_inputs(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The model's inputs: prompts, trajectories and their log-rewards."""
        device = inputs["input_ids"].device
        targets: Tensor = inputs["target"]
        items = targets[:, None]
        scores = None
        if self._sampler is not None:
            if self.collaborative is not None:
                with torch.no_grad():
                    scores = self.collaborative.score(inputs["histories"], None)
            request = SampleRequest(
                examples=inputs["example"].cpu().numpy(),
                users=inputs["user"].cpu().numpy(),
                targets=targets.cpu().numpy(),
                epoch=int(self.state.epoch or 0),
                progress=self.state.global_step / max(1, self.state.max_steps),
                scores=scores,
            )
            chosen = self._sampler.sample(request)
            items = torch.from_numpy(chosen.items).to(device)
            self._remember_difficulty(chosen.difficulty)
        tokens = self._item_tokens.to(device)[items.clamp_min(0)]
        mask = (tokens >= 0) & (items >= 0).unsqueeze(-1)
        tokens = tokens.masked_fill(~mask, 0)
        flow = {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "tokens": tokens,
            "mask": mask,
        }
        if self._reward is not None:
            reward = self._reward(tokens, mask, inputs["behaviour"], items, scores)
            flow["log_reward"] = reward.log_reward
            for name, part in reward.parts.items():
                self._remember({f"reward/{name}": part[:, 0].mean()})
                if items.shape[1] > 1:
                    self._remember({f"reward_augmented/{name}": part[:, 1:].mean()})
        return flow

    @torch.no_grad()
    def _initialise_partition(self, model: GFlowModel, flow: dict[str, Tensor]) -> None:
        """Start log Z at the first batch's group estimate, so that the first residuals are small."""
        from ..ops import vargrad_log_z

        assert model.partition is not None
        was_training = model.training
        model.eval()
        _, log_pf = model.log_pf(
            flow["input_ids"], flow["attention_mask"], flow["tokens"], flow["mask"]
        )
        model.train(was_training)
        group = vargrad_log_z(
            log_pf, flow["log_reward"], mask=flow["mask"], beta=model.settings.beta
        )
        model.partition.initialise(self.accelerator.reduce(group.mean(), reduction="mean"))

    def _make_sampler(self, model: GFlowModel, args: GFlowGRConfig) -> TrajectorySampler:
        leaf_of = model.tree.leaf_of(torch.arange(model.tree.num_items, device=model.tree.device))
        pool = CandidatePool(self.split.known, leaf_of.cpu().numpy(), args.seed)
        if args.sampler == "random":
            return RandomSampler(pool, args.num_trajectories)
        if self.collaborative is None:
            raise ValueError(
                "sampler='curriculum' needs a collaborative model; pass one, or sampler='random'"
            )
        return CurriculumSampler(pool, args.num_trajectories, args.pool_size)

    # ---- data order, optimiser ----

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthBucketSampler:
        return self._order

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the partition head in a group of its own (its rate is usually 10-100 times)."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[str, dict[str, Any]] = {
                "decayed": {"params": [], "weight_decay": self.args.weight_decay},
                "others": {"params": [], "weight_decay": 0.0},
                "partition": {
                    "params": [], "weight_decay": 0.0, "lr": self.args.partition_learning_rate
                },
            }
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    if "partition." in name:
                        group = "partition"
                    else:
                        group = "decayed" if name in decayed else "others"
                    groups[group]["params"].append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            present = [group for group in groups.values() if group["params"]]
            self.optimizer = optimizer_class(present, **options)
        return self.optimizer

    # ---- logs ----

    def _remember(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._logged.setdefault(name, []).append(value.detach().float())

    def _remember_difficulty(self, difficulty: Tensor | None) -> None:
        if difficulty is not None and not bool(difficulty.isnan().all()):
            for percent in (10, 50, 90):
                quantile = difficulty.float().nanquantile(percent / 100)
                self._remember({f"difficulty/q{percent}": quantile})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the averages since the last log.

        Raises:
            FloatingPointError: the loss is NaN or infinite.
        """
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}; lower "
                    "learning_rate or gfn_weight, and check the rewards"
                )
            for name, values in self._logged.items():
                logs[name] = float(torch.stack(values).mean())
            self._logged.clear()
            now = time.perf_counter()
            logs["tokens_per_second"] = self._logged_tokens / max(now - self._logged_since, 1e-9)
            self._logged_tokens, self._logged_since = 0, now
        super().log(logs, start_time)

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Rank the whole catalogue for the split's validation users by constrained beam search."""
        began = time.perf_counter()
        model = self.accelerator.unwrap_model(self.model)
        result = evaluate(
            GenerativeRecommender(model, num_beams=self.args.eval_beams),
            self.split,
            "valid",
            max_users=self.args.eval_max_users,
            batch_size=self.args.eval_batch_size,
            seed=self.args.seed,
            progress=False,
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.metrics.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - began
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        # What follows should count training time only.
        self._logged_since += time.perf_counter() - began
        return metrics

    # ---- checkpoints: the model's own format ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self.accelerator.unwrap_model(model or self.model).load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


class _EpochOrder(TrainerCallback):
    """Tells the data order which epoch begins, also when a run resumes inside one."""

    def __init__(self, order: LengthBucketSampler) -> None:
        self.order = order

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.order.set_epoch(int(np.floor(state.epoch or 0)))
