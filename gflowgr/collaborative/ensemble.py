"""Several collaborative models as one: their average, and models cross-fitted by user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gflowgr.collaborative.base import (
    CollaborativeModel,
    check_score_inputs,
    load_saved,
    positions_to_score,
    save_model,
    score_positions,
)
from gflowgr.collaborative.sasrec import SASRec

__all__ = ["AverageModel", "CrossFitted", "fold_folder", "member_folder"]


class AverageModel:
    """Scores by the mean of the models' log-softmax scores over the catalogue.

    The logarithm of the geometric mean of their distributions, up to a constant per history. Each
    call costs one full scoring per model, also where few items are asked for.

    Args:
        models: at least one, all of one catalogue.

    Raises:
        ValueError: no model, or catalogues of different sizes.
    """

    KIND = "average"

    def __init__(self, models: Sequence[CollaborativeModel]) -> None:
        sizes = [model.num_items for model in models]
        if not sizes or len(set(sizes)) > 1:
            raise ValueError(f"models must be some of one catalogue; got sizes {sizes}")
        self.models = list(models)
        self.num_items = sizes[0]

    @property
    def item_embeddings(self) -> torch.Tensor:
        """The models' tables side by side, float32 [items, sum of their widths].

        Raises:
            AttributeError: a model has none.
        """
        tables = [getattr(model, "item_embeddings").detach() for model in self.models]  # noqa: B009
        return torch.cat(tables, dim=1)

    def score(self, histories: torch.Tensor, items: torch.Tensor | None = None) -> torch.Tensor:
        """See :meth:`gflowgr.collaborative.CollaborativeModel.score`."""
        check_score_inputs(histories, items, self.num_items)
        scores = self._mean(lambda model: model.score(histories))
        return scores if items is None else scores.gather(1, items.long().to(scores.device))

    def score_positions(
        self, histories: torch.Tensor, chosen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See :func:`gflowgr.collaborative.score_positions`."""
        return self._mean(lambda model: score_positions(model, histories, chosen))

    def _mean(self, scores_of: Callable[[CollaborativeModel], torch.Tensor]) -> torch.Tensor:
        total = scores_of(self.models[0]).log_softmax(-1)
        for model in self.models[1:]:
            total += scores_of(model).log_softmax(-1)
        return total.div_(len(self.models))

    def save(self, folder: str | Path) -> None:
        """Write how many models there are; each is saved in :func:`member_folder` by its
        training."""
        save_model(folder, {"kind": self.KIND, "models": len(self.models)}, {})

    @classmethod
    def load(cls, folder: str | Path) -> AverageModel:
        """Read a folder of :func:`gflowgr.training.train_average`; DataError if it is none."""
        config, _ = load_saved(folder, cls.KIND)
        return cls([SASRec.load(member_folder(folder, n)) for n in range(config["models"])])


class CrossFitted(AverageModel):
    """A model per fold of the users, each trained without the users of its fold.

    A model gives the items that it was trained on more than their due, and a generator that learns
    from its scores at training prompts would learn that. So a training prompt is scored by the
    model that has not seen its user (:meth:`score_of_users`), and any other history by the mean
    of all (:meth:`score`), whose held-out items no model has seen.

    Args:
        models: the model of each fold.
        fold_of_user: int64 [users], the fold of each user.

    Raises:
        ValueError: a fold without a model, or what :class:`AverageModel` refuses.
    """

    KIND = "cross_fitted"

    def __init__(self, models: Sequence[CollaborativeModel], fold_of_user: torch.Tensor) -> None:
        super().__init__(models)
        if fold_of_user.ndim != 1 or fold_of_user.dtype != torch.int64:
            raise ValueError(
                f"fold_of_user must be int64 [users]; got {fold_of_user.dtype} of shape "
                f"{tuple(fold_of_user.shape)}"
            )
        if not bool(((fold_of_user >= 0) & (fold_of_user < len(self.models))).all()):
            raise ValueError(f"fold_of_user must be folds 0..{len(self.models) - 1}")
        self.fold_of_user = fold_of_user

    def score_of_users(
        self, users: torch.Tensor, histories: torch.Tensor, items: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``score`` [B, items] of users' own histories, each by the model without that user.

        Args:
            users: int64 [B].
            histories, items: as in :meth:`score`.

        Raises:
            ValueError: as :meth:`score`, or a user out of range.
        """
        check_score_inputs(histories, items, self.num_items)
        folds = self._folds(users, histories)
        rows = torch.arange(len(histories))
        scores = self._by_fold(folds, rows, lambda model, part: model.score(histories[part]))
        return scores if items is None else scores.gather(1, items.long().to(scores.device))

    def score_positions_of_users(
        self, users: torch.Tensor, histories: torch.Tensor, chosen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``score_positions`` of users' own sequences, each by the model without that user."""
        where = positions_to_score(histories, chosen)
        rows = where.nonzero(as_tuple=True)[0].cpu()
        return self._by_fold(
            self._folds(users, histories),
            rows,
            lambda model, part: score_positions(model, histories[part], where[part]),
        )

    def _folds(self, users: torch.Tensor, histories: torch.Tensor) -> torch.Tensor:
        users = users.cpu()
        most = len(self.fold_of_user)
        if users.shape != histories.shape[:1] or not bool(((users >= 0) & (users < most)).all()):
            raise ValueError(
                f"users must be [B] = ({len(histories)},) of 0..{most - 1}; got {users.tolist()}"
            )
        return self.fold_of_user[users]

    def _by_fold(
        self,
        folds: torch.Tensor,
        rows: torch.Tensor,
        scores_of: Callable[[CollaborativeModel, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Scores [K, items], a row for each of ``rows``, which ascend."""
        result: torch.Tensor | None = None
        for fold, model in enumerate(self.models):
            mine = (folds == fold).nonzero()[:, 0]
            if result is not None and len(mine) == 0:
                continue
            scores = scores_of(model, mine).log_softmax(-1)
            if result is None:
                result = scores.new_empty(len(rows), self.num_items)
            result[(folds[rows] == fold).to(result.device)] = scores
        assert result is not None  # there is a model
        return result

    def save(self, folder: str | Path) -> None:
        """Write the folds; the models are saved in :func:`fold_folder` by their training."""
        config = {"kind": self.KIND, "folds": len(self.models)}
        save_model(folder, config, {"fold_of_user": self.fold_of_user})

    @classmethod
    def load(cls, folder: str | Path) -> CrossFitted:
        """Read a folder of :func:`gflowgr.training.train_cross_fitted`; DataError if it is none."""
        config, tensors = load_saved(folder, cls.KIND)
        models = [SASRec.load(fold_folder(folder, fold)) for fold in range(config["folds"])]
        return cls(models, tensors["fold_of_user"])


def fold_folder(folder: str | Path, fold: int) -> Path:
    """Where the model of a fold lies."""
    return Path(folder) / f"fold_{fold}"


def member_folder(folder: str | Path, number: int) -> Path:
    """Where a model of an average lies."""
    return Path(folder) / f"model_{number}"
