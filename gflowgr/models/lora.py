"""LoRA through ``peft``, with the rows of the identifier tokens trainable.

The identifier tokens are new to the model, so their rows must train; every other row stays as it
was. ``peft``'s trainable tokens do that with a table of [identifier tokens, d] in the embedding,
and in the head: the same table where head and embedding are tied, one of its own where not. Saved
adapters and the optimiser's state hold these rows only.

Memory: a training step makes a copy of the embedding [V, d] with the rows put in, and another of
the head; and a gradient of the head of that size. (Training the whole embedding instead would hold
a second [V, d], its gradient and two moments of AdamW for good.)
"""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import files
from ..errors import MissingExtraError
from ..plain_settings import make_plain
from .vocabulary import IdentifierVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "LoraSettings",
    "add_lora",
    "check_peft",
    "has_lora",
    "load_adapter",
    "merged_copy",
    "save_adapter",
]

_ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters.

    Attributes:
        r: rank.
        alpha: the adapters are scaled by ``alpha / r``.
        dropout: dropout rate before the adapters.
        target_modules: names of the linear layers that get one; none: all but the head.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        make_plain(self, prefix="lora.")
        if self.r < 1:
            raise ValueError(f"lora.r must be >= 1; got {self.r}")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha must be > 0; got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be in [0, 1); got {self.dropout}")


def add_lora(
    model: PreTrainedModel, settings: LoraSettings, vocabulary: IdentifierVocabulary
) -> None:
    """Put adapters into ``model`` and freeze the rest, the identifier tokens' rows excepted.

    What trains is float32. The adapters' first weights come from the global generator; they change
    nothing at first.

    Args:
        model: a decoder-only model that has the identifier tokens.
        settings: the adapters.
        vocabulary: the identifier tokens.

    Raises:
        ImportError: ``peft`` is not installed.
        ValueError: the model has adapters, or none of the ``target_modules``, or they are the
            embedding or the head.
    """
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    if has_lora(model):
        raise ValueError("model has adapters already")
    rows = list(range(vocabulary.offset, vocabulary.size))
    if vocabulary.ragged:
        rows.append(vocabulary.eos_token)
    tables: list[Any] = [model.get_input_embeddings()]
    if model.get_output_embeddings().weight is not tables[0].weight:
        tables.append(model.get_output_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    for table in tables:
        name = names[id(table)].rpartition(".")[2]
        if name in (settings.target_modules or ()):
            raise ValueError(
                f"lora.target_modules has {name!r}: of embedding and head, only the identifier "
                "tokens' rows are trained; leave it out"
            )
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a ratio: peft only divides it by r
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules or "all-linear",
        trainable_token_indices={names[id(table)]: rows for table in tables},
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # 16-bit weights would lose small updates
            parameter.data = parameter.data.float()


def check_peft() -> None:
    """Raise a :class:`~gflowgr.errors.MissingExtraError` where ``peft`` is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError(
            'LoRA: this needs pip install "gflowgr[lora]" (peft is not installed)', name="peft"
        )


def has_lora(model: Any) -> bool:
    """Whether ``model`` has adapters of :func:`add_lora`."""
    return getattr(model, "peft_config", None) is not None


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapters, in ``peft``'s format, to ``folder``."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    config: Any = getattr(model, "peft_config")["default"]  # noqa: B009
    config.save_pretrained(folder)
    with files.atomic_path(folder / _ADAPTER) as path:
        save_file({name: value.contiguous() for name, value in state.items()}, path)


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Read what :func:`save_adapter` wrote into the adapters of ``model``.

    Raises:
        RuntimeError: the file's adapters are others than the model's.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    outcome: Any = set_peft_model_state_dict(model, load_file(folder / _ADAPTER))
    missing = sorted(trained & set(outcome.missing_keys))
    if missing or outcome.unexpected_keys:
        wrong = [*missing, *outcome.unexpected_keys]
        raise RuntimeError(f"{folder}: adapters of another model, such as {wrong[0]}")


def merged_copy(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary model with the adapters added into its weights; ``model`` is left as it was."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import TrainableTokensWrapper

    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, TrainableTokensWrapper):
            module.token_adapter.merge()
            _replace(plain, name, module.original_module)
        elif isinstance(module, BaseTunerLayer) and not name.endswith(".token_adapter"):
            module.merge()
            _replace(plain, name, module.get_base_layer())
    del plain.peft_config
    plain.tie_weights()
    return plain.requires_grad_(True)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
