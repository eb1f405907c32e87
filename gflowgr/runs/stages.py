"""The stages of a run, each in its folder: a collaborative model, a training, an evaluation.

Every stage writes its result whole and then ``done.json``; one that was killed goes on from its
last complete checkpoint, and one that is done is read. A stage whose
result does not match its manifest is done again, with a message.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import files
from ..collaborative import CollaborativeModel, EmbeddingScorer, SASRecConfig
from ..data import Split
from ..distributed import first_process_finds
from ..errors import DataError
from ..evaluation import Evaluation, Recommender, evaluate
from ..extensions import is_outside, load_outside
from ..folders import MANIFEST_NAME, find_damage, remove_leftovers, write_manifest
from ..models.gflow_model import GFlowModel
from .config import ConfigError, training_arguments
from .processes import device, first_process_first, is_first_process
from .sections import CollaborativeConfig, EvaluationConfig, collaborative_names

__all__ = [
    "MASKED",
    "SUMMED",
    "Console",
    "TrainedStage",
    "collaborative_cpu_seconds",
    "collaborative_stage",
    "evaluation_stage",
    "is_done",
    "mark_done",
    "train_stage",
]

_ARRAYS = ("users", "ranks", "items")
_VALUES = "values"
_FACTS = ("name", "which", "metrics", "rules")
_LOG = "log_history.json"
_DONE = "done.json"
MASKED = "masked"
"""Folder, inside an evaluation's, of the same one with seen items masked."""
SUMMED = "summed"
"""Folder, inside an evaluation's, of the generator together with the collaborative model."""


@dataclass(frozen=True)
class Console:
    """The output of a run: lines and progress bars.

    Attributes:
        say: receives one line per stage.
        progress: show progress bars.
    """

    say: Callable[[str], None] = print
    progress: bool = True


def collaborative_stage(
    settings: CollaborativeConfig,
    split: Split,
    folder: Path,
    seed: int,
    console: Console,
    report_to: str | list[str] | None = "none",
) -> CollaborativeModel | None:
    """The collaborative model of ``settings``, if any; one to be trained is kept in ``folder``.

    Args:
        settings: which, and how it is trained.
        split: the data that it is trained and validated on.
        folder: where a trained one is kept; one that is there already is loaded.
        seed: of its initial weights, the order of batches and the dropout.
        console: where to report.
        report_to: trackers; they write to ``logs`` beside ``folder``.

    Raises:
        ConfigError: a table of item vectors, or a model of one's own, that does not fit the data.
    """
    if settings.kind == "none":
        return None
    if settings.kind == "embeddings":
        assert settings.embeddings is not None
        scorer = EmbeddingScorer.from_file(settings.embeddings)
        if scorer.num_items != split.num_items:
            raise ConfigError(
                f"collaborative.embeddings: {settings.embeddings} has {scorer.num_items} rows, "
                f"the data {split.num_items} items"
            )
        return scorer
    if is_outside(settings.kind):
        console.say(f"Stage: {collaborative_names(settings.kind)[0]} (collaborative model)")
        own = load_outside(settings.kind, "collaborative.kind")(split, folder=folder, seed=seed)
        if not isinstance(own, CollaborativeModel) or own.num_items != split.num_items:
            raise ConfigError(
                f"collaborative.kind: {settings.kind} must make a CollaborativeModel of "
                f"{split.num_items} items; got {type(own).__name__} of "
                f"{getattr(own, 'num_items', 'no')} items"
            )
        return own
    from ..training import train_average, train_cross_fitted, train_sasrec
    from ..training.tracking import check_trackers, tracked

    console.say(f"Stage: {collaborative_names(settings.kind)[0]} (collaborative model)")
    config = SASRecConfig(num_items=split.num_items, dropout=settings.dropout)
    options: dict[str, Any] = {
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "lr": settings.learning_rate,
        "patience": settings.patience,
        "exposure_power": settings.exposure_power,
        "seed": seed,
        "progress": console.progress,
        "report_to": report_to,
    }
    with tracked(check_trackers(report_to), folder.parent / "logs", folder.name):
        if settings.kind == "average":
            return train_average(split, config, folder, models=settings.models or 3, **options)
        if settings.kind == "cross_fitted":
            return train_cross_fitted(split, config, folder, folds=settings.folds or 2, **options)
        return train_sasrec(split, config, folder, **options)


