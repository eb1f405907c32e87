"""Saving and loading of a :class:`~gflowgr.models.GFlowModel`, as methods of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from .checkpoint import (
    check_manifest,
    damage_named,
    load_heads,
    load_weights,
    read_parts,
    save_model,
)
from .hub import model_folder, push_model
from .reference import Reference

if TYPE_CHECKING:
    from typing_extensions import Self

    from .gflow_model import GFlowModel

__all__ = ["SavedModel"]


class SavedModel(nn.Module):
    """What :class:`~gflowgr.models.GFlowModel` is saved and loaded with."""

    def save_pretrained(
        self, folder: Path | str, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Save an ordinary ``transformers`` checkpoint (with the tokenizer, if there is one; LoRA
        added into the weights), ``tree.safetensors``, the items' ids (``item_ids.json.gz``), the
        flow heads and the learned fusion (``heads.safetensors``) and ``gflowgr.json``; of a model
        sharded by FSDP2 its gathered ``state``.

        A model that is in the folder is replaced, other files stay. What is written holds no
        pickle and no local path, and a manifest with which :meth:`from_pretrained` checks it.
        """
        save_model(self._whole_model(), Path(folder), whole=True, state=state)

    def save_checkpoint(
        self, folder: Path | str, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Save what :meth:`load_weights` reads: with LoRA the adapters instead of the backbone;
        and the reference, if there is one (``reference.safetensors``)."""
        save_model(self._whole_model(), Path(folder), whole=False, state=state)

    def load_weights(self, folder: Path | str) -> None:
        """Load the weights that :meth:`save_checkpoint` wrote into this model, in place.

        Raises:
            DataError: the folder is damaged, or the objective needs a reference, and the folder has
                none for this model.
        """
        check_manifest(Path(folder))
        load_weights(self._whole_model(), Path(folder))
        model = self._whole_model()
        if model.settings.keeps_reference:
            model.reference = Reference.load(Path(folder), model.backbone)

    @classmethod
    def from_pretrained(
        cls,
        place: Path | str,
        *,
        revision: str | None = None,
        token: str | None = None,
        decode_only: bool = False,
    ) -> Self:
        """Load what :meth:`save_pretrained` or :meth:`push_to_hub` wrote.

        Args:
            place: a folder, or the id of a model on the hub (``"owner/name"``).
            revision: branch, tag or commit on the hub.
            token: access token of the hub; by default the stored one.
            decode_only: for search, sampling and scores; the model can neither be trained nor
                saved. One of ``build_tiger`` or ``build_decoder`` is then read without importing
                transformers, which takes seconds (:mod:`gflowgr.models.bare`).

        Raises:
            DataError: there is no such model, it is not a gflowgr checkpoint, of an unknown format,
                or damaged.
        """
        folder = model_folder(place, revision=revision, token=token)
        parts = read_parts(folder, decode_only=decode_only)
        with damage_named(folder):
            model = cls(**parts)
            load_heads(model._whole_model(), folder)
        return model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        message: str = "Upload a gflowgr model",
        state: Mapping[str, Tensor] | None = None,
    ) -> str:
        """Save the model into a repository of the hub, which is made if it is not there.

        Files of an earlier model in the repository are replaced in the same commit.

        Args:
            repo_id: ``"owner/name"``, or a name of your own.
            card: README.md; none: a card is written from the model, unless the repository has one.
            private: of a new repository; none: as its owner has set.
            token: access token; by default the stored one.
            message: of the commit.
            state: of a model sharded by FSDP2, gathered.

        Returns:
            URL of the commit.

        Raises:
            ValueError: ``repo_id`` is no id.
        """
        options: dict[str, Any] = {"card": card, "private": private, "token": token}
        return push_model(self._whole_model(), repo_id, message=message, state=state, **options)

    def _whole_model(self) -> GFlowModel:
        return cast("GFlowModel", self)
