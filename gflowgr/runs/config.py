"""The configuration of a run: one YAML file, checked before any work is done."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import torch

from ..errors import shown
from ..extensions import is_outside, load_outside
from ..models.causal import CausalConfig
from ..models.decoder import DecoderConfig
from ..models.gflow_model import FlowSettings
from ..models.lora import LoraSettings
from ..models.tiger import TigerConfig
from ..plain_settings import make_plain, type_hints
from .sections import CollaborativeConfig, DataConfig, EvaluationConfig, OutsideGenerator
from .yaml_file import ConfigError, apply_override, expand, read_yaml

if TYPE_CHECKING:
    from ..training.config import GFlowGRConfig

__all__ = ["ConfigError", "RunConfig", "training_arguments"]


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run.

    Attributes:
        output_dir: where checkpoints, results and the report go; a killed run resumes from it.
        seed: of data order, initial weights, dropout and sampling.
        data: which data.
        collaborative: the collaborative model.
        model: the generator: TIGER (``kind: tiger``), a decoder over the identifiers alone (``kind:
            decoder``), a decoder-only text model (``kind: causal``) or one of your own (``kind:
            "module:Class"``, an :class:`OutsideGenerator`).
        flow: objective of the fine-tuning, GFlowGR's or a baseline's.
        sft: arguments of the first, supervised training
            (:class:`~gflowgr.training.GFlowGRConfig`).
        finetune: arguments of the fine-tuning, the same for GFlowGR and for continued SFT.
        start: ``"sft"``: the method goes on from the supervised start; ``"scratch"``: it trains new
            weights, by the arguments of ``sft`` with those of ``finetune`` over them, jointly with
            the supervised loss from the first step on.
        continued_sft: also continue SFT with the fine-tuning's budget, as the fair baseline; not
            read with ``start: scratch``, where SFT itself is.
        evaluation: the final evaluation.
        caveats: sentences for the report on what was shortened.
    """

    output_dir: str
    seed: int = 42
    data: DataConfig = field(default_factory=DataConfig)
    collaborative: CollaborativeConfig = field(default_factory=CollaborativeConfig)
    model: TigerConfig | DecoderConfig | CausalConfig | OutsideGenerator = field(
        default_factory=TigerConfig
    )
    flow: FlowSettings = field(default_factory=lambda: FlowSettings(objective="tb"))
    sft: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)
    start: Literal["sft", "scratch"] = "sft"
    continued_sft: bool = True
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    caveats: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        make_plain(self)
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be in 0 .. 2**32 - 1; got {shown(self.seed)}")
        if self.data.max_history != self.flow.max_history:
            object.__setattr__(
                self, "flow", dataclasses.replace(self.flow, max_history=self.data.max_history)
            )
        if (self.collaborative.kind == "embeddings") != (self.collaborative.embeddings is not None):
            raise ConfigError("collaborative.embeddings goes with collaborative.kind: embeddings")
        if self.flow.reference and self.start == "scratch":
            raise ConfigError(
                "flow.reference must be false with start: scratch, whose reference would be new "
                "weights; got true"
            )
        if self.flow.is_vargrad and self.finetune.get("num_trajectories", 3) == 1:
            raise ConfigError(
                "finetune.num_trajectories is 1, over which the loss of flow.partition: vargrad is "
                "0; give 2 or more, or partition: learned"
            )
        for section, arguments in (("sft", self.sft), ("finetune", self.method_arguments)):
            _check_training_arguments(section, arguments, self.seed)
        finetune = training_arguments(self.method_arguments, "unused", self.seed)
        try:
            finetune.check_objective(self.flow)
        except ValueError as error:
            raise ConfigError(f"finetune: {error}") from error
        if self.evaluation.summed and self.collaborative.kind == "none":
            raise ConfigError(
                "collaborative.kind must be another than 'none' for evaluation.summed; got 'none'"
            )
        if self.flow.has_exact_flows and self.collaborative.kind == "none":
            raise ConfigError(
                f"collaborative.kind must be another than 'none' for flow.objective "
                f"{self.flow.objective!r}, whose reward is its score; got 'none'"
            )
        if finetune.sampler_settings.needs_scores and self.collaborative.kind == "none":
            raise ConfigError(
                f"finetune.sampler is {finetune.sampler!r}, which needs a collaborative model; "
                "with collaborative.kind: none, set finetune.sampler: random"
            )

    @property
    def method_arguments(self) -> dict[str, Any]:
        """Arguments of the method's training."""
        return {**self.sft, **self.finetune} if self.start == "scratch" else self.finetune

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
        """Read a YAML file.

        Args:
            path: the file. ``${NAME}`` in a text stands for the environment variable.
            overrides: ``"section.key=value"``, values in YAML.

        Raises:
            ConfigError: not YAML, an unknown key, a value of a wrong type, an unset variable.
        """
        values = read_yaml(path)
        for override in overrides:
            apply_override(values, override)
        return cls.from_dict(values, source=str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> RunConfig:
        """Build from nested dictionaries; see :meth:`load` for the errors."""
        built: RunConfig = _build(cls, expand(dict(values), source), source)
        return built

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready nested dictionaries."""
        return asdict(self)


_SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "collaborative": CollaborativeConfig,
    "flow": FlowSettings,
    "evaluation": EvaluationConfig,
}


_GENERATORS: dict[Any, type] = {
    "tiger": TigerConfig,
    "decoder": DecoderConfig,
    "causal": CausalConfig,
}


def _section(key: str, values: Mapping[str, Any], where: str) -> type:
    """The class of a section; the model's is named by its ``kind``."""
    if key != "model":
        return _SECTIONS[key]
    kind = values.get("kind", "tiger")
    if isinstance(kind, str) and kind in _GENERATORS:
        return _GENERATORS[kind]
    if not is_outside(kind):
        raise ConfigError(f"{where}: kind must be one of {list(_GENERATORS)}; got {shown(kind)}")
    try:
        own: type = load_outside(kind, "model.kind")
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    wanted = (OutsideGenerator, type)
    if not all(isinstance(own, each) for each in wanted) or not dataclasses.is_dataclass(own):
        raise ConfigError(
            f"{where}: kind must name a dataclass with `kind`, `build` and `summary`; got {kind!r}"
        )
    return own


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    known = {item.name: item for item in dataclasses.fields(cls)}
    hints = type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {shown(key)}{hint}")
        if cls is RunConfig and key in (*_SECTIONS, "model"):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: {key} must be a section; got {shown(value)}")
            if key == "flow":
                value = {"objective": "tb", **value}
            inside = f"{where}: {key}"
            value = _build(_section(key, value, inside), value, inside)
        elif cls is CausalConfig and key == "lora" and isinstance(value, Mapping):
            value = _build(LoraSettings, value, f"{where}: lora")
        else:
            _check_type(f"{where}: {key}", value, hints[key])
        arguments[key] = value
    if cls is RunConfig and "output_dir" not in arguments:
        raise ConfigError(f"{where}: output_dir is missing: where is the run to go?")
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_type(where: str, value: Any, annotation: Any) -> None:
    """Check a value as YAML gives it against the field's annotation."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    names = []
    for kind in kinds:
        plain = get_origin(kind) or kind
        if plain is Literal:
            if value in get_args(kind):
                return
            names.append(f"one of {list(get_args(kind))}")
            continue
        accepted = (int, float) if plain is float else plain
        if isinstance(value, accepted) and (plain is bool or not isinstance(value, bool)):
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ConfigError(f"{where} must be a number of 64 bits; got {shown(value)}")
            return
        names.append("nothing" if kind is type(None) else plain.__name__)
    raise ConfigError(f"{where} must be {' or '.join(names)}; got {shown(value)}")


def training_arguments(values: Mapping[str, Any], output_dir: str, seed: int) -> GFlowGRConfig:
    """Arguments of a training stage: the run's defaults, and ``values`` over them."""
    from ..training.config import GFlowGRConfig

    defaults: dict[str, Any] = {
        "eval_strategy": "epoch",
        "save_strategy": values.get("eval_strategy", "epoch"),
        "load_best_model_at_end": True,
        # The best one and the last one; with 1, the last one would go when the training ends.
        "save_total_limit": 2,
        "logging_steps": 10,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return GFlowGRConfig(output_dir=output_dir, seed=seed, **{**defaults, **values})


def _check_training_arguments(section: str, values: dict[str, Any], seed: int) -> None:
    from ..training.config import GFlowGRConfig

    hints = type_hints(GFlowGRConfig)
    fixed = {"output_dir", "seed", "data_seed"}
    for key, value in values.items():
        if key in fixed:
            raise ConfigError(f"{section}.{key} is set by the run itself; leave it out")
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{section}: unknown training argument {shown(key)}{hint}")
        _check_type(f"{section}.{key}", value, hints[key])
    try:
        training_arguments(values, "unused", seed)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{section}: {' '.join(str(error).split())}") from error
