"""Training of SASRec on the ``transformers`` Trainer: it resumes, stops early, keeps the best."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from gflowgr import files
from gflowgr.collaborative import SASRec, SASRecConfig
from gflowgr.collaborative.base import CONFIG_NAME, WEIGHTS_NAME
from gflowgr.cpu_time import cpu_seconds
from gflowgr.data import Ragged, Split, pad_histories
from gflowgr.distributed import first_process_finds, gathered
from gflowgr.evaluation.metrics import ndcg, ranks_of_targets, recall
from gflowgr.folders import MANIFEST_NAME, find_damage, output_lock, write_manifest
from gflowgr.training.checkpoints import CheckpointTrainer, last_complete_checkpoint
from gflowgr.training.packing import EpochBatches, PackedLoader, PackedSequences
from gflowgr.training.progress import ProgressBar
from gflowgr.training.tracking import check_trackers

SETTINGS_NAME = "sasrec_training.json"
# A separate folder: output_dir may also hold checkpoints of other stages.
CHECKPOINTS_NAME = "sasrec_checkpoints"
_EVAL_ROWS = 512


def train_sasrec(
    split: Split,
    config: SASRecConfig | None = None,
    output_dir: str | Path = "sasrec",
    *,
    epochs: int = 40,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    patience: int = 3,
    exposure_power: float = 0.0,
    seed: int = 42,
    eval_users: int | None = None,
    users: np.ndarray | None = None,
    resume: bool = True,
    progress: bool = True,
    report_to: str | list[str] | None = "none",
) -> SASRec:
    """Train SASRec on the training part of ``split``; return the best model, on the CPU.

    Every position of every training sequence is predicted in one pass. After each epoch the
    validation users are ranked over the full catalogue, and a checkpoint is written; the model
    with the best validation N@10 is kept. Killed at any moment, the same call goes on from the last
    checkpoint and ends with the same model as an uninterrupted run; called again after the end,
    it loads the finished model.

    Args:
        split: the data.
        config: the model; by default the settings of :class:`SASRecConfig`.
        output_dir: gets model.safetensors, config.json, sasrec_training.json (settings, metrics,
            ``cpu_seconds`` of the steps, log history) and, while training, ``sasrec_checkpoints/``.
        epochs: most passes over the training part.
        batch_size: sequences (windows) per optimiser step and process.
        lr: AdamW learning rate, constant after a warm-up of 100 steps.
        weight_decay: AdamW weight decay (not on biases and norms).
        patience: stop after this many epochs without a better validation N@10.
        exposure_power: a target's weight in the loss is ``n^-exposure_power`` over its mean, n the
            number of times that its item was engaged with in the training part or shown (side
            behaviours): inverse-propensity weights (Schnabel et al. 2016) with exposure as the
            propensity. In [0, 1]; 0: no weights.
        seed: of the initial weights, the order of batches and the dropout.
        eval_users: evaluate on this many random validation users (None: all of them).
        users: train on the sequences of these users [n] alone, all of them being evaluated as
            before; None: all.
        resume: go on from what ``output_dir`` holds; False removes that run first.
        progress: show a progress bar.
        report_to: trackers, as in :class:`~gflowgr.training.GFlowGRConfig`.

    Raises:
        ValueError: an argument out of range, a tracker that is not installed, a config for another
            catalogue, or a run with other settings in ``output_dir`` while ``resume`` is true.
        OutputError: ``output_dir`` cannot be written, or another process trains there.
    """
    folder = Path(output_dir)
    config = SASRecConfig(num_items=split.num_items) if config is None else config
    if config.num_items != split.num_items:
        raise ValueError(
            f"config.num_items is {config.num_items}, but the data has {split.num_items} items"
        )
    counts = {
        "epochs": epochs,
        "batch_size": batch_size,
        "patience": patience,
        "eval_users": eval_users,
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be a positive number; got {lr}")
    if not 0 <= exposure_power <= 1:
        raise ValueError(f"exposure_power must be in [0, 1]; got {exposure_power}")
    settings: dict[str, Any] = {
        "data": [split.dataset.name, split.num_users, split.train.lengths.sum().item()],
        "model": asdict(config),
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "patience": patience,
        "seed": seed,
        "eval_users": eval_users,
    }
    if exposure_power:
        settings["exposure_power"] = exposure_power
    sequences = split.train_sequences
    if users is not None:
        sequences = _of_users(sequences, users)
        settings["users"] = [len(users), zlib.crc32(np.asarray(users, np.int64).tobytes())]
    arguments = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS_NAME),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        weight_decay=weight_decay,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=100,
        max_grad_norm=1.0,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_N@10",
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        logging_steps=20,
        report_to=check_trackers(report_to),
        disable_tqdm=True,
        seed=seed,
        ddp_find_unused_parameters=False,
        # Said outright, because several processes on a CPU share the work only then.
        use_cpu=not torch.accelerator.is_available(),
        log_level="error",
    )
    first = arguments.process_index == 0
    with arguments.main_process_first(local=False):
        finished = resume and _is_finished(folder, settings)
    if finished:
        return SASRec.load(folder)
    with output_lock(folder) if first else contextlib.nullcontext():
        # The first process prepares the folder while the others wait.
        with arguments.main_process_first(local=False):
            if first:
                if not resume:
                    _remove_run(folder)
                files.write_json(folder / SETTINGS_NAME, {"settings": settings, "finished": False})
        return _train(arguments, split, sequences, config, settings, folder, progress)


def _train(
    arguments: TrainingArguments,
    split: Split,
    sequences: Ragged,
    config: SASRecConfig,
    settings: dict[str, Any],
    folder: Path,
    progress: bool,
) -> SASRec:
    """Train, or go on, and leave the best model in ``folder``."""
    epochs, patience = settings["epochs"], settings["patience"]
    checkpoint = first_process_finds(lambda: last_complete_checkpoint(folder / CHECKPOINTS_NAME))
    torch.manual_seed(settings["seed"])
    model = SASRec(config)
    counts = 1 + np.bincount(sequences.values, minlength=split.num_items)
    shares = counts / counts.sum()
    model.empty_scores.copy_(torch.from_numpy(np.log(shares)))
    weights = _exposure_weights(split, sequences, settings.get("exposure_power", 0.0))
    trainer = SASRecTrainer(
        model, arguments, split, sequences, weights=weights, eval_users=settings["eval_users"]
    )
    trainer.add_callback(_LogEachEpoch())
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=patience))
    if progress:
        trainer.add_callback(ProgressBar("SASRec"))
    if checkpoint is not None and _has_ended(checkpoint, epochs, patience):
        trainer.adopt_best(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    best = model.cpu().eval()
    trainer.accelerator.wait_for_everyone()  # the others may still read the best checkpoint
    if trainer.is_world_process_zero():
        best.save(folder)
        write_manifest(folder, [WEIGHTS_NAME, CONFIG_NAME])
        files.write_json(
            folder / SETTINGS_NAME,
            {
                "settings": settings,
                "finished": True,
                "best_valid_N@10": trainer.state.best_metric,
                "best_step": trainer.state.best_global_step,
                "cpu_seconds": sum(e.get("cpu_seconds", 0.0) for e in trainer.state.log_history),
                "log_history": trainer.state.log_history,
            },
        )
        shutil.rmtree(folder / CHECKPOINTS_NAME)
    trainer.accelerator.wait_for_everyone()  # until the files are written
    return best


class SASRecTrainer(CheckpointTrainer):
    """Feeds packed sequences and evaluates by ranking the full catalogue."""

    model: SASRec

    def __init__(
        self,
        model: SASRec,
        args: TrainingArguments,
        split: Split,
        train_sequences: Ragged,
        *,
        weights: torch.Tensor | None = None,
        eval_users: int | None = None,
    ) -> None:
        sequences = PackedSequences(train_sequences, model.settings.max_length)
        # evaluate() ranks the split's users; the base class only wants to see a data set there.
        super().__init__(model=model, args=args, train_dataset=sequences, eval_dataset=sequences)
        self.remove_callback(PrinterCallback)
        self._sequences = sequences
        self._weights = weights  # of items as targets
        histories, targets = split.histories("valid"), split.targets("valid")
        chosen = np.arange(len(targets))
        if eval_users is not None and eval_users < len(targets):
            chosen = np.random.default_rng(args.seed).choice(chosen, eval_users, replace=False)
        # Similar lengths side by side: short histories are not padded to the longest of all.
        lengths = np.array([len(histories[user]) for user in chosen])
        chosen = chosen[np.argsort(lengths, kind="stable")]
        self._targets = targets[chosen]
        self._histories = [histories[user] for user in chosen]
        self._cpu_since = cpu_seconds()

    def get_train_dataloader(self) -> PackedLoader:
        """Whole packed batches, a share of them for each process."""
        batches = EpochBatches(
            len(self._sequences),
            self._train_batch_size,
            self.args.seed,
            self.args.process_index,
            self.args.world_size,
        )
        return PackedLoader(self._sequences, batches, self.args.device.type == "cuda")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's own loss."""
        if self._weights is not None:
            targets = inputs["targets"]
            weights = self._weights.to(targets.device)[targets.clamp_min(0)]
            inputs = {**inputs, "weights": weights}
        output: Mapping[str, torch.Tensor] = model(**inputs)
        return (output["loss"], output) if return_outputs else output["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add ``cpu_seconds`` of training since the last entry, over all processes."""
        if "loss" in logs:
            now = cpu_seconds()
            logs["cpu_seconds"] = sum(gathered(now - self._cpu_since))
            self._cpu_since = now
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Rank the full catalogue for the validation users."""
        began, cpu_began = time.perf_counter(), cpu_seconds()
        model = self.accelerator.unwrap_model(self.model)
        ranks = []
        for start in range(0, len(self._targets), _EVAL_ROWS):
            scores = model.score(pad_histories(self._histories[start : start + _EVAL_ROWS]))
            targets = torch.from_numpy(self._targets[start : start + _EVAL_ROWS])
            ranks.append(ranks_of_targets(scores, targets.to(scores.device)).cpu().numpy())
        found = np.concatenate(ranks)
        metrics = {
            f"{metric_key_prefix}_R@10": recall(found, 10),
            f"{metric_key_prefix}_N@10": ndcg(found, 10),
            f"{metric_key_prefix}_runtime": time.perf_counter() - began,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self._cpu_since += cpu_seconds() - cpu_began  # it was not training
        return metrics

    def adopt_best(self, checkpoint: Path) -> None:
        """Take the best weights of a run whose training had ended when it was killed."""
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        folder = checkpoint.parent / f"checkpoint-{self.state.best_global_step}"
        self._load_from_checkpoint(str(folder))


def _exposure_weights(split: Split, sequences: Ragged, power: float) -> torch.Tensor | None:
    """Weights of items as targets, float32 [items], 1 in the mean over the training events."""
    if power == 0:
        return None
    own = np.bincount(sequences.values, minlength=split.num_items)
    shown = sum(
        np.bincount(rows.values, minlength=split.num_items) for rows in split.dataset.side.values()
    )
    weights = np.maximum(own + shown, 1.0) ** -power
    return torch.from_numpy(weights * own.sum() / max((weights * own).sum(), 1e-300)).float()


def _of_users(sequences: Ragged, users: np.ndarray) -> Ragged:
    """The sequences of some users, in their order."""
    users = np.asarray(users)
    if users.ndim != 1 or users.dtype.kind not in "iu" or len(np.unique(users)) < len(users):
        raise ValueError(f"users must be different user numbers [n]; got {users!r}")
    if len(users) == 0 or users.min() < 0 or users.max() >= len(sequences):
        raise ValueError(f"users must be at least one of 0..{len(sequences) - 1}; got {users!r}")
    return sequences.slices(sequences.offsets[users], sequences.offsets[users + 1])


class _LogEachEpoch(TrainerCallback):
    """Logs before each checkpoint: the loss summed since the last log is not part of one."""

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_log = True


def _has_ended(checkpoint: Path, epochs: int, patience: int) -> bool:
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    values = [entry["eval_N@10"] for entry in state.log_history if "eval_N@10" in entry]
    since_best = len(values) - 1 - int(np.argmax(values)) if values else 0
    return len(values) >= epochs or since_best >= patience


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    path = folder / SETTINGS_NAME
    if not path.is_file():
        return False
    found = files.read_json(path, expect=dict)
    if found.get("settings") != settings:
        old = found.get("settings", {})
        changed = [key for key in settings if old.get(key) != settings[key]]
        raise ValueError(
            f"{folder} holds a SASRec run with other settings: "
            + ", ".join(f"{key} = {old.get(key)!r}, now {settings[key]!r}" for key in changed)
            + "; choose another output_dir, or resume=False to replace it"
        )
    if not found.get("finished"):
        return False
    if not (folder / MANIFEST_NAME).is_file():  # earlier versions wrote none
        return (folder / WEIGHTS_NAME).is_file()
    damage = find_damage(folder)
    if damage is not None:
        warnings.warn(f"{folder}: {damage}; SASRec is trained anew", stacklevel=3)
    return damage is None


def _remove_run(folder: Path) -> None:
    if (folder / CHECKPOINTS_NAME).is_dir():
        shutil.rmtree(folder / CHECKPOINTS_NAME)
    for name in (SETTINGS_NAME, MANIFEST_NAME, WEIGHTS_NAME, CONFIG_NAME):
        (folder / name).unlink(missing_ok=True)
