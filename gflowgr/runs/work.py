"""One cell's work, in a process of its own: ``python -m gflowgr.runs.work < job.json``.

The process ends with 0 when the cell is complete, with :data:`.cells.BUSY` when another has it,
and otherwise with a traceback.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import files
from ..collaborative import CollaborativeModel
from ..data import Dataset, LeaveOneOut
from ..evaluation import Recommender, analyse, measure_calibration
from ..evaluation.generative import GenerativeRecommender
from ..models import GFlowModel
from ..rewards import BehaviourAwareReward, make_signals
from .cells import BUSY, Cell, alone, cells_of, claim, locked
from .claim import claim_data, digest_of
from .config import RunConfig
from .generator import check_generator
from .prepare import (
    Catalogue,
    load_data,
    make_catalogue,
    make_identifiers,
    published_identifiers,
    split_data,
)
from .processes import quiet_transformers
from .run import check_reward, finetune, reference_recommenders, train_supervised
from .spec import ExperimentSpec
from .stages import Screen, collaborative_stage, evaluation_stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["run_cell"]

_CALIBRATION_USERS = 32
_DATA_SEED = 42  # of the built-in dataset, which is the same for all seeds


def main() -> int:
    """Work on the cell that standard input describes."""
    job = json.load(sys.stdin)
    spec = ExperimentSpec.from_plain(job["spec"])
    cell = next(cell for cell in cells_of(spec) if cell.id == job["cell"])
    out = Path(job["out"])
    torch.set_num_threads(job["threads"])
    with locked(cell, out) as mine:
        if not mine:
            return BUSY
        if not cell.is_complete(out):
            run_cell(spec, cell, out, Screen(_say, progress=False))
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


@dataclass(frozen=True)
class _Ground:
    """What all cells of a dataset and seed stand on."""

    config: RunConfig
    dataset: Dataset
    split: LeaveOneOut
    collaborative: CollaborativeModel | None
    tokenizer: PreTrainedTokenizerBase | None


def run_cell(spec: ExperimentSpec, cell: Cell, out: Path, screen: Screen) -> None:
    """Do a cell's work, or go on with it; the cells that it needs must be complete.

    Args:
        spec: the experiment.
        cell: one of its cells.
        out: the experiment's folder.
        screen: where to report.

    Raises:
        ConfigError: the data have changed, or have a behaviour without a reward.
        DataError: the data are damaged, or do not fit the identifiers.
    """
    quiet_transformers()
    folder = out / cell.id
    folder.mkdir(parents=True, exist_ok=True)
    claim(cell, spec, out)
    ground = _ground(spec, cell, out, screen)
    if cell.stage == "collaborative":
        recommenders = reference_recommenders(ground.split, ground.collaborative)
        for name, recommender in recommenders.items():
            where = folder / "evaluation" / name.lower().replace(" ", "_")
            _evaluate(ground, recommender, None, None, where, screen)
        return
    catalogue = _catalogue(ground, out / cell.track.folder)
    if cell.method is None:
        trained = train_supervised(ground.config, catalogue, ground.split, folder, screen)
        label = "SFT"
    else:
        start = GFlowModel.from_pretrained(out / cell.track.folder / "sft" / "model")
        label = cell.method.name
        trained = finetune(
            ground.config,
            start,
            ground.config.flow,
            label,
            ground.split,
            ground.collaborative,
            folder,
            screen,
        )
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the model is saved apart
    generator = GenerativeRecommender(
        trained.model, num_beams=ground.config.evaluation.num_beams, name=label
    )
    _evaluate(ground, generator, trained.model, catalogue, folder / "evaluation", screen)


def _ground(spec: ExperimentSpec, cell: Cell, out: Path, screen: Screen) -> _Ground:
    config = spec.config(cell.track, cell.method)
    data_folder = out / cell.track.data_folder
    with alone(cell.track.data_folder, out):
        dataset = load_data(config.data, data_folder, _DATA_SEED)
        split = split_data(dataset, config.data.max_history, data_folder)
        claim_data(data_folder, {"data": digest_of(dataset)})
    check_reward(config, split)
    tokenizer = check_generator(config.model)
    collaborative = collaborative_stage(
        config.collaborative,
        split,
        out / cell.track.seed_folder / "collaborative" / "sasrec",
        config.seed,
        screen,
    )
    return _Ground(config, dataset, split, collaborative, tokenizer)


def _catalogue(ground: _Ground, folder: Path) -> Catalogue:
    """Identifiers and tree of a track; identifiers that have to be made are kept in its folder."""
    config = ground.config
    name, identifiers = published_identifiers(
        ground.dataset, config.data.identifiers
    ) or make_identifiers(
        ground.dataset,
        getattr(ground.collaborative, "item_embeddings", None),
        config.seed,
        config.collaborative,
        method=config.data.identifiers,
        folder=folder,
    )
    claim_data(folder, {"identifiers": digest_of(identifiers)})
    return make_catalogue(name, identifiers, ground.tokenizer)


def _evaluate(
    ground: _Ground,
    recommender: Recommender,
    model: GFlowModel | None,
    catalogue: Catalogue | None,
    folder: Path,
    screen: Screen,
) -> None:
    settings, leaf_of, tokens, calibration = ground.config.evaluation, None, None, None
    if catalogue is None:
        # A recommender of items: no identifiers take part.
        settings = replace(settings, collision="item")
    else:
        leaf_of, tokens = catalogue.leaf_of, catalogue.tokens
    evaluation = evaluation_stage(settings, ground.split, recommender, leaf_of, folder, screen)
    if model is not None:
        screen.say("Stage: calibration")
        calibration = measure_calibration(
            model,
            ground.split,
            _common_reward(ground),
            ground.collaborative,
            users=min(_CALIBRATION_USERS, len(evaluation.users)),
            progress=False,
        )
    analysis = analyse(evaluation, ground.split, tokens, calibration)
    files.write_json(folder / "analysis.json", analysis.to_dict(), indent=None)


def _common_reward(ground: _Ground) -> BehaviourAwareReward:
    """The same for all methods, whatever they were trained with."""
    names = ["r_a", "r_yhat", "r_sim"] if ground.collaborative is not None else ["r_a", "r_sim"]
    signals = make_signals(
        names,
        behaviour_values=ground.config.finetune.get("behaviour_values"),
        behaviour_names=ground.split.dataset.behaviour_names,  # stars have names there only
    )
    return BehaviourAwareReward(signals)


if __name__ == "__main__":
    sys.exit(main())
