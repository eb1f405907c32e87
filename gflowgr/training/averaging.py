"""A moving average of the weights while training, which stands in for them where it counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import DataError
from ..files import atomic_path

__all__ = ["WeightAverage"]

_FILE = "weight_average.safetensors"
_RAW, _AVERAGE = "raw.", "average."


class WeightAverage(TrainerCallback):
    """Exponential moving average of the trained weights (Polyak and Juditsky, 1992).

    After step t each average moves by ``1 - min(decay, (1 + t) / (10 + t))`` of its distance to the
    weight, so that the first weights are soon forgotten. Evaluations rank with the averages, saved
    models and checkpoints hold them, and so does the model after its training; the training itself
    goes on from the weights, which a checkpoint has in a file of their own. Costs one more copy of
    the trained weights, in float32 or wider.

    Args:
        model: whose trained parameters are averaged; not sharded.
        decay: in (0, 1); 0.999 averages over about a thousand steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        self._averages: dict[str, Tensor] | None = None  # None: not training
        self._checkpoint: Path | None = None

    def resume_from(self, checkpoint: Path | None) -> None:
        """Go on from what a checkpoint has when the training begins; None: from the model."""
        self._checkpoint, self._averages = checkpoint, None

    @torch.no_grad()
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin with the weights, or with a checkpoint's averages.

        Raises:
            DataError: the checkpoint has none, or those of another model.
        """
        if self._averages is not None:  # begun again with a smaller batch
            return
        weights = self._weights()
        if self._checkpoint is None:
            self._averages = {name: _wide(weight).clone() for name, weight in weights.items()}
            return
        saved = _load(self._checkpoint, weights)
        self._averages = {}
        for name, weight in weights.items():
            weight.copy_(saved[_RAW + name])
            self._averages[name] = saved[_AVERAGE + name].to(weight.device)

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the averages."""
        assert self._averages is not None
        done = state.global_step
        share = 1.0 - min(self.decay, (1 + done) / (10 + done))
        for name, weight in self._weights().items():
            self._averages[name].lerp_(_wide(weight), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In this block the model has the averages for weights, while it is trained."""
        if self._averages is None:
            yield
            return
        weights = self._weights()
        raw = {name: weight.detach().clone() for name, weight in weights.items()}
        self._put(self._averages)
        try:
            yield
        finally:
            self._put(raw)

    def save(self, folder: Path) -> None:
        """Write the weights and the averages into a checkpoint's folder."""
        from safetensors.torch import save_file

        assert self._averages is not None
        weights = {_RAW + name: weight.detach() for name, weight in self._weights().items()}
        both = weights | {_AVERAGE + name: value for name, value in self._averages.items()}
        with atomic_path(folder / _FILE) as temporary:
            save_file({name: value.cpu().contiguous() for name, value in both.items()}, temporary)

    def finish(self, *, keep: bool) -> None:
        """Leave the averages in the model if ``keep``, and end."""
        if keep and self._averages is not None:
            self._put(self._averages)
        self.resume_from(None)

    def _weights(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self._model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, weight in self._weights().items():
            weight.copy_(values[name])


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _load(checkpoint: Path, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = checkpoint / _FILE
    if not path.is_file():
        raise DataError(f"{path} must be there to go on with ema_decay; got a checkpoint without")
    saved = load_file(path)
    wanted = {part + name for part in (_RAW, _AVERAGE) for name in weights}
    if saved.keys() != wanted:
        raise DataError(f"{path} must have {len(wanted)} tensors of this model; got {len(saved)}")
    return saved
