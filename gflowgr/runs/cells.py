"""The cells of a run or an experiment, and the folders that they fill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from ..models.settings import FlowSettings
from .config import RunConfig
from .sections import collaborative_names
from .spec import ExperimentSpec, Method, Values, Variant

__all__ = ["Cell", "cells_of", "cells_of_run", "folders_of"]

_OF_START = ("seed", "data", "collaborative", "model", "sft")
_READS = {
    "collaborative": ("seed", "data", "collaborative"),
    "sft": _OF_START,
    "method": (*_OF_START, "flow", "finetune", "start"),
}
_PLACES = (("data", "path"), ("collaborative", "embeddings"), ("model", "path"))
_DATA_SEED = 42  # of an experiment's built-in dataset, which is the same for all its seeds


@dataclass(frozen=True)
class Cell:
    """One piece of work: a training, if its stage has one, and the evaluations of its result.

    All folders are relative to the output folder.

    Attributes:
        stage: ``"collaborative"``: train and evaluate the collaborative model, and popularity;
            ``"sft"``: the supervised start; ``"method"``: a fine-tuning from there.
        label: the method's name.
        id: folder of the cell's own training.
        config: what is done, as for ``gflowgr train``.
        data_seed: of the built-in dataset.
        data_folder: what belongs to the dataset alone.
        collaborative_folder: the collaborative model.
        identifiers_folder: identifiers that have to be made; None: the cell belongs to several sets
            of identifiers, so none take part in its evaluations.
        evaluations: name of what is evaluated to the folder of its evaluation.
        needs: ids of the cells that must be complete before; the last is a method's start, unless
            it trains new weights.
    """

    stage: Literal["collaborative", "sft", "method"]
    label: str
    id: str
    config: RunConfig
    data_seed: int
    data_folder: str
    collaborative_folder: str
    identifiers_folder: str | None
    evaluations: dict[str, str]
    needs: tuple[str, ...] = ()

    def to_dict(self) -> Values:
        """JSON-ready; :meth:`from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Values) -> Cell:
        """The inverse of :meth:`to_dict`."""
        config = RunConfig.from_dict(values["config"])
        return cls(**values | {"config": config, "needs": tuple(values["needs"])})

    def is_complete(self, out: Path) -> bool:
        """Whether the last file that an experiment writes for it is there."""
        last = [*self.evaluations.values()][-1]
        return (out / last / "analysis.json").is_file()

    def made_from(self) -> dict[str, Values]:
        """The folders that the cell may fill, each with the values that its content depends on.

        JSON-ready, and without places on this machine: what lies there has a digest.
        """
        config = self.config.to_dict()
        del config["evaluation"]["examples"]  # only the report reads it
        config["flow"]["reduction"] = self.config.flow.reduced_by  # as it is, given or by default
        for section, key in _PLACES:
            if config[section].get(key) is not None:
                config[section][key] = Path(config[section][key]).name
        reads = {stage: {name: config[name] for name in names} for stage, names in _READS.items()}
        reads["sft"]["flow"] = {"normalize": config["flow"]["normalize"]}
        without = {name: each for name, each in config["data"].items() if name != "identifiers"}
        reads["collaborative"]["data"] = without
        folders: dict[str, Values] = {}
        if self.config.data.path is None:
            made = {name: config["data"][name] for name in ("users", "items", "popularity_bias")}
            folders[str(Path(self.data_folder) / "data")] = {"seed": self.data_seed, "data": made}
        if self.config.collaborative.is_trained:
            folders[self.collaborative_folder] = reads["collaborative"]
        if self.stage != "collaborative":
            folders[self.id] = reads[self.stage]
        evaluated = reads[self.stage] | {"evaluation": config["evaluation"]}
        if self.stage == "collaborative" and self.identifiers_folder is not None:
            evaluated["data"] = config["data"]
        folders |= dict.fromkeys(self.evaluations.values(), evaluated)
        plain: dict[str, Values] = json.loads(json.dumps(folders))  # tuples as they are read
        return plain


def cells_of_run(config: RunConfig) -> list[Cell]:
    """The cells of ``gflowgr train``, in the order of their work.

    The collaborative model, SFT, and from there, with the same budget, continued SFT and the method
    of ``config.flow``.
    """

    def cell(id_: str, label: str, config: RunConfig, *needs: str) -> Cell:
        return Cell(
            stage="sft" if id_ == "sft" else "method",
            label=label,
            id=id_,
            config=config,
            data_seed=config.seed,
            data_folder="",
            collaborative_folder="sasrec",
            identifiers_folder="",
            evaluations={label: _run_evaluation(label)},
            needs=needs,
        )

    sft = cell("sft", "SFT", config, "sasrec")
    names = _references(config)
    collaborative = replace(
        sft,
        stage="collaborative",
        label=names[0],
        id="sasrec",
        evaluations={name: _run_evaluation(name) for name in names},
        needs=(),
    )
    cells = [collaborative, sft]
    if config.continued_sft and config.start == "sft":
        flow = FlowSettings(
            objective="sft", normalize=config.flow.normalize, max_history=config.flow.max_history
        )
        continued = replace(config, flow=flow)
        cells.append(cell("sft_continued", "SFT continued", continued, "sasrec", "sft"))
    start = ["sft"] if config.start == "sft" else []
    return [*cells, cell("gflowgr", config.flow.label, config, "sasrec", *start)]


def _run_evaluation(label: str) -> str:
    return f"evaluation/{label.lower().replace(' ', '_')}"


def cells_of(spec: ExperimentSpec) -> list[Cell]:
    """The cells of an experiment, in an order in which each comes after those that it needs."""
    cells: dict[str, Cell] = {}
    for variant in spec.variants:
        for cell in _cells_of_variant(spec, variant):
            cells.setdefault(cell.id, cell)
    return list(cells.values())


def _cells_of_variant(spec: ExperimentSpec, variant: Variant) -> Iterator[Cell]:
    """One start and the methods from it, after the collaborative model that variants share."""
    config = spec.config(variant)
    shared = f"{variant.seed_folder}/collaborative"
    names = _references(config)
    collaborative = Cell(
        stage="collaborative",
        label=names[0],
        id=shared,
        config=config,
        data_seed=_DATA_SEED,
        data_folder=variant.data_folder,
        collaborative_folder=f"{shared}/sasrec",
        identifiers_folder=None,
        evaluations={
            name: f"{shared}/evaluation/{name.lower().replace(' ', '_')}" for name in names
        },
    )
    yield collaborative

    def cell(id_: str, label: str, method: Method | None, *needs: str) -> Cell:
        return replace(
            collaborative,
            stage="sft" if method is None else "method",
            label=label,
            id=id_,
            config=spec.config(variant, method),
            identifiers_folder=variant.folder,
            evaluations={label: f"{id_}/evaluation"},
            needs=needs,
        )

    start = f"{variant.folder}/sft"
    yield cell(start, "SFT", None, shared)
    for method in spec.methods:
        from_sft = spec.config(variant, method).start == "sft"
        needs = (shared, start) if from_sft else (shared,)
        yield cell(f"{variant.folder}/{method.slug}", method.name, method, *needs)


def _references(config: RunConfig) -> list[str]:
    """What the generators are compared with: the collaborative model, if any, and popularity."""
    return [*collaborative_names(config.collaborative.kind), "Popularity"]


def folders_of(cells: list[Cell]) -> dict[str, Values]:
    """:meth:`Cell.made_from` of all cells together; those before come first."""
    folders: dict[str, Values] = {}
    for cell in cells:
        for folder, values in cell.made_from().items():
            folders.setdefault(folder, values)
    return folders
