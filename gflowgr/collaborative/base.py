"""The scorer protocol, and what all collaborative models share: input checks and files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from gflowgr import files
from gflowgr.errors import DataError

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


@runtime_checkable
class CollaborativeModel(Protocol):
    """Anything that scores items for users' histories.

    ``score`` is a pure function of its arguments (no dropout, no randomness), so that samplers and
    rewards can be replayed. Higher is better; the scale is the model's own.
    """

    num_items: int

    def score(self, histories: torch.Tensor, items: torch.Tensor | None = None) -> torch.Tensor:
        """Score items for each history.

        Args:
            histories: int64 [B, H], item ids, oldest first, left-aligned, padded with -1. A row of
                -1 only is an empty history.
            items: int64 [B, M], the items to score, or None for the whole catalogue.

        Returns:
            float32 [B, M], or [B, num_items] when ``items`` is None.

        Raises:
            ValueError: wrong shape or dtype, an item id out of range, padding before an item.
        """
        ...


def check_score_inputs(
    histories: torch.Tensor, items: torch.Tensor | None, num_items: int
) -> torch.Tensor:
    """Check the arguments of ``score`` and return the histories' lengths, int64 [B].

    Raises:
        ValueError: as documented at :meth:`CollaborativeModel.score`.
    """
    _check_ids("histories", histories, num_items, low=-1)
    real = histories >= 0
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        row = int((real[:, 1:] & ~real[:, :-1]).any(1).nonzero()[0])
        raise ValueError(
            f"histories[{row}] = {histories[row].tolist()}: padding (-1) stands before an item; "
            "histories must be left-aligned"
        )
    if items is not None:
        _check_ids("items", items, num_items, low=0)
        if items.shape[0] != histories.shape[0]:
            raise ValueError(
                f"items has {items.shape[0]} rows, histories has {histories.shape[0]}; "
                "they must be equal"
            )
    return real.sum(1)


def _check_ids(name: str, ids: torch.Tensor, num_items: int, low: int) -> None:
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name} must be an int64 tensor of two dimensions; "
            f"got {ids.dtype} of shape {tuple(ids.shape)}"
        )
    if ids.numel() == 0:
        return
    smallest, largest = (int(value) for value in torch.aminmax(ids))
    if smallest < low or largest >= num_items:
        wrong = smallest if smallest < low else largest
        row, column = (ids == wrong).nonzero()[0].tolist()
        raise ValueError(
            f"{name}[{row}, {column}] must be an item id, {low} to {num_items - 1}; got {wrong}"
        )


def save_model(
    folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write ``config.json`` and ``model.safetensors``, each whole or not at all."""
    from safetensors.torch import save_file

    folder = Path(folder)
    files.ensure_writable(folder)
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with files.atomic_path(folder / WEIGHTS_NAME) as temporary:
        save_file(plain, temporary)
    files.write_json(folder / CONFIG_NAME, dict(config))


def load_saved(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read what :func:`save_model` wrote.

    Raises:
        DataError: a file is missing or broken, or holds a model of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    config = _read_config(folder)
    if config.get("kind") != kind:
        raise DataError(
            f"{folder / CONFIG_NAME}: kind must be {kind!r}; got {config.get('kind')!r}"
        )
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise DataError(f"{weights} must be the weights of a {kind} model; it does not exist")
    try:
        return config, load_file(weights)
    except SafetensorError as error:
        raise DataError(f"{weights} is not a readable safetensors file: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise DataError(f"{folder} must be a folder written by save(); {path} does not exist")
    config = files.read_json(path)
    if not isinstance(config, dict):
        raise DataError(f"{path}: the top level must be an object; got {type(config).__name__}")
    return config


def positions_to_score(histories: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    """The real positions among the chosen ones, bool [W, H]; None: all real ones.

    Raises:
        ValueError: ``chosen`` is not a bool tensor of the histories' shape.
    """
    real = histories >= 0
    if chosen is None:
        return real
    if chosen.dtype != torch.bool or chosen.shape != histories.shape:
        raise ValueError(
            f"chosen must be a bool tensor of shape {tuple(histories.shape)}; "
            f"got {chosen.dtype} of shape {tuple(chosen.shape)}"
        )
    return real & chosen


def score_training_prompts(
    model: CollaborativeModel, users: torch.Tensor, histories: torch.Tensor
) -> torch.Tensor:
    """Score the whole catalogue for prompts that the model may have been trained on.

    A model that was fitted without some of its users
    (:class:`~gflowgr.collaborative.CrossFitted`) scores each by the part that has not seen them;
    of other models it is ``model.score``.

    Args:
        model: the model.
        users: int64 [B], whose prompts they are.
        histories: int64 [B, H], as of ``model.score``.

    Returns:
        float32 [B, num_items].

    Raises:
        ValueError: as ``model.score``, or a user out of range.
    """
    of_users: Callable[..., torch.Tensor] | None = getattr(model, "score_of_users", None)
    return model.score(histories) if of_users is None else of_users(users, histories)


def score_positions(
    model: CollaborativeModel,
    histories: torch.Tensor,
    chosen: torch.Tensor | None = None,
    *,
    users: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score the whole catalogue after each prefix of whole sequences.

    Position p of a row scores what follows ``histories[row, :p + 1]``, as ``model.score`` of that
    prefix does. A model with a method ``score_positions(histories, chosen)`` does so in one pass
    over the sequences; of any other, every prefix is scored by itself.

    Args:
        model: the model.
        histories: int64 [W, H], item ids, oldest first, left-aligned, padded with -1 on the right.
        chosen: bool [W, H], the positions to score; padding is never scored. None: all real ones.
        users: int64 [W], of whom the rows are. A model that was fitted without some of its users
            (:class:`~gflowgr.collaborative.CrossFitted`) then scores each by the part that has
            not seen them, as it must for training prompts; other models do not look at it.

    Returns:
        float32 [K, num_items], a row for each scored position, in row-major order.

    Raises:
        ValueError: as ``model.score``, or ``chosen`` or ``users`` of a wrong shape.
    """
    if users is not None and users.shape != histories.shape[:1]:
        raise ValueError(
            f"users must be of shape {tuple(histories.shape[:1])}; got {tuple(users.shape)}"
        )
    of_users: Callable[..., torch.Tensor] | None
    of_users = getattr(model, "score_positions_of_users", None)
    if users is not None and of_users is not None:
        return of_users(users, histories, chosen)
    in_one_pass: Callable[..., torch.Tensor] | None = getattr(model, "score_positions", None)
    if in_one_pass is not None:
        return in_one_pass(histories, chosen)
    rows, places = positions_to_score(histories, chosen).nonzero(as_tuple=True)
    later = torch.arange(histories.shape[1], device=histories.device) > places[:, None]
    return model.score(histories[rows].masked_fill(later, -1))
