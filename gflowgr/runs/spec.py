"""The description of an experiment: one YAML file, checked as a whole before any work is done."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import shown
from .config import ConfigError, RunConfig, training_arguments
from .yaml_file import apply_override, expand, read_yaml

__all__ = ["ExperimentSpec", "Method", "Values", "Variant", "merge", "shipped_specs"]

Values = dict[str, Any]

_SPECS = Path(__file__).parent / "specs"
_SECTIONS = ("data", "collaborative", "model", "flow", "sft", "finetune", "evaluation")
_OF_METHODS = ("flow", "finetune", "start")
# Names of other files and folders beside those of datasets, identifiers and methods.
_OF_EXPERIMENT = {
    name: f"the experiment's own {name}"
    for name in (
        *("experiment.json", "figures", "report", "report.md", "report.html"),
        *("results.json", "results.csv"),
    )
}
_OF_SEED = {"collaborative": "the collaborative model"}
_OF_VARIANT = {"sft": "the start", "digests.json": "the variant's own digests.json"}
_MAX_FOLDER = 64
"""Bytes of a folder's name; file systems allow 255, and paths of three such folders get long."""


def shipped_specs() -> dict[str, Path]:
    """The experiments that come with the package, by name."""
    return {path.stem: path for path in sorted(_SPECS.glob("*.yaml"))}


@dataclass(frozen=True)
class Method:
    """One way to go on from the supervised start.

    Attributes:
        name: in tables.
        settings: what it changes of the sections ``flow`` and ``finetune``, and of ``start``.
        group: ``"main"``; ``"grid"``: a method with one value changed; ``"ablation"``: a method
            without one of its parts.
        of: of which method it is a variant, if it is one.
        key: of a grid: what is varied, such as ``flow.beta``.
        value: of a grid: its value.
        alias: of a grid: ``of`` itself has this value, so that its result is used.
    """

    name: str
    settings: Values = field(default_factory=dict)
    group: Literal["main", "grid", "ablation"] = "main"
    of: str | None = None
    key: str | None = None
    value: float | None = None
    alias: bool = False

    @property
    def slug(self) -> str:
        """The name of its folder."""
        return _slug(self.of if self.alias and self.of else self.name)


@dataclass(frozen=True)
class Variant:
    """What one supervised start belongs to.

    Attributes:
        dataset: name of the dataset.
        seed: of everything but the data.
        identifiers: which identifiers; None: those that a run would make or find.
    """

    dataset: str
    seed: int
    identifiers: str | None

    @property
    def data_folder(self) -> str:
        """Folder of what belongs to the dataset alone, under the experiment's."""
        return self.dataset

    @property
    def seed_folder(self) -> str:
        """Folder of what belongs to dataset and seed."""
        return f"{self.data_folder}/seed_{self.seed}"

    @property
    def folder(self) -> str:
        """Folder of the variant."""
        return f"{self.seed_folder}/{self.slug}"

    @property
    def slug(self) -> str:
        """The name of that folder, after the index file's name without its own folder."""
        return _slug(Path(self.identifiers or "default").name)


