"""Checkpoints: what a :class:`~gflowgr.models.GFlowModel` writes, and how it is read.

A saved model is an ordinary ``transformers`` checkpoint and a few files beside it. Of a model with
LoRA it holds the sum of weights and adapters, which loads and decodes like any other; a training
checkpoint of it holds the adapters alone, and goes on from the model that the run started with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .. import files
from ..errors import DataError
from ..tree import PrefixTree
from .flow_settings import FlowSettings
from .lora import has_lora, load_adapter, merged_copy, save_adapter
from .prompts import PromptLayout
from .sharded import load_whole_state
from .vocabulary import IdentifierVocabulary

if TYPE_CHECKING:
    from .gflow_model import GFlowModel

__all__ = ["damage_named", "load_heads", "load_weights", "read_parts", "save_model"]

_FORMAT = 1
_HEADS = ("partition", "state_flow", "fusion")


def save_model(
    model: GFlowModel,
    folder: Path,
    *,
    whole: bool = True,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``model`` to ``folder``.

    Args:
        model: the model.
        folder: made if it is not there.
        whole: the backbone, with LoRA added into its weights; else its adapters only.
        state: the weights, if they are not those of ``model`` itself: of a sharded one, whose
            state was gathered.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if whole:
        backbone = merged_copy(model.backbone) if has_lora(model.backbone) else model.backbone
        weights = None if state is None else _without_prefix(state, "backbone.")
        backbone.save_pretrained(folder, state_dict=weights)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(folder)
    else:
        save_adapter(model.backbone, folder)
    model.tree.save(folder / "tree.safetensors")
    heads = _head_state(model, state)
    if heads:
        with files.atomic_path(folder / "heads.safetensors") as path:
            save_file({name: value.contiguous() for name, value in heads.items()}, path)
    files.write_json(
        folder / "gflowgr.json",
        {
            "format": _FORMAT,
            "vocabulary": model.vocabulary.to_dict(),
            "prompt": model.prompt.to_dict(),
            "settings": asdict(model.settings),
        },
    )


def load_weights(model: GFlowModel, folder: Path) -> None:
    """Read the weights in ``folder`` into ``model``: adapters where it has them."""
    if has_lora(model.backbone):
        load_adapter(model.backbone, folder)
    else:
        backbone = type(model.backbone).from_pretrained(folder, dtype=model.backbone.dtype)
        state = backbone.state_dict()
        load_whole_state(model, {f"backbone.{name}": value for name, value in state.items()})
    load_heads(model, folder)


def read_parts(folder: Path) -> dict[str, Any]:
    """The arguments of ``GFlowModel`` in ``folder``.

    Raises:
        DataError: the folder is not a gflowgr checkpoint, of an unknown format, or damaged.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    description = folder / "gflowgr.json"
    if not description.is_file():
        raise DataError(f"{folder} is not a gflowgr checkpoint: it has no gflowgr.json")
    values: dict[str, Any] = files.read_json(description, expect=dict)
    if values.get("format") != _FORMAT:
        raise DataError(f"{description}: format {values.get('format')!r}, expected {_FORMAT}")
    try:
        parts: dict[str, Any] = {
            "vocabulary": IdentifierVocabulary.from_dict(values["vocabulary"]),
            "settings": FlowSettings(**values["settings"]),
            "prompt": PromptLayout.from_dict(values["prompt"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{description}: not what this version writes: {error!r}") from error
    if (folder / "adapter_config.json").is_file():
        raise DataError(
            f"{folder} holds adapters only: it is a checkpoint of a training, which goes on from "
            "it. The finished model is in the folder 'model' of its stage"
        )
    with damage_named(folder):
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        parts["backbone"] = auto.from_pretrained(folder, local_files_only=True)
        parts["tree"] = PrefixTree.load(folder / "tree.safetensors")
        if (folder / "tokenizer_config.json").is_file():
            parts["tokenizer"] = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return parts


@contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Turn what the libraries raise on a damaged file into a DataError that names ``folder``."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{folder}: incomplete or damaged checkpoint: {reason}") from error


def load_heads(model: GFlowModel, folder: Path) -> None:
    """Read the weights of everything beside the backbone."""
    from safetensors.torch import load_file

    mine = _head_state(model)
    if not mine:
        return
    saved = load_file(folder / "heads.safetensors")
    if saved.keys() != mine.keys():
        different = sorted(saved.keys() ^ mine.keys())
        raise RuntimeError(f"heads.safetensors and the settings disagree on {different}")
    load_whole_state(model, saved)


def _without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: v for name, v in state.items() if name.startswith(prefix)}


def _head_state(model: GFlowModel, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Weights of everything beside the backbone, by their names in the model."""
    if state is not None:
        return {name: v for name, v in state.items() if name.partition(".")[0] in _HEADS}
    found: dict[str, Tensor] = {}
    for name in _HEADS:
        module: nn.Module | None = getattr(model, name)
        if module is not None:
            found |= module.state_dict(prefix=f"{name}.")
    return found
