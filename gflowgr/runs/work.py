"""The work of one cell: prepare what it reads, train, evaluate.

The stages are the same for ``gflowgr train``, where all cells are worked on in one process (or in
those of one ``torchrun``), and for ``gflowgr experiment``, where each has a process of its own.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .. import files
from ..collaborative import CollaborativeModel, Popularity
from ..data import Split
from ..evaluation import Evaluation, Recommender, ScoringRecommender, SummedRecommender
from ..evaluation.generative import GenerativeRecommender
from ..extensions import is_outside, load_outside
from ..models.gflow_model import FlowSettings, GFlowModel
from ..rewards import (
    CatalogueReward,
    InteractionLevel,
    default_behaviour_values,
    make_signals,
)
from .cells import Cell
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
from .processes import alone, first_process_first, is_first_process
from .same_inputs import check_same_data, digest_of, record_inputs
from .sections import EvaluationConfig
from .stages import (
    SUMMED,
    Console,
    TrainedStage,
    collaborative_cpu_seconds,
    collaborative_stage,
    evaluation_stage,
    train_stage,
)

__all__ = [
    "CellInputs",
    "CellWork",
    "check_reward",
    "prepare_inputs",
    "run_cell",
    "target_values",
]


@dataclass(frozen=True)
class CellInputs:
    """What the cells of one dataset, seed and set of identifiers read.

    Attributes:
        split: data and split.
        collaborative: the trained collaborative model, if there is one.
        catalogue: identifiers and tree; None for a cell that belongs to several sets of them.
    """

    split: Split
    collaborative: CollaborativeModel | None
    catalogue: Catalogue | None


@dataclass(frozen=True)
class CellWork:
    """The results of a cell's work.

    Attributes:
        trained: the generator; None at the stage ``"collaborative"``.
        evaluations: on the test users, by name as in ``Cell.evaluations``.
    """

    trained: TrainedStage | None
    evaluations: dict[str, Evaluation]


def prepare_inputs(cell: Cell, out: Path, console: Console) -> CellInputs:
    """Load the data, train or load the collaborative model, find or make the identifiers.

    All errors that can be found without training are raised before any training.

    Args:
        cell: whose inputs; cells with the same folders share them.
        out: the output folder.
        console: where to report.

    Raises:
        ConfigError: the data have changed, or have a behaviour without a reward.
        DataError: the data are damaged, or do not fit the identifiers.
    """
    config = cell.config
    data_folder = out / cell.data_folder
    built_in = str(Path(cell.data_folder) / "data")
    with first_process_first(), alone(data_folder):
        _record(cell, built_in, out)
        dataset = load_data(config.data, data_folder, cell.data_seed)
        split = split_data(dataset, config.data, data_folder)
        check_same_data(data_folder, {"data": digest_of(split.dataset)})
    values = check_reward(config, split)
    _check_outside(config)
    tokenizer = check_generator(config.model)
    console.say(
        f"Data: {dataset.name}, {dataset.num_users:,} users, {dataset.num_items:,} items, "
        f"{len(split.train):,} training examples"
    )
    if values:
        console.say(f"Behaviours: {values}")
    published = None
    if cell.identifiers_folder is not None:
        published = published_identifiers(dataset, config.data.identifiers)
    _record(cell, cell.collaborative_folder, out)
    collaborative = collaborative_stage(
        config.collaborative,
        split,
        out / cell.collaborative_folder,
        config.seed,
        console,
        config.sft.get("report_to", "none"),
    )
    if cell.identifiers_folder is None:
        return CellInputs(split, collaborative, None)
    folder = out / cell.identifiers_folder
    folder.mkdir(parents=True, exist_ok=True)
    with first_process_first():
        name, identifiers = published or make_identifiers(
            dataset,
            getattr(collaborative, "item_embeddings", None),
            config.seed,
            config.collaborative,
            method=config.data.identifiers,
            folder=folder,
            progress=console.progress,
        )
        check_same_data(folder, {"identifiers": digest_of(identifiers)})
    catalogue = make_catalogue(name, identifiers, tokenizer)
    console.say(
        f"Identifiers: {name}, {catalogue.tree.num_leaves:,} distinct for "
        f"{catalogue.tree.num_items:,} items, {sum(catalogue.vocabulary.codebook_sizes):,} tokens"
    )
    return CellInputs(split, collaborative, catalogue)


def run_cell(cell: Cell, inputs: CellInputs, out: Path, console: Console) -> CellWork:
    """Do a cell's work, or go on with it; the cells that it needs must be complete.

    Args:
        cell: what to do.
        inputs: see :func:`prepare_inputs`.
        out: the output folder.
        console: where to report.
    """
    trained = None if cell.stage == "collaborative" else _train(cell, inputs, out, console)
    settings, leaf_of = cell.config.evaluation, None
    if inputs.catalogue is None:
        # A recommender of items: no identifiers take part.
        settings = replace(settings, collision="item")
    else:
        leaf_of = inputs.catalogue.leaf_of
    values = target_values(cell.config, inputs.split)
    evaluations = {}
    for name, folder in cell.evaluations.items():
        recommender = _recommender(cell, name, trained, inputs)
        with first_process_first():
            _record(cell, folder, out)
            evaluations[name] = evaluation_stage(
                settings, inputs.split, recommender, leaf_of, out / folder, console, values
            )
            if settings.summed and trained is not None:
                place = out / folder / SUMMED
                _evaluate_summed(settings, recommender, inputs, place, console, values)
    return CellWork(trained, evaluations)


def _evaluate_summed(
    settings: EvaluationConfig,
    generator: Recommender,
    inputs: CellInputs,
    folder: Path,
    console: Console,
    values: np.ndarray | None,
) -> None:
    """Evaluate the generator together with the collaborative model, by the first rule of two."""
    assert inputs.collaborative is not None
    assert inputs.catalogue is not None
    both = SummedRecommender(
        generator,
        inputs.collaborative,
        width=settings.num_beams,
        name=f"{generator.name}, with the collaborative model",
    )
    rule = replace(settings, mask_seen=settings.mask_seen is True)
    leaf_of = inputs.catalogue.leaf_of
    evaluation_stage(rule, inputs.split, both, leaf_of, folder, console, values)


def _record(cell: Cell, folder: str, out: Path) -> None:
    """Record what one of the cell's folders is made from, if the cell may fill it."""
    values = cell.made_from().get(folder)
    if values is not None and is_first_process():
        record_inputs(out / folder, values)