def collaborative_cpu_seconds(folder: Path) -> float | None:
    """CPU seconds of the training steps of all SASRec models under ``folder``; None if unknown."""
    from ..training.sasrec import SETTINGS_NAME

    found = [files.read_json(path, dict) for path in sorted(folder.rglob(SETTINGS_NAME))]
    spent = [facts.get("cpu_seconds") for facts in found]
    if not spent or None in spent:
        return None
    return float(sum(seconds for seconds in spent if seconds is not None))


@dataclass(frozen=True)
class TrainedStage:
    """A trained generator.

    Attributes:
        model: it itself, on this process's device.
        training: ``steps``, ``seconds`` (of training and validation), ``train_seconds``,
            ``cpu_seconds`` (of the training steps), ``validation_cpu_seconds``,
            ``cpu_seconds_before`` (of its start and of the collaborative model that it read),
            ``tokens`` read and predicted, ``batch_size``, ``learning_rate``, ``best_valid_N@10``,
            ``peak_memory_bytes`` and its ``memory_kind``.
        history: the log, as the Trainer keeps it.
    """

    model: GFlowModel
    training: dict[str, Any]
    history: list[dict[str, Any]]


def train_stage(
    folder: Path,
    label: str,
    make: Callable[[], GFlowModel],
    arguments: dict[str, Any],
    split: Split,
    collaborative: CollaborativeModel | None,
    seed: int,
    console: Console,
    cpu_seconds_before: float = 0.0,
) -> TrainedStage:
    """Train a generator in ``folder``, or go on with it, or read it.

    Args:
        folder: its own folder; trackers write to ``logs`` beside it.
        label: the method's name.
        make: the untrained generator.
        arguments: of :class:`~gflowgr.training.GFlowGRConfig`.
        split: the data.
        collaborative: scores items, if the method needs it.
        seed: of data order, dropout and sampling.
        console: where to report.
        cpu_seconds_before: of the trainings that this one needs, for the record.
    """
    if not is_done(folder, console, _LOG, model=True):
        from transformers import PrinterCallback, TrainerCallback

        # Their import takes seconds, transformers being among them.
        from ..training import GFlowGRTrainer, last_complete_checkpoint
        from ..training.progress import ProgressBar
        from ..training.tracking import check_trackers, tracked

        console.say(f"Stage: {label}")
        checkpoints = folder / "checkpoints"
        args = training_arguments(arguments, str(checkpoints), seed)
        # The partition head's first weights must not depend on what ran before in this process.
        torch.manual_seed(seed)
        callbacks: list[TrainerCallback] = [ProgressBar(label)] if console.progress else []
        with tracked(check_trackers(args.report_to), folder.parent / "logs", folder.name):
            trainer = GFlowGRTrainer(
                make(), args, split, collaborative=collaborative, callbacks=callbacks
            )
            trainer.remove_callback(PrinterCallback)
            if is_first_process():
                remove_leftovers(folder, "model")
            resume = first_process_finds(lambda: last_complete_checkpoint(checkpoints, console.say))
            if resume is not None:
                console.say(f"  resuming from {resume.name}")
            outcome = trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        prompts = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        trainer.save_model(str(folder / "model"))
        with first_process_first():
            if is_first_process():
                files.write_json(folder / _LOG, trainer.state.log_history)
                write_manifest(folder, [_LOG])
                mark_done(
                    folder,
                    {
                        "steps": outcome.global_step,
                        **_costs(trainer.state.log_history),
                        "cpu_seconds_before": cpu_seconds_before,
                        "best_valid_N@10": trainer.state.best_metric,
                        "batch_size": prompts,
                        "learning_rate": args.learning_rate,
                    },
                )
    return TrainedStage(
        GFlowModel.from_pretrained(folder / "model").to(device()),
        files.read_json(folder / _DONE),
        files.read_json(folder / _LOG),
    )


