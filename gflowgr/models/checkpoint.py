"""Writing and reading the checkpoints of a :class:`~gflowgr.models.GFlowModel`.

A saved model is an ordinary ``transformers`` checkpoint and a few files beside it. Of a model with
LoRA it holds the sum of weights and adapters, which loads and decodes like any other; a training
checkpoint of it holds the adapters alone, and goes on from the model that the run started with.

A saved model holds safetensors and JSON only: no pickle, and no path of this machine. Its folder
is written anew and completed with a manifest (see :mod:`gflowgr.folders`).
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .. import files
from ..distributed import load_whole_state
from ..errors import DataError
from ..folders import MANIFEST_NAME, find_damage, fresh_folder
from ..item_ids import ITEM_IDS_FILE, ItemIds
from ..tree import PrefixTree
from .bare import read_bare
from .lora import has_lora, load_adapter, merged_copy, save_adapter
from .prompts import PromptLayout
from .settings import FlowSettings
from .vocabulary import IdentifierVocabulary

if TYPE_CHECKING:
    from .gflow_model import GFlowModel

__all__ = [
    "check_manifest",
    "damage_named",
    "load_heads",
    "load_weights",
    "read_parts",
    "save_model",
    "write_checkpoint",
]

_FORMAT = 1
_DESCRIPTION = "gflowgr.json"
_HEADS_FILE = "heads.safetensors"
# Files of models and of training checkpoints, for folders without a manifest.
_OWN = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "training_args.bin",
    _DESCRIPTION,
    ITEM_IDS_FILE,
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "adapter_model.bin",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.j*",
    "vocab.*",
    "merges.txt",
    "spiece.model",
)
_LIBRARIES_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
# Where and how the library loaded the tokenizer: facts of this machine.
_LOADING = ("is_local", "local_files_only", "name_or_path", "_name_or_path", "cache_dir", "token")
_HEADS = ("partition", "state_flow", "fusion")


def save_model(
    model: GFlowModel, folder: Path, *, whole: bool, state: Mapping[str, Tensor] | None
) -> None:
    """Write ``model`` to ``folder``, in place of a model that is there.

    Other files in the folder stay. While the files are written, the old model is there; an
    interrupted save leaves it, or at worst no ``gflowgr.json``.

    Args:
        model: the model.
        folder: made if it is not there.
        whole: the backbone, with LoRA added into its weights; else what a training checkpoint
            holds.
        state: the weights, if they are not those of ``model`` itself: of a sharded one, whose
            state was gathered.
    """
    with fresh_folder(folder, is_own=_is_own, last=(_DESCRIPTION,)) as fresh:
        if whole:
            _write_backbone(model, fresh, state)
            _write_rest(model, fresh, state)
        else:
            write_checkpoint(model, fresh, state)


def write_checkpoint(
    model: GFlowModel, folder: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write what :func:`load_weights` reads into an empty folder: with LoRA the adapters instead of
    the backbone; and the reference, if there is one (``reference.safetensors``)."""
    folder.mkdir(parents=True, exist_ok=True)
    if has_lora(model.backbone):
        save_adapter(model.backbone, folder)
    else:
        _write_backbone(model, folder, state)
    if model.reference is not None:
        model.reference.save(folder)
    _write_rest(model, folder, state)


def _write_backbone(model: GFlowModel, folder: Path, state: Mapping[str, Tensor] | None) -> None:
    backbone = merged_copy(model.backbone) if has_lora(model.backbone) else model.backbone
    weights = None if state is None else _without_prefix(state, "backbone.")
    backbone.save_pretrained(folder, state_dict=weights)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def _write_rest(model: GFlowModel, folder: Path, state: Mapping[str, Tensor] | None) -> None:
    from safetensors.torch import save_file

    model.tree.save(folder / "tree.safetensors")
    heads = _head_state(model, state)
    if heads:
        save_file({n: value.contiguous() for n, value in heads.items()}, folder / _HEADS_FILE)
    if model.item_ids is not None:
        model.item_ids.save(folder)
    remove_places(folder)
    files.write_json(
        folder / _DESCRIPTION,
        {
            "format": _FORMAT,
            "vocabulary": model.vocabulary.to_dict(),
            "prompt": model.prompt.to_dict(),
            "settings": asdict(model.settings),
        },
    )


