"""The main job: collaborative model, SFT, GFlowGR and its fair baseline, evaluation, report.

Every stage writes its result whole and then ``done.json``; a run that was killed goes on from the
last complete stage, and inside a training stage from its last complete checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import files
from ..collaborative import CollaborativeModel, EmbeddingScorer, Popularity, SASRec, SASRecConfig
from ..data import LeaveOneOut
from ..decoding import GenerativeRecommender
from ..evaluation import Evaluation, Recommender, ScoringRecommender, evaluate
from ..models.gflow_model import FlowSettings, GFlowModel
from ..rewards import make_signals
from .claim import claim_configuration, claim_data, digest_of
from .config import CollaborativeConfig, ConfigError, RunConfig, training_arguments
from .generator import add_adapters, check_generator, make_generator
from .prepare import (
    Catalogue,
    load_data,
    make_catalogue,
    make_identifiers,
    published_identifiers,
    split_data,
)
from .processes import device, first_process_first, is_first_process, quiet_transformers

__all__ = ["RunResult", "TableEntry", "run"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class TableEntry:
    """One row of the final table.

    Attributes:
        name: the method.
        evaluation: its metrics on the test users.
        training: optimiser steps, seconds and so on; empty for what is not trained.
    """

    name: str
    evaluation: Evaluation
    training: dict[str, Any]


@dataclass(frozen=True)
class RunResult:
    """What a run leaves for a report.

    Attributes:
        config: the configuration.
        split: data and split.
        identifiers_name: which identifiers.
        rows: one per method.
        histories: training logs by stage, as the Trainer keeps them.
    """

    config: RunConfig
    split: LeaveOneOut
    identifiers_name: str
    rows: list[TableEntry]
    histories: dict[str, list[dict[str, Any]]]


def run(config: RunConfig, *, say: Say = print, progress: bool = True) -> RunResult:
    """Carry a configuration out, or go on with it.

    Args:
        config: what to do.
        say: receives one line per stage.
        progress: show progress bars.

    Raises:
        ConfigError: ``config.output_dir`` holds a run of another configuration or other data, or
            the data have a behaviour without a reward.
        DataError: the data are damaged, or do not fit the identifiers.
    """
    quiet_transformers()
    output = Path(config.output_dir)
    if not is_first_process():
        say, progress = _silent, False
    with first_process_first():
        files.ensure_writable(output)
        claim_configuration(output, config)
        say(f"Output: {output}")
        dataset = load_data(config.data, output, config.seed)
        split = split_data(dataset, config.data.max_history, output)
        claim_data(output, {"data": digest_of(split.dataset)})
        _check_reward(config, split)
        tokenizer = check_generator(config.model)
    say(
        f"Data: {dataset.name}, {dataset.num_users:,} users, {dataset.num_items:,} items, "
        f"{len(split.train):,} training examples"
    )
    published = published_identifiers(dataset, config.data.identifiers)
    collaborative = _collaborative_stage(config, split, output, say, progress)
    vectors = getattr(collaborative, "item_embeddings", None)
    with first_process_first():
        name, identifiers = published or make_identifiers(
            dataset,
            vectors,
            config.seed,
            config.collaborative,
            method=config.data.identifiers,
            folder=output,
            progress=progress,
        )
        claim_data(output, {"identifiers": digest_of(identifiers)})
    catalogue = make_catalogue(name, identifiers, tokenizer)
    tree = catalogue.tree
    say(
        f"Identifiers: {name}, {tree.num_leaves:,} distinct for {tree.num_items:,} items, "
        f"{sum(catalogue.vocabulary.codebook_sizes):,} tokens"
    )
    stages = _training_stages(config, catalogue, split, collaborative, output, say, progress)

    recommenders: dict[str, Recommender] = {
        label: GenerativeRecommender(stage.model, num_beams=config.evaluation.num_beams, name=label)
        for label, stage in stages.items()
    }
    if collaborative is not None:
        label = "SASRec" if isinstance(collaborative, SASRec) else "Item embeddings"
        recommenders[label] = ScoringRecommender(label, collaborative)
    recommenders["Popularity"] = ScoringRecommender("Popularity", Popularity(split.item_counts))
    items = torch.arange(tree.num_items)
    leaf_of = tree.leaf_of(items).numpy()
    rows = []
    for label, recommender in recommenders.items():
        with first_process_first():
            evaluation = _evaluation_stage(
                config, split, recommender, leaf_of, output, say, progress
            )
        training = stages[label].training if label in stages else {}
        rows.append(TableEntry(label, evaluation, training))
    histories = {label: stage.history for label, stage in stages.items()}
    return RunResult(config, split, name, rows, histories)


def _silent(text: str) -> None:
    """Only the first process speaks."""


def _check_reward(config: RunConfig, split: LeaveOneOut) -> None:
    """Find a missing reward now and not after hours of supervised training."""
    try:
        make_signals(
            config.flow.signals,
            behaviour_values=config.finetune.get("behaviour_values"),
            behaviour_names=split.dataset.behaviour_names,
        )
    except ValueError as error:
        raise ConfigError(f"flow.signals, finetune.behaviour_values: {error}") from error


def _collaborative_stage(
    config: RunConfig, split: LeaveOneOut, output: Path, say: Say, progress: bool
) -> CollaborativeModel | None:
    settings: CollaborativeConfig = config.collaborative
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
    from ..training.sasrec import train_sasrec

    say("Stage: SASRec (collaborative model)")
    return train_sasrec(
        split,
        SASRecConfig(num_items=split.num_items, dropout=settings.dropout),
        output / "sasrec",
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.learning_rate,
        patience=settings.patience,
        seed=config.seed,
        progress=progress,
    )


@dataclass(frozen=True)
class _TrainedStage:
    model: GFlowModel
    training: dict[str, Any]
    history: list[dict[str, Any]]


def _training_stages(
    config: RunConfig,
    catalogue: Catalogue,
    split: LeaveOneOut,
    collaborative: CollaborativeModel | None,
    output: Path,
    say: Say,
    progress: bool,
) -> dict[str, _TrainedStage]:
    """SFT, then from the same start and with the same budget: continued SFT and ``flow``."""
    supervised = FlowSettings(
        objective="sft", normalize=config.flow.normalize, max_history=config.flow.max_history
    )

    def fresh() -> GFlowModel:
        return make_generator(config.model, catalogue, split.dataset, supervised, seed=config.seed)

    def train(
        folder: str,
        label: str,
        make: Callable[[], GFlowModel],
        arguments: dict[str, Any],
        scorer: CollaborativeModel | None,
    ) -> _TrainedStage:
        def adapted() -> GFlowModel:
            return add_adapters(config.model, make())

        return _train_stage(
            output / folder, label, adapted, arguments, split, scorer, config.seed, say, progress
        )

    stages = {"SFT": train("sft", "SFT", fresh, config.sft, None)}
    start = stages["SFT"].model
    if config.continued_sft:
        stages["SFT continued"] = train(
            "sft_continued",
            "SFT continued",
            start.with_settings,
            config.finetune,
            None,
        )
    label = config.flow.label
    stages[label] = train(
        "gflowgr",
        label,
        lambda: start.with_settings(**asdict(config.flow)),
        config.finetune,
        collaborative,
    )
    return stages


def _train_stage(
    folder: Path,
    label: str,
    make: Callable[[], GFlowModel],
    arguments: dict[str, Any],
    split: LeaveOneOut,
    collaborative: CollaborativeModel | None,
    seed: int,
    say: Say,
    progress: bool,
) -> _TrainedStage:
    if not _is_done(folder):
        from transformers import PrinterCallback, TrainerCallback

        from ..training import GFlowGRTrainer, last_complete_checkpoint
        from ..training.progress import ProgressBar

        say(f"Stage: {label}")
        checkpoints = folder / "checkpoints"
        args = training_arguments(arguments, str(checkpoints), seed)
        # The partition head's first weights must not depend on what ran before in this process.
        torch.manual_seed(seed)
        callbacks: list[TrainerCallback] = [ProgressBar(label)] if progress else []
        trainer = GFlowGRTrainer(
            make(), args, split, collaborative=collaborative, callbacks=callbacks
        )
        trainer.remove_callback(PrinterCallback)
        with first_process_first():
            resume = last_complete_checkpoint(checkpoints)
        if resume is not None:
            say(f"  resuming from {resume.name}")
        outcome = trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        prompts = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        trainer.save_model(str(folder / "model"))
        with first_process_first():
            if is_first_process():
                files.write_json(folder / "log_history.json", trainer.state.log_history)
                _mark_done(
                    folder,
                    {
                        "steps": outcome.global_step,
                        "seconds": _seconds(trainer.state.log_history),
                        "best_valid_N@10": trainer.state.best_metric,
                        "batch_size": prompts,
                        "learning_rate": args.learning_rate,
                    },
                )
    return _TrainedStage(
        GFlowModel.from_pretrained(folder / "model").to(device()),
        files.read_json(folder / "done.json"),
        files.read_json(folder / "log_history.json"),
    )


def _seconds(log_history: list[dict[str, Any]]) -> float:
    """Training and evaluation, of all the runs that an interrupted stage took."""
    return float(
        sum(entry.get("seconds", 0.0) + entry.get("eval_runtime", 0.0) for entry in log_history)
    )


def _evaluation_stage(
    config: RunConfig,
    split: LeaveOneOut,
    recommender: Recommender,
    leaf_of: np.ndarray,
    output: Path,
    say: Say,
    progress: bool,
) -> Evaluation:
    settings = config.evaluation
    folder = output / "evaluation" / recommender.name.lower().replace(" ", "_")
    if _is_done(folder):
        return _read_evaluation(folder)
    say(f"Stage: evaluation of {recommender.name}")
    evaluation = evaluate(
        recommender,
        split,
        "test",
        collision=settings.collision,
        leaf_of=leaf_of,
        mask_seen=settings.mask_seen,
        max_users=settings.max_users,
        progress=progress,
        truth=split.dataset.truth,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name in _ARRAYS:
        files.save_npy(folder / f"{name}.npy", getattr(evaluation, name))
    facts = {name: getattr(evaluation, name) for name in ("name", "which", "metrics", "rules")}
    _mark_done(folder, facts)
    return evaluation


_ARRAYS = ("users", "ranks", "items")


def _read_evaluation(folder: Path) -> Evaluation:
    arrays = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in _ARRAYS}
    return Evaluation(**files.read_json(folder / "done.json"), **arrays)


def _is_done(folder: Path) -> bool:
    return (folder / "done.json").is_file()


def _mark_done(folder: Path, facts: dict[str, Any]) -> None:
    files.write_json(folder / "done.json", facts)
