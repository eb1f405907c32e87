"""The main job: collaborative model, SFT, GFlowGR and its fair baseline, evaluation, report.

A run that was killed goes on from its last complete stage, and inside a training from its last
complete checkpoint; see :mod:`.stages`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..collaborative import CollaborativeModel, Popularity, SASRec
from ..data import LeaveOneOut
from ..evaluation import Evaluation, Recommender, ScoringRecommender
from ..evaluation.generative import GenerativeRecommender
from ..models.gflow_model import FlowSettings, GFlowModel
from ..rewards import make_signals
from .claim import claim_configuration, claim_data, digest_of
from .config import ConfigError, RunConfig
from .generator import add_adapters, check_generator, make_generator
from .prepare import (
    Catalogue,
    load_data,
    make_catalogue,
    make_identifiers,
    published_identifiers,
    split_data,
)
from .processes import first_process_first, is_first_process, quiet_transformers, working_alone
from .stages import Screen, TrainedStage, collaborative_stage, evaluation_stage, train_stage

__all__ = [
    "RunResult",
    "TableEntry",
    "check_reward",
    "finetune",
    "reference_recommenders",
    "run",
    "train_supervised",
]


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


def run(
    config: RunConfig, *, say: Callable[[str], None] = print, progress: bool = True
) -> RunResult:
    """Carry a configuration out, or go on with it.

    Args:
        config: what to do.
        say: receives one line per stage.
        progress: show progress bars.

    Raises:
        ConfigError: ``flow.objective`` is "sft", ``config.output_dir`` holds a run of another
            configuration or other data, or the data have a behaviour without a reward.
        DataError: the data are damaged, or do not fit the identifiers.
        OutputError: the folder cannot be written, or another run works in it.
    """
    if config.flow.objective == "sft":
        raise ConfigError("flow.objective is 'sft': there is nothing to fine-tune with")
    quiet_transformers()
    with working_alone(Path(config.output_dir)):
        return _run(config, say, progress)


def _run(config: RunConfig, say: Callable[[str], None], progress: bool) -> RunResult:
    output = Path(config.output_dir)
    screen = Screen(say, progress) if is_first_process() else Screen(_silent, False)
    with first_process_first():
        claim_configuration(output, config)
        screen.say(f"Output: {output}")
        dataset = load_data(config.data, output, config.seed)
        split = split_data(dataset, config.data.max_history, output)
        claim_data(output, {"data": digest_of(split.dataset)})
        check_reward(config, split)
        tokenizer = check_generator(config.model)
    screen.say(
        f"Data: {dataset.name}, {dataset.num_users:,} users, {dataset.num_items:,} items, "
        f"{len(split.train):,} training examples"
    )
    published = published_identifiers(dataset, config.data.identifiers)
    collaborative = collaborative_stage(
        config.collaborative, split, output / "sasrec", config.seed, screen
    )
    vectors = getattr(collaborative, "item_embeddings", None)
    with first_process_first():
        name, identifiers = published or make_identifiers(
            dataset,
            vectors,
            config.seed,
            config.collaborative,
            method=config.data.identifiers,
            folder=output,
            progress=screen.progress,
        )
        claim_data(output, {"identifiers": digest_of(identifiers)})
    catalogue = make_catalogue(name, identifiers, tokenizer)
    tree = catalogue.tree
    screen.say(
        f"Identifiers: {name}, {tree.num_leaves:,} distinct for {tree.num_items:,} items, "
        f"{sum(catalogue.vocabulary.codebook_sizes):,} tokens"
    )
    stages = _training_stages(config, catalogue, split, collaborative, output, screen)

    recommenders: dict[str, Recommender] = {
        label: GenerativeRecommender(stage.model, num_beams=config.evaluation.num_beams, name=label)
        for label, stage in stages.items()
    }
    recommenders |= reference_recommenders(split, collaborative)
    rows = []
    for label, recommender in recommenders.items():
        folder = output / "evaluation" / label.lower().replace(" ", "_")
        with first_process_first():
            evaluation = evaluation_stage(
                config.evaluation, split, recommender, catalogue.leaf_of, folder, screen
            )
        training = stages[label].training if label in stages else {}
        rows.append(TableEntry(label, evaluation, training))
    histories = {label: stage.history for label, stage in stages.items()}
    return RunResult(config, split, name, rows, histories)


def _silent(text: str) -> None:
    """Only the first process speaks."""


def check_reward(config: RunConfig, split: LeaveOneOut) -> None:
    """Find a missing reward now and not after hours of supervised training.

    Raises:
        ConfigError: the data have a behaviour without a value.
    """
    try:
        make_signals(
            config.flow.signals,
            behaviour_values=config.finetune.get("behaviour_values"),
            behaviour_names=split.dataset.behaviour_names,
            side=(config.finetune.get("sampler_options") or {}).get("side", "impression"),
        )
    except ValueError as error:
        raise ConfigError(f"flow.signals, finetune.behaviour_values: {error}") from error


def reference_recommenders(
    split: LeaveOneOut, collaborative: CollaborativeModel | None
) -> dict[str, Recommender]:
    """What the generators are compared with, by name: the collaborative model and popularity."""
    found: dict[str, Recommender] = {}
    if collaborative is not None:
        label = "SASRec" if isinstance(collaborative, SASRec) else "Item embeddings"
        found[label] = ScoringRecommender(label, collaborative)
    found["Popularity"] = ScoringRecommender("Popularity", Popularity(split.item_counts))
    return found


def train_supervised(
    config: RunConfig, catalogue: Catalogue, split: LeaveOneOut, folder: Path, screen: Screen
) -> TrainedStage:
    """The supervised start of all fine-tunings, by ``config.sft``."""
    settings = FlowSettings(
        objective="sft", normalize=config.flow.normalize, max_history=config.flow.max_history
    )

    def make() -> GFlowModel:
        made = make_generator(config.model, catalogue, split.dataset, settings, seed=config.seed)
        return add_adapters(config.model, made)

    return train_stage(folder, "SFT", make, config.sft, split, None, config.seed, screen)


def finetune(
    config: RunConfig,
    start: GFlowModel,
    flow: FlowSettings,
    label: str,
    split: LeaveOneOut,
    collaborative: CollaborativeModel | None,
    folder: Path,
    screen: Screen,
) -> TrainedStage:
    """Fine-tune a copy of ``start`` by ``flow`` and ``config.finetune``.

    With ``flow.objective`` "sft", it is continued SFT.
    """

    def make() -> GFlowModel:
        return add_adapters(config.model, start.with_settings(**asdict(flow)))

    scorer = None if flow.objective == "sft" else collaborative
    return train_stage(folder, label, make, config.finetune, split, scorer, config.seed, screen)


def _training_stages(
    config: RunConfig,
    catalogue: Catalogue,
    split: LeaveOneOut,
    collaborative: CollaborativeModel | None,
    output: Path,
    screen: Screen,
) -> dict[str, TrainedStage]:
    """SFT, then from the same start and with the same budget: continued SFT and ``flow``."""
    stages = {"SFT": train_supervised(config, catalogue, split, output / "sft", screen)}
    start = stages["SFT"].model
    methods = {config.flow.label: (config.flow, "gflowgr")}
    if config.continued_sft:
        methods = {"SFT continued": (start.settings, "sft_continued"), **methods}
    for label, (flow, name) in methods.items():
        stages[label] = finetune(
            config, start, flow, label, split, collaborative, output / name, screen
        )
    return stages
