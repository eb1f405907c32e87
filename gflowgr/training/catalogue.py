"""Rewards of the whole catalogue while training: of prompts, or of all positions of sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from ..collaborative import CollaborativeModel, score_positions
from ..data import Split
from ..models.settings import FlowSettings
from ..rewards import CatalogueReward
from ..transfer import to_device
from .config import GFlowGRConfig
from .cross_fitting import calibrate_temperature
from .step_log import Logs, Mean

__all__ = ["PromptRewards", "position_histories"]


class PromptRewards:
    """log R of every item for prompts, as the settings of an objective with exact flows say.

    Args:
        settings: of the objective.
        args: values of behaviours.
        split: validation items choose the temperature, where the settings have none.
        collaborative: scores items.

    Attributes:
        reward: with the temperature that was chosen.

    Raises:
        ValueError: there is no collaborative model, or a behaviour has no value.
    """

    def __init__(
        self,
        settings: FlowSettings,
        args: GFlowGRConfig,
        split: Split,
        collaborative: CollaborativeModel | None,
    ) -> None:
        if collaborative is None:
            raise ValueError(
                f"collaborative is required by the objective {settings.objective!r}, whose reward "
                "is its score; got None"
            )
        self.collaborative = collaborative
        temperature = settings.reward_temperature
        if temperature is None:
            temperature = calibrate_temperature(
                collaborative, split, seen=settings.seen_items, seed=args.seed
            ).temperature
        self.reward = CatalogueReward(
            settings.catalogue_signals,
            alpha=settings.observed_share,
            temperature=temperature,
            seen=settings.seen_items,
            behaviour_values=args.behaviour_values,
            behaviour_names=split.dataset.behaviour_names,
            default_value=args.default_behaviour_value,
        )

    def logs(self, prompts: int) -> Logs:
        """The temperature, which may have been chosen here, for so many prompts' log."""
        temperature = torch.tensor(self.reward.temperature)
        return {"reward_temperature": Mean(temperature, float(prompts))}

    @torch.no_grad()
    def sequence_scores(self, items: Tensor, users: Tensor, device: torch.device) -> Tensor:
        """Collaborative scores [T, catalogue] of the prompts of whole sequences, row by row.

        Args:
            items: [W, P + 1], left-aligned, -1 for padding.
            users: of the sequences [W].
            device: of the result.
        """
        scores = score_positions(self.collaborative, items[:, :-1], items[:, 1:] >= 0, users=users)
        return to_device(scores, device)

    @torch.no_grad()
    def of_sequences(
        self,
        scores: Tensor,
        items: Tensor,
        behaviours: Tensor,
        observed: Tensor | None = None,
        *,
        overwrite: bool = False,
    ) -> Tensor:
        """log R [T, catalogue] of the prompts of whole sequences, on the device of their scores.

        Args:
            scores: of :meth:`sequence_scores`.
            items: [W, P + 1], left-aligned, -1 for padding.
            behaviours: of the targets [W, P].
            observed: false for prompts without an observed item [T]; None: all have one.
            overwrite: let ``scores`` be used as working memory.
        """
        valid = items[:, 1:] >= 0
        targets = items[:, 1:][valid]
        if observed is not None:
            targets = targets.masked_fill(~observed, -1)
        histories = position_histories(items[:, :-1], valid)
        return self.of_prompts(scores, histories, targets, behaviours[valid], overwrite=overwrite)

    @torch.no_grad()
    def of_prompts(
        self,
        scores: Tensor,
        histories: Tensor,
        targets: Tensor,
        behaviours: Tensor,
        *,
        overwrite: bool = False,
    ) -> Tensor:
        """log R [B, catalogue] of prompts, nats, up to a constant of each prompt.

        On the device of their scores.

        Args:
            scores: collaborative scores [B, catalogue].
            histories: [B, H], left-aligned, -1 for padding.
            targets: the items that followed [B].
            behaviours: of the targets [B].
            overwrite: let ``scores`` be used as working memory.
        """
        values = self.reward.target_values(behaviours)
        others = (to_device(x, scores.device) for x in (histories, targets, values))
        return self.reward(scores, *others, overwrite=overwrite, normalized=False)


def position_histories(items: Tensor, valid: Tensor) -> Tensor:
    """The items up to each position [T, H], -1 after it.

    Args:
        items: [W, H], left-aligned.
        valid: true for the positions that are wanted [W, H]; T of them.
    """
    row, place = valid.nonzero(as_tuple=True)
    beyond = torch.arange(items.shape[1], device=items.device) > place.unsqueeze(1)
    return items[row].masked_fill(beyond, -1)
