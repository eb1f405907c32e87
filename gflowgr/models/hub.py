"""Models on the Hugging Face hub: found by their id, and pushed with a model card."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from .gflow_model import GFlowModel

__all__ = ["model_card", "model_folder", "push_model"]

_NAME = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(f"{_NAME}/{_NAME}")
# No pickles, and nothing that a model runs without.
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
# Files of an earlier model in the repository must not be read with this one.
_REPLACED = ("*.json", "*.safetensors", "*.bin", "*.jinja", "*.txt", "*.model")


def model_folder(
    place: Path | str, *, revision: str | None = None, token: str | None = None
) -> Path:
    """The folder of a model: ``place`` itself, or the local copy of what the hub has by this id.

    Args:
        place: a folder, or the id of a repository of the hub, as ``"owner/name"``. A folder of this
            name comes first.
        revision: branch, tag or commit; only for an id.
        token: access token; by default the one that ``hf auth login`` has stored.

    Raises:
        DataError: it is neither, or the hub cannot be asked.
    """
    folder = Path(place)
    if folder.is_dir():
        return folder
    if isinstance(place, Path) or _ID.fullmatch(place) is None:
        raise DataError(f"{place} is not a folder, nor the id of a model on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            place, revision=revision, token=token, allow_patterns=list(_FILES)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{place} is not a folder, and the hub did not give a model of this id (offline with "
            f"HF_HUB_OFFLINE=1, which the gflowgr command sets unless it is 0): {reason}"
        ) from error
    return Path(found)


def push_model(
    model: GFlowModel,
    repo_id: str,
    *,
    card: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload a gflowgr model",
    state: Mapping[str, Tensor] | None = None,
) -> str:
    """Save ``model`` into a repository of the hub; see :meth:`GFlowModel.push_to_hub`."""
    from huggingface_hub import HfApi

    if re.fullmatch(f"({_NAME}/)?{_NAME}", repo_id) is None:
        raise ValueError(f'repo_id must be "owner/name" or "name"; got {repo_id!r}')
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        model.save_pretrained(folder, state)  # whole, before anything is made on the hub
        found = api.create_repo(repo_id, private=private, exist_ok=True)
        full: str = found.repo_id
        if card is not None or not api.file_exists(full, "README.md"):
            text = model_card(model, full) if card is None else card
            (folder / "README.md").write_text(text, encoding="utf-8")
        done = api.upload_folder(
            repo_id=full,
            folder_path=folder,
            commit_message=message,
            delete_patterns=list(_REPLACED),
        )
    return str(done.commit_url)


def model_card(model: GFlowModel, repo_id: str) -> str:
    """A card (Markdown with a header of metadata): what the model is, and how it is used.

    Holds no metrics: they belong to a data set and a protocol, which a model does not know.
    """
    settings, tree, vocabulary = model.settings, model.tree, model.vocabulary
    config: Any = model.backbone.config
    header: dict[str, Any] = {"library_name": "gflowgr", "tags": _tags(settings.objective)}
    base = str(getattr(config, "_name_or_path", "") or "")
    # Name the backbone by a hub id only: a path of this machine is private.
    if _ID.fullmatch(base) and not Path(base).exists():
        header["base_model"] = base
    parameters = sum(p.numel() for p in model.backbone.parameters())
    facts = {
        "backbone": f"{type(model.backbone).__name__}, {parameters:,} parameters",
        "objective": settings.label,
        "softmax": f"over {settings.normalize}",
        "items": f"{tree.num_items:,}, with {tree.num_leaves:,} distinct identifiers",
        "codebooks": " x ".join(f"{size:,}" for size in vocabulary.codebook_sizes),
        "longest history": f"{settings.max_history} items",
    }
    if settings.objective != "sft":
        exact = settings.has_exact_flows
        signals = settings.catalogue_signals if exact else settings.signals
        facts["reward signals"] = ", ".join(signals)
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    # JSON is YAML, and quotes what has to be quoted.
    metadata = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    return f"""---
{metadata}
---

# {repo_id}

A generative recommender, trained with `gflowgr` (GFlowGR, arXiv 2506.16114): from the items of a
history it generates the identifier of the next one, token by token, and constrained to the
catalogue's identifiers.

| | |
|---|---|
{rows}

## Use

```python
import gflowgr

model = gflowgr.GFlowModel.from_pretrained("{repo_id}")
recommender = gflowgr.GenerativeRecommender(model)
items = recommender.recommend([[12, 7, 105]], 10)  # item ids of the catalogue it was trained on
```

## Limits

It knows the items of its catalogue, by their ids, and no others: the identifiers are in
`tree.safetensors`. Its weights are an ordinary `transformers` checkpoint, without pickles.
"""


def _tags(objective: str) -> list[str]:
    tags = ["recommendation", "generative-recommendation"]
    return tags if objective == "sft" else [*tags, "gflowgr", objective]