@dataclass(frozen=True)
class ExperimentSpec:
    """Datasets x identifiers x seeds x methods.

    Attributes:
        name: of the experiment.
        title: one line for the report.
        baseline: the method that all are compared with.
        seeds: at least one.
        base: sections as of ``gflowgr train``, for all.
        datasets: name to sections that differ there, and ``identifiers``, a list.
        methods: by what each differs from ``base``, with the variants of grids and ablations.
        caveats: sentences for the report.
    """

    name: str
    title: str
    baseline: str
    seeds: list[int]
    base: Values
    datasets: dict[str, Values]
    methods: list[Method]
    caveats: list[str]

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> ExperimentSpec:
        """Read a file, or one of :func:`shipped_specs` by its name.

        Args:
            path: of the YAML file; ``${NAME}`` in a text stands for the environment variable.
            overrides: ``"base.sft.max_steps=200"``, values in YAML.

        Raises:
            ConfigError: anything that would make some cell fail; the message names it.
        """
        shipped = shipped_specs()
        path = shipped.get(str(path), Path(path))
        if not path.is_file():
            raise ConfigError(f"{path}: No such file or directory; shipped: {', '.join(shipped)}")
        values = read_yaml(path)
        for override in overrides:
            apply_override(values, override)
        return cls.from_dict(values, source=str(path))

    @staticmethod
    def title_of(path: Path) -> str:
        """The title of a file."""
        return str(read_yaml(path).get("title", path.stem))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "experiment") -> ExperimentSpec:
        """Build from nested dictionaries; see :meth:`load` for the errors."""
        values = dict(expand(dict(values), source))
        known = {
            "name": str,
            "title": str,
            "baseline": str,
            "seeds": list,
            "base": dict,
            "datasets": dict,
            "methods": dict,
            "grids": dict,
            "ablations": dict,
            "caveats": list,
        }
        for key, value in values.items():
            if key not in known:
                raise ConfigError(f"{source}: unknown key {shown(key)}; known: {', '.join(known)}")
            if not isinstance(value, known[key]):
                kind = known[key].__name__
                raise ConfigError(f"{source}: {key} must be {kind}; got {shown(value)}")
        for key in ("name", "seeds", "datasets", "methods"):
            if not values.get(key):
                raise ConfigError(f"{source}: {key} is missing or empty")
        seeds = values["seeds"]
        if len(set(seeds)) < len(seeds) or not all(type(seed) is int for seed in seeds):
            raise ConfigError(f"{source}: seeds must be different integers; got {seeds}")
        base = values.get("base", {})
        methods = list(_methods(source, values))
        baseline = values.get("baseline", methods[0].name)
        if baseline not in [method.name for method in methods]:
            raise ConfigError(f"{source}: baseline {baseline!r} is no method")
        _check_folders(f"{source}: methods", [(m.name, m.slug) for m in methods], _OF_VARIANT)
        spec = cls(
            name=values["name"],
            title=values.get("title") or values["name"],
            baseline=baseline,
            seeds=seeds,
            base=base,
            datasets=values["datasets"],
            methods=methods,
            caveats=values.get("caveats", []),
        )
        spec._check(source)
        return replace(spec, methods=[spec._aliased(method) for method in methods])

    @property
    def variants(self) -> list[Variant]:
        """In the order in which they are worked on."""
        return [
            Variant(dataset, seed, identifiers)
            for dataset in self.datasets
            for seed in self.seeds
            for identifiers in self.identifiers(dataset)
        ]

    def identifiers(self, dataset: str) -> list[str | None]:
        """The sets of identifiers of a dataset."""
        return list(self.datasets[dataset].get("identifiers", [None]))

    def config(self, variant: Variant, method: Method | None = None) -> RunConfig:
        """The configuration of a variant's supervised start, or of a method's fine-tuning.

        Raises:
            ConfigError: it cannot be run.
        """
        own = {k: v for k, v in self.datasets[variant.dataset].items() if k != "identifiers"}
        values = merge(self.base, own)
        if method is not None:
            values = merge(values, method.settings)
        where = f"{self.name}: {variant.dataset}" + (f": {method.name}" if method else "")
        values["data"] = {**values.get("data", {}), "identifiers": variant.identifiers}
        return RunConfig.from_dict(
            {**values, "seed": variant.seed, "output_dir": variant.folder}, source=where
        )

    def _aliased(self, method: Method) -> Method:
        """A point of a grid that is the varied method itself, everywhere, needs no cell."""
        if method.group != "grid":
            return method
        original = next(other for other in self.methods if other.name == method.of)
        same = all(
            _outcome(self.config(variant, method)) == _outcome(self.config(variant, original))
            for variant in self.variants
        )
        return replace(method, alias=same)

    def _check(self, source: str) -> None:
        """Make every configuration once, so that errors are found before any work."""
        for where, values in (("base", self.base), *self.datasets.items()):
            if not isinstance(values, dict):
                raise ConfigError(f"{source}: {where} must have sections; got {shown(values)}")
            allowed = _SECTIONS if where == "base" else (*_SECTIONS, "identifiers")
            _only(allowed, values, f"{source}: {where}")
            if "identifiers" in values.get("data", {}):
                raise ConfigError(
                    f"{source}: {where}: data.identifiers: name them in the list `identifiers` of "
                    "each dataset"
                )
        folders = [(name, name) for name in self.datasets]
        _check_folders(f"{source}: datasets", folders, _OF_EXPERIMENT)
        for name, values in self.datasets.items():
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ConfigError(
                    f"{source}: datasets: {shown(name)} names a folder; use letters, digits, . _ -"
                )
            listed = values.get("identifiers", [None])
            texts = isinstance(listed, list) and all(isinstance(x, str | None) for x in listed)
            if not texts or not listed or len(set(listed)) < len(listed):
                raise ConfigError(
                    f"{source}: {name}: identifiers must be a list of different names; got {listed}"
                )
            variants = [Variant(name, 0, each) for each in listed]
            folders = [(variant.identifiers or "default", variant.slug) for variant in variants]
            _check_folders(f"{source}: {name}: identifiers", folders, _OF_SEED)
        for dataset in self.datasets:
            variant = Variant(dataset, self.seeds[0], self.identifiers(dataset)[0])
            for method in (None, *self.methods):
                self.config(variant, method)


