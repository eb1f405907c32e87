"""What a training reads: examples, their batches, and the model's inputs made of these."""

from __future__ import annotations

from typing import Any

from ..collaborative import CollaborativeModel
from ..data import Split
from ..models.gflow_model import GFlowModel
from ..samplers import MakeSampler
from .batches import PromptCollator
from .config import GFlowGRConfig
from .flow_inputs import FlowInputs
from .sequences import SequenceCollator, SequenceExamples, SequenceInputs

__all__ = ["make_inputs"]


def make_inputs(
    model: GFlowModel,
    args: GFlowGRConfig,
    split: Split,
    collaborative: CollaborativeModel | None,
    sampler: MakeSampler | None = None,
) -> tuple[FlowInputs | SequenceInputs, Any, PromptCollator | SequenceCollator]:
    """Whole sequences if the configuration asks for them, else prompts.

    Args:
        model: for its tree, prompts and settings.
        args: configuration.
        split: the data.
        collaborative: scores items; optional where nothing reads scores.
        sampler: makes the sampler, in place of the one that ``args`` name.

    Returns:
        What makes the model's inputs of a batch, the examples (with their ``lengths``), and what
        makes batches of examples.
    """
    max_history, layout = model.settings.max_history, model.prompt
    if args.sequences:
        of_sequences = SequenceInputs(model, args, split, collaborative, sampler)
        item_tokens = of_sequences.item_tokens.cpu()
        examples = SequenceExamples(split, max_history)
        return of_sequences, examples, SequenceCollator(item_tokens, layout)
    of_prompts = FlowInputs(model, args, split, collaborative, sampler)
    item_tokens = of_prompts.item_tokens.cpu()
    return of_prompts, split.train, PromptCollator(item_tokens, max_history, layout)
