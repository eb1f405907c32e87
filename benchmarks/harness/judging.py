"""Checks of searches and tree operations against references in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.checking import Check, relative_error

SCORE_TOLERANCE = 1e-5
"""Largest error of a score in nats; candidates whose scores differ by less may change places."""


class Ranking(NamedTuple):
    """The best candidates of each row, best first.

    Attributes:
        keys: what they are, int64 [R, K]; any number where the score is -inf.
        scores: log-probabilities [R, K], -inf = empty; None: not returned.
    """

    keys: Tensor
    scores: Tensor | None


def judge_rankings(found: Ranking, wanted: Ranking, tolerance: float = SCORE_TOLERANCE) -> Check:
    """The same candidates in the same order, scores within the tolerance (nats).

    A candidate that the reference lacks passes only beside the last rank's score: there it may be
    as good as the reference's.
    """
    assert wanted.scores is not None
    if found.keys.shape != wanted.keys.shape:
        return Check("wrong", f"shape {tuple(found.keys.shape)}, not {tuple(wanted.keys.shape)}")
    target = wanted.scores.double()
    there = target > -torch.inf
    error = 0.0
    if found.scores is not None:
        if not torch.equal(found.scores > -torch.inf, there):
            return Check("wrong", "other numbers of candidates than in the reference")
        difference = torch.where(there, found.scores.double() - target, 0.0).abs()
        error = float(difference.max())
    match = found.keys.unsqueeze(-1) == wanted.keys.unsqueeze(-2)  # [R, K found, K wanted]
    match &= there.unsqueeze(-1) & there.unsqueeze(-2)
    if bool((match.sum(1) > 1).any()):
        return Check("wrong", "a candidate is found twice", error)
    known = match.any(-1)
    own = torch.where(match, target.unsqueeze(-2), -torch.inf).amax(-1)
    last = torch.where(there, target, torch.inf).amin(-1, keepdim=True)
    away = torch.where(known, own, last) - target
    places = int((away.abs() > tolerance)[there].sum())
    # `not <=`, so that NaN is wrong too.
    if not error <= tolerance:
        return Check("wrong", f"a score is off by {error:.2g}, over {tolerance:g}", error)
    if places:
        return Check("wrong", f"{places} of {int(there.sum())} candidates are others", error)
    return Check("ok", result_error=error)


def judge_scores(found: Ranking, wanted: Ranking, tolerance: float) -> Check:
    """Candidates as good as the reference's, rank by rank; they may be others.

    For whole searches in 16 bits: a beam that rounding drops early leaves others below it. What
    returns no scores is not judged by them.
    """
    assert wanted.scores is not None
    if found.keys.shape != wanted.keys.shape:
        return Check("wrong", f"shape {tuple(found.keys.shape)}, not {tuple(wanted.keys.shape)}")
    if found.scores is None:
        return Check("ok")
    there = wanted.scores > -torch.inf
    if not torch.equal(found.scores > -torch.inf, there):
        return Check("wrong", "other numbers of candidates than in the reference")
    difference = found.scores.double() - wanted.scores.double()
    error = float(torch.where(there, difference, 0.0).abs().max())
    if not error <= tolerance:
        return Check("wrong", f"a score is off by {error:.2g}, over {tolerance:g}", error)
    return Check("ok", result_error=error)


def judge_numbers(found: Tensor, wanted: Tensor, tolerance: float) -> Check:
    """Numbers by relative error in norm."""
    error = relative_error(found, wanted)
    if not error <= tolerance:
        return Check("wrong", f"relative error over {tolerance:g}: {error:.2g}", error)
    return Check("ok", result_error=error)


def judge_equal(found: Tensor, wanted: Tensor) -> Check:
    """Equal in every element."""
    if found.shape != wanted.shape:
        return Check("wrong", f"shape {tuple(found.shape)}, not {tuple(wanted.shape)}")
    count = int((found != wanted).sum())
    if count:
        return Check("wrong", f"{count} of {wanted.numel()} elements differ")
    return Check("ok", result_error=0.0)
