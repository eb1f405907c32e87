"""Rewards of every item of the catalogue, or of a pool, which exact flows are computed from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ..extensions import is_outside, load_outside
from ..ops import validation_enabled
from .signals import CATALOGUE_SIGNAL, InteractionLevel

__all__ = ["CatalogueReward", "CatalogueSignal", "Seen"]

Seen = Literal["zero", "keep"]
_SCORE = CATALOGUE_SIGNAL


class CatalogueSignal(Protocol):
    """A factor of the reward that is a function of the history and the item alone."""

    def log_reward(self, scores: Tensor, histories: Tensor) -> Tensor:
        """The factor's logarithm for each item [B, items]; -inf where the reward is 0.

        Args:
            scores: collaborative scores [B, items]; not to be changed.
            histories: item ids [B, H], -1 for padding.
        """
        ...


class CatalogueReward:
    """``R = (1 - alpha) p + alpha [item is the observed one] v / v_max`` for all items at once.

    ``p`` is the product of the signals, normalised over the items. The signal ``"r_cm"`` is
    ``softmax(score / temperature)``: linear in the score's exponential, and so sharp where the
    list's head is decided, other than the logarithmic r_yhat of
    :class:`~gflowgr.rewards.BehaviourAwareReward`. R sums to 1 at alpha = 0.

    Args:
        signals: ``"r_cm"``, or signals of one's own as ``"module:Class"``, each a
            :class:`CatalogueSignal` made without arguments.
        alpha: share of the observed item, in [0, 1). 0: the supervised term beside the flow loss
            has the label already.
        temperature: divides the collaborative scores, as calibrated by
            :func:`gflowgr.training.calibrate_temperature`.
        seen: reward of the items of the prompt's past: ``"zero"``, for data in which nobody comes
            back to an item, or ``"keep"``.
        behaviour_values, behaviour_names, default_value: v of each behaviour, as in
            :class:`~gflowgr.rewards.signals.InteractionLevel`; see :meth:`target_values`.

    Raises:
        ValueError: an argument is out of range, or a signal cannot be made.
    """

    def __init__(
        self,
        signals: Sequence[str] = (_SCORE,),
        alpha: float = 0.0,
        temperature: float = 1.0,
        seen: Seen = "zero",
        *,
        behaviour_values: Mapping[str, float] | None = None,
        behaviour_names: Sequence[str] = (),
        default_value: float = 10.0,
    ) -> None:
        if isinstance(signals, str) or not signals or len(set(signals)) < len(signals):
            raise ValueError(
                f"signals must be a list of different names such as ['r_cm']; got {signals!r}"
            )
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha must be in [0, 1); got {alpha}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be finite and > 0; got {temperature}")
        if seen not in get_args(Seen):
            raise ValueError(f"seen must be one of {get_args(Seen)}; got {seen!r}")
        self.signals = tuple(signals)
        self.alpha = alpha
        self.temperature = temperature
        self.seen: Seen = seen
        self._own = [(name, _load(name)) for name in signals if name != _SCORE]
        self._level = InteractionLevel(
            behaviour_values, behaviour_names, default_value=default_value
        )
        self._level.check_largest()

    def target_values(self, behaviours: Tensor) -> Tensor:
        """``v / v_max`` in [0, 1] of behaviour codes [B]; -1: not recorded, the default value."""
        return self._level.shares(behaviours)

    def __call__(
        self,
        scores: Tensor,
        histories: Tensor,
        targets: Tensor | None = None,
        target_values: Tensor | None = None,
        *,
        items: Tensor | None = None,
        overwrite: bool = False,
        normalized: bool = True,
    ) -> Tensor:
        """Log rewards, float32 [B, items], without gradients; -inf where the reward is 0.

        Reads the scores once and passes twice over the result (once with ``overwrite`` at
        temperature 1, besides the softmax's own passes).

        Args:
            scores: collaborative scores [B, items], or [B, M] of a pool.
            histories: the prompts' past, item ids [B, H], -1 for padding anywhere.
            targets: the observed items [B], -1 for a prompt without one; read if alpha > 0.
            target_values: v / v_max [B] in [0, 1] of their behaviours (see
                :meth:`target_values`); None: 1.
            items: item ids [B, M] of a pool, -1 for padding; ``p`` is then normalised over the
                pool. None: the scores are of the whole catalogue.
            overwrite: let float32 ``scores`` be used as working memory.
            normalized: False leaves out the division by the sum over the items, which changes
                log Z and no flow policy, where nothing is added to ``p`` (``alpha`` is 0 or there
                are no targets). It saves the dearest pass.

        Raises:
            ValueError: wrong shapes; with data checks on, ids out of range, an observed item that
                is not in the pool, scores that are NaN or +inf, or a prompt all of whose items
                have reward 0.
        """
        self._check(scores, histories, targets, target_values, items)
        with torch.no_grad():
            log_p = self._logits(scores, histories, items, overwrite)
            if validation_enabled():
                wrong = ~log_p.amax(1).isfinite()  # NaN is the largest of its row
                if bool(wrong.any()):
                    raise ValueError(
                        "scores must be finite, with an item of positive reward for each prompt; "
                        f"row {int(wrong.nonzero()[0])} is not so"
                    )
            observed = targets if self.alpha > 0 else None
            if normalized or observed is not None:
                log_p = F.log_softmax(log_p, dim=-1)
            if observed is not None:
                self._add_observed(log_p, observed, target_values, items)
        return log_p

    def _logits(
        self, scores: Tensor, histories: Tensor, items: Tensor | None, overwrite: bool
    ) -> Tensor:
        factors = []
        for name, signal in self._own:
            factor = signal.log_reward(scores, histories)
            if factor.shape != scores.shape:
                raise ValueError(
                    f"the signal {name!r} must be [B, items] = {tuple(scores.shape)}; "
                    f"got {tuple(factor.shape)}"
                )
            factors.append(factor)
        if _SCORE not in self.signals:
            logits = torch.zeros_like(scores, dtype=torch.float32)
        elif overwrite and scores.dtype == torch.float32:
            logits = scores if self.temperature == 1.0 else scores.div_(self.temperature)
        else:
            logits = scores.float() / self.temperature
        for factor in factors:
            logits += factor
        if self.seen == "zero":
            if items is None:
                rows, columns = (histories >= 0).nonzero(as_tuple=True)
                logits[rows, histories[rows, columns]] = -math.inf
            else:
                seen = (items[:, :, None] == histories[:, None, :]).any(-1)
                logits.masked_fill_(seen, -math.inf)
        if items is not None:
            logits.masked_fill_(items < 0, -math.inf)
        return logits

    def _add_observed(
        self, log_p: Tensor, targets: Tensor, values: Tensor | None, items: Tensor | None
    ) -> None:
        """R = (1 - alpha) p + alpha v at the observed item, (1 - alpha) p elsewhere; in place."""
        log_p += math.log1p(-self.alpha)
        if items is None:
            observed = targets >= 0
            columns = targets.clamp_min(0)[:, None]
        else:
            found = (items == targets[:, None]) & (targets >= 0)[:, None]
            observed, columns = found.any(1), found.int().argmax(1, keepdim=True)
            if validation_enabled() and bool((observed != (targets >= 0)).any()):
                row = int((observed != (targets >= 0)).nonzero()[0])
                raise ValueError(
                    f"items must hold the observed item of each prompt; got none of item "
                    f"{int(targets[row])} in row {row}"
                )
        share = torch.full_like(log_p[:, :1], self.alpha)
        if values is not None:
            share *= values[:, None]
        share.masked_fill_(~observed[:, None], 0.0)
        log_p.scatter_(1, columns, torch.logaddexp(log_p.gather(1, columns), share.log()))

    def _check(
        self,
        scores: Tensor,
        histories: Tensor,
        targets: Tensor | None,
        values: Tensor | None,
        items: Tensor | None,
    ) -> None:
        if scores.ndim != 2 or not scores.is_floating_point() or scores.shape[1] == 0:
            raise ValueError(
                "scores must be a floating-point tensor [B, items]; "
                f"got {scores.dtype} of shape {tuple(scores.shape)}"
            )
        batch = scores.shape[0]
        shapes: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
            ("histories", histories, (batch, histories.shape[-1] if histories.ndim else 0)),
            ("targets", targets, (batch,)),
            ("target_values", values, (batch,)),
            ("items", items, tuple(scores.shape)),
        ]
        for name, given, shape in shapes:
            if given is None:
                continue
            if tuple(given.shape) != shape:
                raise ValueError(f"{name} must be of shape {shape}; got {tuple(given.shape)}")
            if given.device != scores.device:
                raise ValueError(f"{name} must be on {scores.device}; got {given.device}")
        if not validation_enabled():
            return
        limit = scores.shape[1] if items is None else None
        for name, ids in (("histories", histories), ("targets", targets), ("items", items)):
            if ids is None or ids.numel() == 0:
                continue
            low, high = (int(value) for value in torch.aminmax(ids))
            if low < -1 or (limit is not None and high >= limit):
                raise ValueError(
                    f"{name} must be item ids (-1 for padding) below {limit}; "
                    f"got {low if low < -1 else high}"
                )
        if values is not None and not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"target_values must be in [0, 1]; got {values.tolist()}")


def _load(path: str) -> CatalogueSignal:
    if not is_outside(path):
        raise ValueError(f"signals must be 'r_cm' or 'module:Class'; got {path!r}")
    make = load_outside(path, "signals")
    try:
        signal: CatalogueSignal = make()
    except TypeError as error:
        raise ValueError(f"signals: cannot make {path!r}: {error}") from error
    if not callable(getattr(signal, "log_reward", None)):
        raise ValueError(f"signals: {path!r} must have `log_reward(scores, histories)`")
    return signal
