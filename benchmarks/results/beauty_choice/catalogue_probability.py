"""SASRec's softmax over the catalogue as a reward signal (see README.md beside this file)."""

from __future__ import annotations

from torch import Tensor

from gflowgr.rewards import SignalContext


class CatalogueProbability:
    """The collaborative model's probability of an item, times the number of items."""

    name = "r_cm"

    def __call__(self, context: SignalContext) -> Tensor:
        """[B, N], at least 1e-6."""
        assert context.scores is not None
        scores = context.scores.float()
        log_p = scores - scores.logsumexp(1, keepdim=True)
        chosen = log_p.gather(1, context.items.clamp_min(0)).exp()
        return (chosen * scores.shape[1]).clamp_min(1e-6)
