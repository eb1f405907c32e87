"""Beam searches of one shape after another: their steps as a CUDA graph that is replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..models.backbone import real_prompt
from ..models.normalization import chosen_normalize
from ..models.settings import Normalize
from ..models.wrapped import unwrapped
from ..ops.checks import values_looked_at
from ..tree import PrefixTree
from ..tree.admissible import Admissible, admissible_for, check_rules
from .beam import BeamSearchOutput, Search, check_scores, check_search
from .decoders import StepDecoder, decoder_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["GraphedSearch", "capture"]

Shape = tuple[int, int, int | None]
"""Prompts, tokens of a prompt, excluded items of a prompt."""
Answer = tuple[BeamSearchOutput, Tensor]


class GraphedSearch:
    """:func:`constrained_beam_search` for many calls with one model and one catalogue.

    A step of a search is hundreds of small kernels, and at few prompts launching them takes longer
    than running them. Here the steps from the read prompt to the items are captured once for each
    shape, in a CUDA graph with its own memory for keys, values and beams, and then replayed.
    Reading the prompts runs as always. On a CPU the same steps run one by one.

    So that few shapes occur, prompts are padded on the left to a multiple of ``multiple`` tokens,
    their number to a power of two (by copies of the first), and ``exclude`` likewise. Each shape
    keeps the keys and values of its prompts; all share the memory of their steps.

    A graph reads the parameters where they were: after a change in place it finds the new values,
    but for other parameters, another tree or stock make a new object.

    Args:
        model: in ``eval`` mode; one that is decoded step by step
            (:func:`gflowgr.decoding.decoders.decoder_for`), on the tree's device.
        tree, num_beams, num_return, normalize, temperature, available: those of
            :func:`constrained_beam_search`.
        multiple: tokens that a prompt's length is rounded up to.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel | Any,
        tree: PrefixTree,
        *,
        num_beams: int = 20,
        num_return: int | None = None,
        normalize: Normalize | None = None,
        temperature: float = 1.0,
        available: Tensor | None = None,
        multiple: int = 64,
    ) -> None:
        if multiple < 1:
            raise ValueError(f"multiple must be >= 1; got {multiple}")
        self.model, self.tree, self.multiple = unwrapped(model), tree, multiple
        self.num_beams, self.num_return = num_beams, num_return
        self.normalize = chosen_normalize(self.model, normalize)
        self.temperature, self.available = temperature, available
        self._kept: dict[Shape, _Kept] = {}
        self._pool = None if tree.device.type != "cuda" else torch.cuda.graph_pool_handle()

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        exclude: Tensor | None = None,
    ) -> BeamSearchOutput:
        """The best items of each prompt: those of :func:`constrained_beam_search`, to rounding.

        Args:
            input_ids: prompts [B, S].
            attention_mask: 1 for real tokens [B, S]; None: every token is real.
            exclude: items that a prompt may not get [B, E], -1 for padding.

        Raises:
            TypeError: ``exclude`` is not of integers, or ``available`` not bool.
            ValueError: an argument is of a wrong shape, or the model is decoded by whole sequences.
            FloatingPointError: the model's scores are NaN, with data checks on.
        """
        ids, mask = real_prompt(self.model, input_ids, attention_mask)
        options = (self.num_beams, self.num_return, self.normalize, self.temperature)
        check_search(ids, self.tree, *options)
        count, tree = ids.shape[0], self.tree
        if count == 0:
            raise ValueError("input_ids must hold a prompt; got none")
        check_rules(tree, count, self.available, exclude, values_looked_at())
        ids, mask, exclude = self._padded(ids, mask, exclude)
        rules = admissible_for(tree, len(ids), self.available, exclude, look=False, static=True)
        decoder = decoder_for(self.model, ids, mask)
        shape = (*ids.shape, None if exclude is None else exclude.shape[1])
        kept = self._kept.get(shape)
        if kept is None:
            kept = self._kept[shape] = self._keep(decoder, rules)
        else:
            for ours, given in zip(kept.inputs, _inputs(decoder, rules), strict=True):
                ours.copy_(given)
        found, nan = kept.replay()
        check_scores(nan[:count])
        return BeamSearchOutput(
            *(part[:count].clone() for part in (found.items, found.scores, found.tokens))
        )

    def _padded(
        self, ids: Tensor, mask: Tensor, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = _power_of_two(len(ids))
        more = -ids.shape[1] % self.multiple
        again = torch.arange(rows, device=ids.device)
        again = torch.where(again < len(ids), again, 0)
        ids, mask = (pad(part, (more, 0))[again] for part in (ids, mask))
        if exclude is not None:
            wider = _power_of_two(exclude.shape[1]) - exclude.shape[1]
            exclude = pad(exclude, (0, wider), value=-1)[again]
        return ids, mask, exclude

    def _keep(self, decoder: StepDecoder, rules: Admissible) -> _Kept:
        count = self.num_beams if self.num_return is None else self.num_return
        options = (self.num_beams, self.normalize, self.temperature)

        def work() -> Answer:
            return Search(decoder.fork(), self.tree, rules, *options).answer(count)

        inputs = _inputs(decoder, rules)
        if decoder.device.type != "cuda":
            return _Kept(inputs, work)
        replay, answer = capture(work, self._pool)

        def again() -> Answer:
            replay()
            return answer

        return _Kept(inputs, again)


def capture(work: Callable[[], Any], pool: Any = None) -> tuple[Callable[[], None], Any]:
    """A CUDA graph of some work, which runs once before, on a stream of its own.

    Args:
        work: reads nothing back; reads and writes the same memory in every replay.
        pool: of ``torch.cuda.graph_pool_handle``, shared by graphs of which one runs at a time.

    Returns:
        What replays the work, and its result, which each replay overwrites.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = work()
    return graph.replay, result


@dataclass(frozen=True)
class _Kept:
    """The steps of one shape: the tensors that they read, and what runs them."""

    inputs: list[Tensor]
    replay: Callable[[], Answer]


def _inputs(decoder: StepDecoder, rules: Admissible) -> list[Tensor]:
    """What differs between two calls of one shape."""
    barred = (rules.barred_items, rules.barred_leaves, rules.barred_nodes)
    return [*decoder.prompt_tensors(), *(pairs.keys for pairs in barred if pairs is not None)]


def _power_of_two(count: int) -> int:
    """The least that is not below ``count``; 1 for none."""
    return 1 << max(0, count - 1).bit_length()
