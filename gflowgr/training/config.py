"""Arguments of :class:`~gflowgr.training.GFlowGRTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from ..models.settings import FlowSettings
from ..plain_settings import make_plain, plain
from ..samplers import SamplerSettings
from .tracking import check_trackers
from .trainer_surface import refuse_arguments

__all__ = ["GFlowGRConfig", "multiplies_bf16"]


def multiplies_bf16(on_cpu: bool) -> bool:
    """Whether the CPU, or the accelerator, has instructions for products of bfloat16 numbers."""
    if on_cpu:
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass
class GFlowGRConfig(TrainingArguments):
    """``transformers.TrainingArguments`` and what GFlowGR adds to them.

    The objective itself (its kind and weight, the mode of log Z, the reward's signals and their
    fusion) belongs to the model: :class:`gflowgr.models.FlowSettings`.
    """

    # Defaults of TrainingArguments that are different here.
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Prompts per step."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the rate."})
    report_to: str | list[str] | None = field(
        default="none",
        metadata={"help": "Trackers such as tensorboard, wandb, mlflow; by default none."},
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Products in bfloat16 (autocast); weights and optimiser are float32. None: if "
            "the device has instructions for it (a GPU since Ampere; a CPU with AVX512-BF16 or "
            "AMX) and fp16 is not asked for; false: all in float32."
        },
    )
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Users per call."})
    metric_for_best_model: str | None = field(
        default="N@10", metadata={"help": "Decides which checkpoint is the best."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed run remembers how long early stopping waited."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter has a gradient in every step."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "True would hide a loss that is NaN, and train on."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: examples are read by the collator."}
    )

    sequences: bool = field(
        default=False,
        metadata={
            "help": "Whole sequences: one pass over up to max_history + 1 items of a user, each of "
            "which but the first is a target; batch sizes count sequences. Objective sft and those "
            "with exact flows, decoder-only models."
        },
    )
    positions_per_sequence: int | None = field(
        default=None,
        metadata={
            "help": "With sequences: so many random positions of a window, other ones each epoch, "
            "have num_trajectories - 1 sampled trajectories beside the positive, which branch off "
            "the sequence; max_history: all. None: the positives alone."
        },
    )
    augment_share: float = field(
        default=0.0,
        metadata={
            "help": "With sequences and objective flow_kl: for this share of a batch's windows "
            "also a random part of the window's items, whose prompts have the collaborative reward "
            "and no observed target."
        },
    )
    num_trajectories: int = field(
        default=3, metadata={"help": "N: trajectories per prompt, the observed positive included."}
    )
    sampler: str | dict[str, float] = field(
        default="curriculum",
        metadata={
            "help": "Sampler of the others: curriculum and confidence (these need a collaborative "
            "model), random, popularity, logs, impressions, on_policy; or weights by name, for a "
            "mixture."
        },
    )
    sampler_options: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Further fields of gflowgr.samplers.SamplerSettings."},
    )
    pool_size: int | None = field(
        default=None, metadata={"help": "Candidates of the curriculum (default 2 N - 1)."}
    )
    behaviour_values: dict[str, float] | None = field(
        default=None,
        metadata={
            "help": "r_a of behaviours; of those not in it: purchase 10, cart 3, click and view 1, "
            "stars up to 10."
        },
    )
    default_behaviour_value: float = field(
        default=10.0, metadata={"help": "r_a of an observed item whose behaviour is not recorded."}
    )
    partition_learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of log Z, and of log F."}
    )
    fusion_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of a learned fusion of reward signals."}
    )
    round_steps: int | None = field(
        default=None,
        metadata={
            "help": "Objectives sprec and ipa: optimiser steps of a round (ipa: default all)."
        },
    )
    t5_on_cpu: bool = field(
        default=True,
        metadata={
            "help": "Faster attention (T5, GPT-2), feed-forward (T5) and dropout (any model) while "
            "training, see gflowgr.models.t5_on_cpu; false: those of transformers and PyTorch."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Keep a moving average of the weights, which is evaluated and saved; a step "
            "moves it by 1 - ema_decay. None: none."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a new best."},
    )
    eval_beams: int = field(default=20, metadata={"help": "Beams of the evaluation."})
    eval_max_users: int | None = field(
        default=None, metadata={"help": "Evaluate on this many users (a fixed random subset)."}
    )
    eval_calibration_users: int = field(
        default=0,
        metadata={
            "help": "Evaluations compare P and R over the catalogue for this many users (0: none)."
        },
    )

    def __post_init__(self) -> None:
        for inherited in fields(TrainingArguments):
            setattr(self, inherited.name, plain(getattr(self, inherited.name)))
        make_plain(self, only=_OWN)
        refuse_arguments(self)
        # Said outright, because several processes on a CPU share the work only then.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and multiplies_bf16(self.use_cpu)
        super().__post_init__()
        for name in (
            "num_trajectories",
            "eval_beams",
            "pool_size",
            "eval_max_users",
            "early_stopping_patience",
            "positions_per_sequence",
            "round_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1; got {value}")
        self._check_sampler()
        for name in ("partition_learning_rate", "fusion_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0; got {getattr(self, name)}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in (0, 1); got {self.ema_decay}")
        self._check_schedule()
        self._check_sequences()
        check_trackers(self.report_to)
        if self.eval_calibration_users < 0:
            raise ValueError(
                f"eval_calibration_users must be >= 0; got {self.eval_calibration_users}"
            )
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise ValueError("early_stopping_patience needs eval_strategy 'steps' or 'epoch'")

    @property
    def sampler_settings(self) -> SamplerSettings:
        """The sampler that these arguments describe."""
        options = self.sampler_options or {}
        return SamplerSettings(kind=self.sampler, pool_size=self.pool_size, **options)

    def check_objective(self, settings: FlowSettings) -> None:
        """Check that the trajectories asked for are those that the objective is made for.

        Raises:
            ValueError: they are not.
        """
        objective, count = settings.objective, self.num_trajectories
        if objective in ("dpo", "sprec") and count != 2:
            raise ValueError(
                f"num_trajectories must be 2 for objective {objective!r}, the chosen and one "
                f"rejected; got {count}; for several rejected ones: 'sdpo'"
            )
        least = {"distill": 2, "sdpo": 2, "grpo": 2, "ipa": 3}.get(objective, 1)
        if count < least:
            raise ValueError(
                f"num_trajectories must be >= {least} for objective {objective!r}; got {count}"
            )
        if settings.reference and self.eval_calibration_users > 0:
            raise ValueError(
                "eval_calibration_users must be 0 with reference, whose target is no reward of the "
                f"catalogue alone; got {self.eval_calibration_users}"
            )
        if self.round_steps is not None and not settings.in_rounds:
            raise ValueError(
                f"round_steps is of the objectives 'sprec' and 'ipa'; got {self.round_steps} with "
                f"objective {objective!r}"
            )
        if objective == "sprec" and (self.round_steps is None or self.round_steps % 2):
            raise ValueError(
                "round_steps must be even for objective 'sprec', half of it SFT and half DPO; got "
                f"{self.round_steps}"
            )
        sampler = self.sampler_settings
        present = [*sampler.weights] == ["on_policy"] and sampler.replay_share == 0
        if objective in ("grpo", "sprec") and not (present and sampler.refresh_steps == 1):
            raise ValueError(
                f"objective {objective!r} needs trajectories of the present model in each step: "
                "sampler 'on_policy' with sampler_options {'refresh_steps': 1} and nothing "
                f"replayed; got {self.sampler!r} with {self.sampler_options}"
            )
        if objective == "ipa" and not present:
            raise ValueError(
                "objective 'ipa' needs trajectories of the present model: sampler 'on_policy' and "
                f"nothing replayed; got {self.sampler!r} with {self.sampler_options}"
            )

    def _check_sequences(self) -> None:
        if not 0 <= self.augment_share <= 1:
            raise ValueError(f"augment_share must be in [0, 1]; got {self.augment_share}")
        for name in ("positions_per_sequence", "augment_share"):
            if getattr(self, name) and not self.sequences:
                raise ValueError(
                    f"{name} is of training on whole sequences; got {getattr(self, name)} with "
                    "sequences false"
                )
        if self.positions_per_sequence is not None and self.num_trajectories < 2:
            raise ValueError(
                "num_trajectories must be >= 2 for positions_per_sequence, at which the others "
                f"branch; got {self.num_trajectories}"
            )

    def _check_schedule(self) -> None:
        options: Any = self.lr_scheduler_kwargs or {}
        decays = self.lr_scheduler_type == "warmup_stable_decay"
        if decays and int(options.get("num_decay_steps", 0)) < 1:
            raise ValueError(
                "lr_scheduler_kwargs must have num_decay_steps > 0 for lr_scheduler_type "
                f"'warmup_stable_decay'; got {options}"
            )

    def _check_sampler(self) -> None:
        known = [f.name for f in fields(SamplerSettings) if f.name not in ("kind", "pool_size")]
        for name in self.sampler_options or {}:
            if name not in known:
                raise ValueError(f"sampler_options has no {name!r}; it has {', '.join(known)}")
        self.sampler_settings  # noqa: B018 (it checks the values)


_OWN = frozenset(GFlowGRConfig.__annotations__) - {f.name for f in fields(TrainingArguments)}