def _methods(source: str, values: Mapping[str, Any]) -> Iterator[Method]:
    """The methods, and the variants of them that grids and ablations ask for."""
    main: dict[str, Values] = {}
    for name, settings in values["methods"].items():
        main[name] = _checked(settings, f"{source}: methods: {name}")
        yield Method(name, main[name])
    for of, variants in values.get("ablations", {}).items():
        _known(of, main, f"{source}: ablations")
        for what, settings in variants.items():
            settings = _checked(settings, f"{source}: ablations: {of}: {what}")
            yield Method(f"{of} {what}", merge(main[of], settings), "ablation", of)
    for of, grid in values.get("grids", {}).items():
        _known(of, main, f"{source}: grids")
        for key, points in grid.items():
            section, _, name = key.partition(".")
            _only(_OF_METHODS, {section: name}, f"{source}: grids: {of}")
            if not isinstance(points, list):
                raise ConfigError(
                    f"{source}: grids: {of}: {key} must be a list; got {shown(points)}"
                )
            for value in points:
                settings = merge(main[of], {section: {name: value}})
                yield Method(f"{of} {name}={value}", settings, "grid", of, key, value)


def _outcome(config: RunConfig) -> tuple[Any, Values]:
    """What a method's result depends on, defaults filled in."""
    arguments = training_arguments(config.method_arguments, "unused", config.seed).to_dict()
    return config.flow, {**arguments, "start": config.start}


def _checked(settings: Any, where: str) -> Values:
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise ConfigError(f"{where} must have sections; got {shown(settings)}")
    _only(_OF_METHODS, settings, where)
    return settings


def _only(allowed: Sequence[str], values: Values, where: str) -> None:
    for key in values:
        if key not in allowed:
            raise ConfigError(f"{where}: unknown section {shown(key)}; known: {', '.join(allowed)}")


def _known(name: str, methods: Values, where: str) -> None:
    if name not in methods:
        raise ConfigError(f"{where}: {name!r} is no method; there are {', '.join(methods)}")


def merge(values: Values, changes: Values) -> Values:
    """``changes`` over ``values``, section by section; what is no section is replaced."""
    merged = json.loads(json.dumps(values))
    for section, changed in changes.items():
        both = isinstance(changed, dict)
        merged[section] = {**merged.get(section, {}), **changed} if both else changed
    return dict(merged)


def _slug(name: str) -> str:
    """A folder's name: letters and digits of any script, the rest as ``_``; perhaps empty."""
    name = unicodedata.normalize("NFC", name).lower()
    return re.sub(r"(?:[^\w=.]|_)+", "_", name).strip("_.")


def _check_folders(
    where: str, folders: Sequence[tuple[str, str]], taken: Mapping[str, str]
) -> None:
    """Check that names have folders of their own.

    Args:
        where: for errors.
        folders: names and their folders.
        taken: folders that have another use, and which.

    Raises:
        ConfigError: a name without a folder, with one that is too long, or that is another's.
    """
    used = dict(taken)
    for name, folder in folders:
        if not isinstance(name, str) or not folder:
            raise ConfigError(
                f"{where}: a name must have a letter or a digit; got {shown(name)}, which names no "
                "folder"
            )
        if len(folder.encode(errors="surrogatepass")) > _MAX_FOLDER:
            raise ConfigError(
                f"{where}: a name must make a folder of at most {_MAX_FOLDER} bytes; got "
                f"{shown(name)}"
            )
        # Some file systems take upper and lower case, and both ways to write an accent, for one.
        key = unicodedata.normalize("NFC", folder).casefold()
        if key in used:
            raise ConfigError(
                f"{where}: {shown(name)} is too like {shown(used[key])}: both would have the "
                f"folder {shown(folder)}"
            )
        used[key] = name
