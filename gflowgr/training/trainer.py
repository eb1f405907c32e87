"""Fine-tuning of a generator as a GFlowNet, on the ``transformers`` Trainer."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..collaborative import CollaborativeModel
from ..cpu_time import cpu_seconds
from ..data import Split
from ..distributed import (
    announce_sharding,
    gathered,
    is_sharded,
    load_whole_state,
    whole_parameters,
)
from ..evaluation import evaluate
from ..evaluation.calibrating import catalogue_calibration
from ..evaluation.generative import GenerativeRecommender
from ..evaluation.recommender import SharedRecommender
from ..models.gflow_model import GFlowModel
from ..models.lora import has_lora
from ..models.objective import flow_start
from ..models.t5_on_cpu import rewired
from ..ops import validation, validation_enabled
from ..samplers import MakeSampler
from ..transfer import to_device
from .averaging import WeightAverage
from .batches import JointExamples, LengthBucketSampler, ProcessBatches
from .callbacks import EpochOrder, LogBeforeSaving
from .config import GFlowGRConfig
from .global_batch import Count, Part, count_of, parts_of
from .inputs import make_inputs
from .rounds import FreezeReference, Rounds
from .saving import SavingTrainer
from .sequences import SequenceInputs
from .step_log import Logs, StepLog, check_finite, of_model
from .trainer_surface import check_processes, refused_method

__all__ = ["GFlowGRTrainer"]

_PROMPTS = ("input_ids", "attention_mask")
_GROUP_OF = {"partition": "flow", "state_flow": "flow", "fusion": "fusion"}  # of parameters
_PART, _FLOW = "gflowgr_part", "gflowgr_flow"  # what get_batch_samples adds to a micro-batch


class GFlowGRTrainer(SavingTrainer):
    """Trains a :class:`~gflowgr.models.GFlowModel` by SFT, jointly with a flow objective, or by a
    baseline's objective against the model as it was when the training began.

    Everything of ``transformers.Trainer`` works as usual (resume, early stopping, accumulation,
    AMP, ``accelerate launch``) or is refused by name, see :mod:`.trainer_surface`; so is
    ``nn.DataParallel``: one process has one device. Beside the loss it logs what the model returns
    (see :meth:`GFlowModel.forward <gflowgr.models.GFlowModel.forward>`), the mean of each reward
    signal (``reward/...``; ``reward_augmented/...``: of augmented items), ``reward_temperature`` of
    exact flows, quantiles of the sampled items' difficulty, ``seconds`` and ``cpu_seconds`` (of all
    threads and processes) of training, without evaluation, since the last entry, and tokens per
    second. On a GPU the data checks run in the first step only; a bad value in a later one ends the
    training at its next log, as a loss that is NaN.

    Args:
        model: backbone, tree and settings.
        args: configuration.
        split: the data, and what of them is held out.
        collaborative: scores items for the curriculum and for r_yhat; optional.
        sampler: makes a sampler of one's own, in place of the one that ``args`` name: a subclass of
            :class:`~gflowgr.samplers.TrajectorySampler`, or a function of the pool and N.
        callbacks: further callbacks.

    Raises:
        ValueError: the curriculum is asked for without a collaborative model, the collaborative
            model or the tree has another number of items than the data, a reward cannot be made, or
            several GPUs are visible to this one process.
    """

    model: GFlowModel
    args: GFlowGRConfig

    def __init__(
        self,
        model: GFlowModel,
        args: GFlowGRConfig,
        split: Split,
        *,
        collaborative: CollaborativeModel | None = None,
        sampler: MakeSampler | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        check_processes(args)
        num_items = split.dataset.num_items
        for name, other in (("tree", model.tree), ("collaborative", collaborative)):
            if other is not None and other.num_items != num_items:
                raise ValueError(
                    f"{name} has {other.num_items} items, but the data has {num_items}"
                )
        self.split = split
        self.collaborative = collaborative
        for part in getattr(collaborative, "models", [collaborative]):
            if isinstance(part, nn.Module):
                part.to(args.device).eval().requires_grad_(False)
        inputs = make_inputs(model, args, split, collaborative, sampler)
        self._flow_inputs, self._examples, collator = inputs
        # One order for all numbers of processes that share a step's prompts.
        prompts = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        seed = args.seed if args.data_seed is None else args.data_seed
        self._order = LengthBucketSampler(self._examples.lengths, prompts, seed=seed)
        self._batches = ProcessBatches(
            self._order,
            args.train_batch_size,
            rank=args.process_index,
            processes=args.world_size,
        )
        self._flow_started = False
        self._has_looked = False
        self._step_log = StepLog()
        super().__init__(
            model=model,
            args=args,
            train_dataset=self._examples,
            eval_dataset=split.train,  # never read: `evaluate` ranks the split's validation users
            data_collator=collator,
            callbacks=[EpochOrder(self._order), LogBeforeSaving(), *(callbacks or [])],
        )
        if model.settings.in_rounds:
            self.add_callback(FreezeReference(Rounds.of(model.settings, args)))
        if args.ema_decay is not None:
            self._average = WeightAverage(model, args.ema_decay)
            self.add_callback(self._average)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        if self.is_fsdp_enabled:
            self._check_fsdp(model)

    def _check_fsdp(self, model: GFlowModel) -> None:
        version = self.accelerator.state.fsdp_plugin.fsdp_version
        if version != 2:
            raise ValueError(f"fsdp_config: version must be 2 (FSDP2); got {version}")
        if has_lora(model.backbone):
            raise ValueError("a model with LoRA is not sharded: use DDP, without fsdp")
        if self.args.ema_decay is not None:
            raise ValueError("ema_decay must be None with fsdp, which shards the weights: use DDP")
        if model.settings.keeps_reference:
            raise ValueError(
                f"objective {model.settings.objective!r} keeps a frozen reference, which is not "
                "sharded: use DDP, without fsdp"
            )

    def train(self, *args: Any, **options: Any) -> TrainOutput:
        """As :meth:`.saving.SavingTrainer.train`, with :mod:`gflowgr.models.t5_on_cpu` while it
        runs, if ``args.t5_on_cpu`` says so."""
        model = self.accelerator.unwrap_model(self.model)
        with rewired(model) if self.args.t5_on_cpu else nullcontext():
            return super().train(*args, **options)

    # ---- the objective ----

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Samplers and collaborative models read the rest on the host; a copy back synchronises.
        prompts = {n: to_device(inputs[n], self.args.device) for n in _PROMPTS}
        return inputs | prompts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sample trajectories, reward them, and compute the model's objective."""
        # On a GPU a check of values synchronises; a later bad value makes the logged loss NaN.
        looks = not self._has_looked or self.args.device.type == "cpu"
        with validation(looks and validation_enabled()):
            if _PART not in inputs:
                inputs = dict(inputs)
                self._divide([inputs])
            output = self._objective(model, inputs)
        self._has_looked = True
        return (output["loss"], output) if return_outputs else output["loss"]

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimiser step, each with its part in the global batch."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._divide(batches)
        return batches, num_items

    def _divide(self, batches: list[dict[str, Any]]) -> None:
        """Find each micro-batch's part in the global batch, and start the flow where it begins.

        Trajectories are sampled here, instead of when their micro-batch's turn comes, only where
        something is asked of those of the whole global batch.
        """
        model = self.accelerator.unwrap_model(self.model)
        processes = self.args.world_size
        divided = len(batches) * processes > 1
        # Read once: reading the flag from the device would synchronise every step.
        starts = not self._flow_started and not model.flow_started
        self._flow_started = True
        counts_terms = divided and model.settings.counts_apart
        counts, joint = [], 0
        epoch = int(self.state.epoch or 0)
        for batch in batches:
            if isinstance(self._flow_inputs, SequenceInputs):
                batch.update(self._flow_inputs.augmented(batch, epoch))
            count, together = count_of(batch, rank=self.args.process_index, processes=processes)
            counts.append(count)
            joint += together
        if self.args.sequences:
            sums = [sum(c.prompts for c in counts), sum(c.terms for c in counts)]
            if processes > 1:
                everyones_sums = torch.tensor(sums, dtype=torch.float64, device=self.args.device)
                sums = self.accelerator.reduce(everyones_sums, reduction="sum").tolist()
            total = Count(*sums)
        else:
            total = Count(joint, joint)
        if starts or counts_terms:
            for batch in batches:
                batch[_FLOW] = self._flow_of(self._prepare_inputs(batch))
        if counts_terms:
            terms = torch.stack([model.term_counts(**batch[_FLOW][0])[1] for batch in batches])
            terms = terms * torch.tensor([c.prompts > 0 for c in counts], device=terms.device)
            everyone = self.accelerator.reduce(terms.sum(), reduction="sum")
            *mine, everyones = torch.cat([terms, everyone.reshape(1)]).tolist()
            counts = [Count(c.prompts, t) for c, t in zip(counts, mine, strict=True)]
            total = Count(total.prompts, everyones)
        if starts:
            own_flows = [b[_FLOW][0] for b, c in zip(batches, counts, strict=True) if c.prompts]
            self._start_flow(model, own_flows)
        is_sum = model.settings.reduced_by == "sum"
        parts = parts_of(counts, total, processes=processes, is_sum=is_sum)
        for batch, part in zip(batches, parts, strict=True):
            batch[_PART] = part

    def _flow_of(self, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], Logs]:
        """The model's inputs, with sampled and rewarded trajectories."""
        plain = self.accelerator.unwrap_model(self.model)
        with self._whole(plain) if self._flow_inputs.reads_model else nullcontext():
            return self._flow_inputs(
                inputs,
                epoch=int(self.state.epoch or 0),
                step=self.state.global_step,
                progress=self.state.global_step / max(1, self.state.max_steps),
                log_probs=plain.log_probs,
            )

    def _objective(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        part: Part = inputs[_PART]
        flow, logs = inputs[_FLOW] if _FLOW in inputs else self._flow_of(inputs)
        output: dict[str, Tensor] = model(**flow, flow_share=part.flow_share)
        output["loss"] = output["loss"] * part.loss_scale
        plain = self.accelerator.unwrap_model(model)
        # Counted on the host, where the batch was made: a count of the mask would synchronise.
        prompts = int(inputs["targets"]) if "targets" in inputs else len(flow["mask"])
        logs = logs | of_model(plain, output, flow, prompts, part.prompts)
        per_prompt = part.prompts / prompts
        tokens = flow["attention_mask"].sum() + flow["mask"].sum()
        if "branch_mask" in flow:
            tokens = tokens + flow["branch_mask"].sum()
        self._step_log.add(logs, per_prompt, tokens)
        return output

    def _whole(self, model: GFlowModel) -> AbstractContextManager[None]:
        if is_sharded(model):
            plugin = self.accelerator.state.fsdp_plugin
            announce_sharding(model, reshards_blocks=bool(plugin.reshard_after_forward))
        return whole_parameters(model)

    def _start_flow(self, model: GFlowModel, flows: list[dict[str, Tensor]]) -> None:
        """Start log Z, or log F, from the prompts of the global batch: all micro-batches' of all
        processes; ``flows`` are this process's."""
        length = self._flow_inputs.item_tokens.shape[1]
        sums = torch.zeros(3, length + 1, dtype=torch.float64, device=self.args.device)
        with self._whole(model):
            for flow in flows:
                sums += model.flow_statistics(**flow)
            model.start_flow(flow_start(self.accelerator.reduce(sums, reduction="sum")))
            head = model.partition or model.state_flow
            prefix = "partition." if model.partition is not None else "state_flow."
            assert head is not None
            state = {prefix + n: p.detach().clone() for n, p in head.named_parameters()}
        if is_sharded(model):
            load_whole_state(model, state)

    # ---- data order, optimiser ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This process's part of the batches; see :class:`.batches.ProcessBatches`."""
        args = self.args
        if self._batches.batch_size != self._train_batch_size:  # by auto_find_batch_size
            self._batches.batch_size = self._train_batch_size
            self._order.batch_size = self._batches.joint_size * args.gradient_accumulation_steps
            self._step_log = StepLog()  # without the steps of the attempt before
        return DataLoader(
            JointExamples(self._examples),
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
            in_order=getattr(args, "dataloader_in_order", True),
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with log Z or log F, and a learned fusion, in groups of their own rates."""
        if self.optimizer is None:
            model = self.model if model is None else model
            args = self.args
            decayed = set(self.get_decay_parameter_names(model))
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args)
            groups = _parameter_groups(model, decayed, args)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the averages since the last log.

        Raises:
            FloatingPointError: the loss or the gradient is NaN or infinite.
        """
        if "loss" in logs:
            check_finite(logs, self.state.global_step, fp16=self.args.fp16)
            logs.update(self._step_log.entry())
        super().log(logs, start_time)

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Rank the whole catalogue for the validation users by constrained beam search.

        Several processes divide the users, and all return the same numbers. With
        ``eval_calibration_users`` also how close the generator's flow is to the reward, see
        :func:`~gflowgr.evaluation.calibrating.catalogue_calibration`.

        Args:
            eval_dataset: another split over the same items; None: the trainer's.
            ignore_keys: unused; it is an argument of the base class.
            metric_key_prefix: put before the names of the metrics.

        Raises:
            ValueError: ``eval_dataset`` is anything else.
        """
        split = self._evaluated(eval_dataset)
        began, cpu_began = time.perf_counter(), cpu_seconds()
        model = self.accelerator.unwrap_model(self.model)
        reward, calibration = self._flow_inputs.reward, {}
        with self._averaged(), self._whole(model):
            result = evaluate(
                SharedRecommender(GenerativeRecommender(model, num_beams=self.args.eval_beams)),
                split,
                "valid",
                max_users=self.args.eval_max_users,
                batch_size=self.args.eval_batch_size * self.args.world_size,
                seed=self.args.seed,
                progress=False,
            )
            if self.args.eval_calibration_users and reward is not None:
                calibration = catalogue_calibration(
                    model,
                    reward,
                    split,
                    self.collaborative,
                    users=self.args.eval_calibration_users,
                    seed=self.args.seed,
                )
        measured = result.metrics | calibration
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - began
        metrics[f"{metric_key_prefix}_cpu_seconds"] = sum(gathered(cpu_seconds() - cpu_began))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        # What follows should count training time only.
        self._step_log.leave_out(time.perf_counter() - began, cpu_seconds() - cpu_began)
        return metrics

    def _evaluated(self, given: Any) -> Split:
        # The base class hands over its own eval_dataset, which stands for the trainer's split.
        if given is None or given is self.eval_dataset:
            return self.split
        if not isinstance(given, Split):
            raise ValueError(
                "eval_dataset must be None or a Split over the trainer's items; got "
                f"{type(given).__name__}"
            )
        if given.dataset.num_items != self.split.dataset.num_items:
            raise ValueError(
                f"eval_dataset must have {self.split.dataset.num_items} items; got "
                f"{given.dataset.num_items}"
            )
        return given

    # ---- methods of the base class that are refused or unused ----

    predict = refused_method("predict")
    prediction_step = refused_method("prediction_step")
    evaluation_loop = refused_method("evaluation_loop")
    get_eval_dataloader = refused_method("get_eval_dataloader")
    get_test_dataloader = refused_method("get_test_dataloader")
    hyperparameter_search = refused_method("hyperparameter_search")
    init_hf_repo = refused_method("init_hf_repo")


def _parameter_groups(
    model: nn.Module, decayed: set[str], args: GFlowGRConfig
) -> list[dict[str, Any]]:
    """The trained parameters: log Z or log F, and a learned fusion, have rates of their own.

    Args:
        model: a :class:`~gflowgr.models.GFlowModel`, also wrapped by DDP.
        decayed: names of parameters that weight decay is for.
        args: rates and decay.
    """
    groups: dict[str, dict[str, Any]] = {
        "decayed": {"params": [], "weight_decay": args.weight_decay},
        "others": {"params": [], "weight_decay": 0.0},
        "flow": {"params": [], "weight_decay": 0.0, "lr": args.partition_learning_rate},
        "fusion": {"params": [], "weight_decay": 0.0, "lr": args.fusion_learning_rate},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.removeprefix("module.").partition(".")[0]
            group = _GROUP_OF.get(part, "decayed" if name in decayed else "others")
            groups[group]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