def _train(cell: Cell, inputs: CellInputs, out: Path, console: Console) -> TrainedStage:
    """Train the generator: from new weights at the stage "sft" or by ``start: scratch``, else from
    the start that is there.

    With ``flow.objective`` "sft", a method is continued SFT.
    """
    config, split, catalogue = cell.config, inputs.split, inputs.catalogue
    assert catalogue is not None
    _record(cell, cell.id, out)

    is_start = cell.stage == "sft"

    def untrained() -> GFlowModel:
        settings = config.flow
        if is_start:
            settings = FlowSettings(
                objective="sft",
                normalize=config.flow.normalize,
                max_history=config.flow.max_history,
            )
        made = make_generator(config.model, catalogue, split.dataset, settings, seed=config.seed)
        return add_adapters(config.model, made)

    def copy_of_start() -> GFlowModel:
        start = GFlowModel.from_pretrained(out / cell.needs[-1] / "model")
        return add_adapters(config.model, start.with_settings(**asdict(config.flow)))

    needs_scores = not is_start and config.flow.objective != "sft"
    before = 0.0
    if not is_start and config.start == "sft":
        facts = files.read_json(out / cell.needs[-1] / "done.json", dict)
        before += facts.get("cpu_seconds", 0.0) + facts.get("cpu_seconds_before", 0.0)
    if needs_scores:
        before += collaborative_cpu_seconds(out / cell.collaborative_folder) or 0.0
    trained = train_stage(
        out / cell.id,
        cell.label,
        untrained if is_start or config.start == "scratch" else copy_of_start,
        config.sft if is_start else config.method_arguments,
        split,
        inputs.collaborative if needs_scores else None,
        config.seed,
        console,
        before,
    )
    if is_first_process():
        # The model is saved apart.
        shutil.rmtree(out / cell.id / "checkpoints", ignore_errors=True)
    return trained