def remove_places(folder: Path) -> None:
    """Remove the paths of this machine from the files that the libraries wrote.

    They are private, and have no meaning on another machine.
    """
    for name in _LIBRARIES_FILES:
        path = folder / name
        if path.is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
            files.write_json(path, _without_places(values))


def _without_places(value: Any, key: str = "") -> Any:
    if isinstance(value, dict) and key != "added_tokens_decoder":  # a token may look like a path
        kept = {k: each for k, each in value.items() if k not in _LOADING}
        return {k: _without_places(each, k) for k, each in kept.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value if not _is_place(each)]
    return None if _is_place(value) else value


def _is_place(value: Any) -> bool:
    """Whether a string is an absolute path, or names a file or folder that is here."""
    if not isinstance(value, str) or "\n" in value or not ("/" in value or "\\" in value):
        return False
    for path in (Path(value).expanduser(), PureWindowsPath(value)):
        if path.is_absolute() and len(path.parts) > 2:  # "/think" is a token
            return True
    return _exists(value)


def _exists(value: str) -> bool:
    try:
        return Path(value).exists()
    except (OSError, ValueError):  # too long for a path, or not a path at all
        return False


def load_weights(model: GFlowModel, folder: Path) -> None:
    """Read the weights in ``folder`` into ``model``: adapters where it has them."""
    if has_lora(model.backbone):
        load_adapter(model.backbone, folder)
    else:
        backbone = type(model.backbone).from_pretrained(folder, dtype=model.backbone.dtype)
        state = backbone.state_dict()
        load_whole_state(model, {f"backbone.{name}": value for name, value in state.items()})
    load_heads(model, folder)


def read_parts(folder: Path, *, decode_only: bool = False) -> dict[str, Any]:
    """The arguments of ``GFlowModel`` in ``folder``.

    Args:
        folder: a saved model.
        decode_only: a backbone without transformers will do, see :mod:`.bare`.

    Raises:
        DataError: the folder is not a gflowgr checkpoint, of an unknown format, or damaged.
    """
    description = folder / _DESCRIPTION
    if not description.is_file():
        raise DataError(f"{folder} is not a gflowgr checkpoint: it has no {_DESCRIPTION}")
    check_manifest(folder)
    values: dict[str, Any] = files.read_json(description, expect=dict)
    if values.get("format") != _FORMAT:
        raise DataError(f"{description}: format must be {_FORMAT}; got {values.get('format')!r}")
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
        parts["tree"] = PrefixTree.load(folder / "tree.safetensors", mmap=True)
        parts["item_ids"] = ItemIds.load(folder)
        backbone = read_bare(folder) if decode_only else None
        if backbone is None:
            parts |= _library_parts(folder)
        else:
            parts["backbone"] = backbone
    return parts


def _library_parts(folder: Path) -> dict[str, Any]:
    """The backbone, and its tokenizer if there is one, as transformers loads them."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    parts = {"backbone": auto.from_pretrained(folder, local_files_only=True)}
    if (folder / "tokenizer_config.json").is_file():
        parts["tokenizer"] = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return parts


def check_manifest(folder: Path) -> None:
    """Check a saved model by its manifest; earlier versions wrote none.

    Raises:
        DataError: a file is missing, cut or changed.
    """
    damage = find_damage(folder) if (folder / MANIFEST_NAME).is_file() else None
    if damage is not None:
        raise DataError(
            f"{folder}: incomplete or damaged checkpoint: {damage}. (If you changed the file on "
            f"purpose, delete {MANIFEST_NAME})"
        )


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
    saved = load_file(folder / _HEADS_FILE)
    if saved.keys() != mine.keys():
        different = sorted(saved.keys() ^ mine.keys())
        raise RuntimeError(f"heads.safetensors and the settings disagree on {different}")
    load_whole_state(model, saved)


def _is_own(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _OWN)


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