def _costs(log_history: list[dict[str, Any]]) -> dict[str, Any]:
    """What a training took, all the runs of an interrupted one together; memory of the last."""
    trained = [entry for entry in log_history if "tokens_per_second" in entry]
    train_seconds = sum(entry["seconds"] for entry in trained)
    validated = sum(entry.get("eval_runtime", 0.0) for entry in log_history)
    memory, kind = _peak_memory()
    return {
        "seconds": float(train_seconds + validated),
        "train_seconds": float(train_seconds),
        "cpu_seconds": float(sum(entry["cpu_seconds"] for entry in trained)),
        "validation_cpu_seconds": float(
            sum(entry.get("eval_cpu_seconds", 0.0) for entry in log_history)
        ),
        "tokens": round(sum(entry["seconds"] * entry["tokens_per_second"] for entry in trained)),
        "peak_memory_bytes": memory,
        "memory_kind": kind,
    }


def _peak_memory() -> tuple[int, str]:
    """Most bytes that tensors took on the accelerator, or this process in main memory."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated(), "accelerator"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "resident"


def evaluation_stage(
    settings: EvaluationConfig,
    split: Split,
    recommender: Recommender,
    leaf_of: np.ndarray | None,
    folder: Path,
    console: Console,
    target_values: np.ndarray | None = None,
) -> Evaluation:
    """Evaluate on the test users, or read the evaluation that is in ``folder``.

    With ``mask_seen: both`` it is the one without masks; the other is in :data:`MASKED` below.

    Args:
        settings: the rules.
        split: the data.
        recommender: what is evaluated.
        leaf_of: the identifier of each item [items]; needed by the rule "string".
        folder: of this evaluation.
        console: where to report.
        target_values: what the test targets are worth, see :func:`gflowgr.evaluation.evaluate`.
    """
    if settings.mask_seen == "both":
        for rule, place in ((True, folder / MASKED), (False, folder)):
            changed = replace(settings, mask_seen=rule)
            given = (changed, split, recommender, leaf_of, place, console, target_values)
            found = evaluation_stage(*given)
        return found
    arrays = _ARRAYS if target_values is None else (*_ARRAYS, _VALUES)
    names = [f"{name}.npy" for name in arrays]
    if is_done(folder, console, *names):
        return _read_evaluation(folder, arrays)
    masked = ", seen items masked" if settings.mask_seen else ""
    console.say(f"Stage: evaluation of {recommender.name}{masked}")
    evaluation = evaluate(
        recommender,
        split,
        "test",
        ks=settings.ks,
        collision=settings.collision,
        leaf_of=leaf_of,
        mask_seen=bool(settings.mask_seen),
        max_users=settings.max_users,
        progress=console.progress,
        truth=split.dataset.truth,
        target_values=target_values,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name in arrays:
        files.save_npy(folder / f"{name}.npy", getattr(evaluation, name))
    write_manifest(folder, names)
    facts = {name: getattr(evaluation, name) for name in _FACTS}
    mark_done(folder, facts)
    return evaluation


def _read_evaluation(folder: Path, names: tuple[str, ...]) -> Evaluation:
    arrays: dict[str, Any] = {name: files.load_npy(folder / f"{name}.npy") for name in names}
    facts = files.read_json(folder / _DONE, expect=dict)
    if not set(_FACTS) <= set(facts):
        raise DataError(f"{folder / _DONE} must have {', '.join(_FACTS)}; got {', '.join(facts)}")
    return Evaluation(**{name: facts[name] for name in _FACTS}, **arrays)


def is_done(folder: Path, console: Console, *names: str, model: bool = False) -> bool:
    """Whether the stage of this folder is complete; one that is damaged is not, which is said.

    Args:
        folder: of the stage.
        console: where to say what is damaged.
        *names: the files of its result.
        model: it also has a saved model, in the folder ``model``.
    """
    if not (folder / _DONE).is_file():
        return False
    damage = _damage(folder, names, model)
    if damage is not None:
        console.say(f"{folder}: {damage}; this stage is done again")
    return damage is None


def _damage(folder: Path, names: tuple[str, ...], model: bool) -> str | None:
    try:
        files.read_json(folder / _DONE, expect=dict)
    except DataError as error:
        return str(error)
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing is not None:
        return f"{missing} is missing"
    # Folders of earlier versions have no manifests.
    places = [folder, folder / "model"] if model else [folder]
    checked = [place for place in places if (place / MANIFEST_NAME).is_file()]
    found = ((place, find_damage(place)) for place in checked)
    return next((f"in {place.name} {text}" for place, text in found if text is not None), None)


def mark_done(folder: Path, facts: dict[str, Any]) -> None:
    """Record that the stage of this folder is complete, and facts about it."""
    files.write_json(folder / _DONE, facts)