def _recommender(
    cell: Cell, name: str, trained: TrainedStage | None, inputs: CellInputs
) -> Recommender:
    if trained is not None:
        num_beams = cell.config.evaluation.num_beams
        return GenerativeRecommender(trained.model, num_beams=num_beams, name=name)
    if name == "Popularity":
        return ScoringRecommender(name, Popularity(inputs.split.item_counts))
    assert inputs.collaborative is not None
    return ScoringRecommender(name, inputs.collaborative)


def _check_outside(config: RunConfig) -> None:
    """Load what the configuration names from outside the package, before any training.

    Raises:
        ValueError: it cannot be had.
    """
    named = {
        "flow.objective": config.flow.objective,
        "collaborative.kind": config.collaborative.kind,
        "data.identifiers": config.data.identifiers,
    }
    for setting, name in named.items():
        if name is not None and is_outside(name):
            load_outside(name, setting)


def check_reward(config: RunConfig, split: Split) -> str:
    """Raise for a missing reward before any training; say which value each behaviour has.

    Raises:
        ConfigError: the data have a behaviour without a value, or a value is for another one.
    """
    names = split.dataset.behaviour_names
    given = config.method_arguments.get("behaviour_values") or {}
    foreign = [name for name in given if name not in names and name not in split.dataset.side]
    if foreign and names:
        raise ConfigError(
            f"finetune.behaviour_values must be for behaviours of the data, which are "
            f"{', '.join(map(repr, names))}; got {foreign[0]!r}"
        )
    options = config.method_arguments.get("sampler_options") or {}
    side = options.get("side", "impression")
    try:
        if config.flow.has_exact_flows:
            signals = config.flow.catalogue_signals
            CatalogueReward(signals, behaviour_values=given, behaviour_names=names)
        else:
            signals = config.flow.signals
            make_signals(signals, behaviour_values=given, behaviour_names=names, side=side)
    except ValueError as error:
        setting = "flow." if str(error).startswith("signals") else "finetune.behaviour_values: "
        raise ConfigError(f"{setting}{error}") from error
    target_values(config, split)
    if "r_a" not in config.flow.signals or not names:
        return ""
    values = default_behaviour_values([name for name in names if name not in given]) | given
    text = ", ".join(f"{name} {values[name]:g}" for name in names)
    if all(name in given for name in names):
        return f"{text} (r_a)"
    return f"{text} (r_a, by default; --behaviour-values and finetune.behaviour_values change it)"


def target_values(config: RunConfig, split: Split) -> np.ndarray | None:
    """What each test target is worth [n], if the evaluation is to say what is won by value.

    Raises:
        ConfigError: the data have no behaviours, or the targets are worth nothing.
    """
    if not config.evaluation.value_weighted:
        return None
    codes = split.dataset.behaviours
    if codes is None:
        raise ConfigError(
            f"evaluation.value_weighted needs behaviours or stars, which {split.dataset.name} does "
            "not have; got true"
        )
    given = config.method_arguments.get("behaviour_values") or {}
    level = InteractionLevel(given, split.dataset.behaviour_names)
    of_targets = torch.from_numpy(codes[split.target_events("test")].astype(np.int64))
    values: np.ndarray = level.of_codes(of_targets).double().numpy()
    if not values.any():
        raise ConfigError(
            "evaluation.value_weighted needs targets with a value > 0; all test targets have 0"
        )
    return values
