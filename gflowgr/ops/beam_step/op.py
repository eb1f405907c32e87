"""``gflowgr::beam_step`` and ``beam_step_hidden``: one step of a beam search down a prefix tree.

Only the children of the beams' nodes are candidates. The references are plain PyTorch, in
:mod:`gflowgr.ops.beam_step.reference`; the fast backends are ``csrc/beam_step/beam_step_cpu.cpp``
and ``csrc/beam_step/beam_step.cu``. Nothing here has a gradient.

Notation: B prompts, K beams each, vocabulary V, width d of the model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gflowgr import backends
from gflowgr.ops import transforms
from gflowgr.ops.beam_step.reference import Outputs, step_hidden_reference, step_reference
from gflowgr.ops.checks import FLOAT_DTYPES, NORMALIZERS, check_choice, check_number, check_tensor
from gflowgr.ops.precision import compute_dtype
from gflowgr.tree import PrefixTree
from gflowgr.tree.facts import check_head, tree_facts

__all__ = ["BeamStep", "beam_step", "beam_step_hidden"]


class BeamStep(NamedTuple):
    """The beams a step keeps of each prompt, best first; empty slots last: score -inf, else -1.

    Order: score descending, then parent ascending, then token ascending (= order of the tree). A
    NaN comes before every number.

    Attributes:
        scores: log-probabilities of the prefixes that can be continued [B, width], float32.
        parents: the beams they continue [B, width], int64.
        tokens: their last tokens [B, width], int64.
        nodes: their nodes [B, width], int64.
        end_scores: log-probabilities of the identifiers that end here [B, width], float32.
        end_nodes: their nodes [B, width], int64.
        end_parents: the beams they complete [B, width], int64.
    """

    scores: Tensor
    parents: Tensor
    tokens: Tensor
    nodes: Tensor
    end_scores: Tensor
    end_nodes: Tensor
    end_parents: Tensor


def beam_step(
    logits: Tensor,
    scores: Tensor,
    nodes: Tensor,
    tree: PrefixTree,
    *,
    width: int,
    normalize: str = "children",
    temperature: float = 1.0,
    live: Tensor | None = None,
    barred: Tensor | None = None,
    live_leaves: Tensor | None = None,
    barred_leaves: Tensor | None = None,
) -> BeamStep:
    """Extend every beam by the children of its node and keep each prompt's best.

    A child scores ``scores + log_softmax(logits / temperature)[token]``. A child with logit -inf is
    no candidate, whatever the normaliser. A node that can be continued and also ends an identifier
    is listed in both kinds of output.

    Args:
        logits: the model's logits of the next token [B, K, V], of any floating dtype. float64 is
            computed in float64, by the reference.
        scores: log-probabilities of the beams [B, K], float32; -inf = empty beam.
        nodes: nodes of the beams [B, K], int64, of any depth; -1 = empty beam.
        tree: the prefix tree, on the device of ``logits``.
        width: how many to keep of each kind, at least 1.
        normalize: softmax over "children" (the node's, admissible or not), "vocab" (all V) or
            "level" (the codebook of the token's position, see :attr:`PrefixTree.codebooks`).
        temperature: divides the logits, > 0.
        live: nodes with an available item at or below them, bool [num_nodes]
            (:meth:`PrefixTree.available_nodes`); None = all.
        barred: nodes barred for one prompt, sorted int64 keys ``prompt * num_nodes + node``.
        live_leaves: identifiers with an available item, bool [num_leaves]; needed beside ``live``
            only where an identifier may be a prefix of another.
        barred_leaves: identifiers barred for one prompt, sorted int64 keys
            ``prompt * num_leaves + leaf``; needed beside ``barred`` in the same case.

    A prefix that ends an identifier can be continued only if one of its children is admissible.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or range.
    """
    batch, beams = _check_logits(logits, tree)
    _check_beams(scores, nodes, batch, beams, logits.device)
    temperature = _check_options(normalize, temperature, width)
    _check_masks(tree, live, barred, live_leaves, barred_leaves)
    transforms.refuse("beam_step", logits, scores, nodes)
    found = torch.ops.gflowgr.beam_step(
        logits,
        scores,
        nodes,
        tree.buffer,
        normalize,
        temperature,
        live,
        barred,
        width,
        live_leaves,
        barred_leaves,
    )
    return BeamStep(*found)


def beam_step_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scores: Tensor,
    nodes: Tensor,
    tree: PrefixTree,
    *,
    width: int,
    normalize: str = "children",
    temperature: float = 1.0,
    live: Tensor | None = None,
    barred: Tensor | None = None,
    live_leaves: Tensor | None = None,
    barred_leaves: Tensor | None = None,
) -> BeamStep:
    """:func:`beam_step` of ``hidden @ weight.T + bias``, without logits where they are not needed.

    With "children" and "level" only the rows of the head that the normaliser needs are multiplied,
    in float32. With "vocab" the logits are formed, in the dtype of the inputs.

    Args:
        hidden: states that predict the next token [B, K, d], of any floating dtype.
        weight: the output head [V, d], of the same kinds.
        bias: [V], or None.

    Other arguments, the result and errors: as for :func:`beam_step`.
    """
    device = hidden.device if isinstance(hidden, Tensor) else None
    check_tensor("hidden", hidden, (None, None, None), "BKd", dtypes=FLOAT_DTYPES)
    batch, beams, size = hidden.shape
    check_tensor(
        "weight", weight, (None, size), "Vd", dtypes=FLOAT_DTYPES, device=device, source="hidden"
    )
    if bias is not None:
        check_tensor(
            "bias",
            bias,
            weight.shape[:1],
            "V",
            dtypes=FLOAT_DTYPES,
            device=device,
            source="weight",
        )
    _check_tree(tree, weight.shape[0], "weight has", hidden.device)
    _check_beams(scores, nodes, batch, beams, hidden.device)
    temperature = _check_options(normalize, temperature, width)
    _check_masks(tree, live, barred, live_leaves, barred_leaves)
    transforms.refuse("beam_step_hidden", hidden, weight, bias, scores, nodes)
    found = torch.ops.gflowgr.beam_step_hidden(
        hidden,
        weight,
        bias,
        scores,
        nodes,
        tree.buffer,
        normalize,
        temperature,
        live,
        barred,
        width,
        live_leaves,
        barred_leaves,
    )
    return BeamStep(*found)


# ---------------------------------------------------------------------- checks


def _check_logits(logits: Tensor, tree: PrefixTree) -> tuple[int, int]:
    check_tensor("logits", logits, (None, None, None), "BKV", dtypes=FLOAT_DTYPES)
    _check_tree(tree, logits.shape[2], "logits has", logits.device)
    return logits.shape[0], logits.shape[1]


def _check_tree(tree: PrefixTree, vocab_size: int, what: str, device: torch.device) -> None:
    if not isinstance(tree, PrefixTree):
        raise TypeError(f"tree must be a gflowgr.PrefixTree; got {type(tree).__name__}")
    if tree.device != device:
        raise ValueError(f"tree is on {tree.device}, the other tensors are on {device}")
    if tree.vocab_size > vocab_size:
        raise ValueError(
            f"{what} V = {vocab_size}, but the tree holds tokens up to {tree.vocab_size - 1}"
        )


def _check_beams(
    scores: Tensor, nodes: Tensor, batch: int, beams: int, device: torch.device
) -> None:
    for name, value, dtype in (("scores", scores, torch.float32), ("nodes", nodes, torch.int64)):
        check_tensor(
            name, value, (batch, beams), "BK", dtypes=(dtype,), device=device, source="logits"
        )


def _check_options(normalize: str, temperature: float, width: int) -> float:
    if isinstance(width, bool) or not isinstance(width, int):
        raise TypeError(f"width must be an integer; got {type(width).__name__}")
    if width < 1:
        raise ValueError(f"width must be at least 1; got {width}")
    check_choice("normalize", normalize, NORMALIZERS)
    return check_number("temperature", temperature, above=0.0)


def _check_masks(
    tree: PrefixTree,
    live: Tensor | None,
    barred: Tensor | None,
    live_leaves: Tensor | None,
    barred_leaves: Tensor | None,
) -> None:
    for name, mask, size in (
        ("live", live, tree.num_nodes),
        ("live_leaves", live_leaves, tree.num_leaves),
    ):
        if mask is not None:
            check_tensor(
                name, mask, (size,), "N", dtypes=(torch.bool,), device=tree.device, source="tree"
            )
    for name, keys in (("barred", barred), ("barred_leaves", barred_leaves)):
        if keys is not None:
            check_tensor(
                name, keys, (None,), "P", dtypes=(torch.int64,), device=tree.device, source="tree"
            )


# ---------------------------------------------------------------------- the ops


def _ends(normalize: str, tree: Tensor, name: str) -> Tensor | None:
    """Ends of the codebooks, on the device the backend reads them from; None if it reads none."""
    if normalize != "level":
        return None
    facts = tree_facts(tree)
    return facts.codebook_ends_here if name == "cuda" else facts.codebook_ends


def _beam_step(
    logits: Tensor,
    scores: Tensor,
    nodes: Tensor,
    tree: Tensor,
    normalize: str,
    temperature: float,
    live: Tensor | None,
    barred: Tensor | None,
    width: int,
    live_leaves: Tensor | None = None,
    barred_leaves: Tensor | None = None,
) -> Outputs:
    check_head(tree, logits.shape[2], "logits")
    options = (normalize, temperature, live, barred, width, live_leaves, barred_leaves)
    name = backends.resolve("beam_step", logits.device, logits.dtype)
    if name == "torch":
        return step_reference(logits, scores, nodes, tree, *options)
    raw = torch.ops.gflowgr_cuda if name == "cuda" else torch.ops.gflowgr_cpp
    found: Outputs = raw.beam_step(
        *backends.contiguous(logits, scores, nodes, tree, _ends(normalize, tree, name)),
        *(normalize, temperature),
        *backends.contiguous(live, barred, live_leaves, barred_leaves),
        width,
    )
    return found


def _beam_step_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scores: Tensor,
    nodes: Tensor,
    tree: Tensor,
    normalize: str,
    temperature: float,
    live: Tensor | None,
    barred: Tensor | None,
    width: int,
    live_leaves: Tensor | None = None,
    barred_leaves: Tensor | None = None,
) -> Outputs:
    check_head(tree, weight.shape[0], "the rows of weight")
    options = (normalize, temperature, live, barred, width, live_leaves, barred_leaves)
    if normalize == "vocab":
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        part = None if bias is None else bias.to(dtype)
        logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), part)
        return _beam_step(logits, scores, nodes, tree, *options)
    dtype = compute_dtype(hidden, weight, bias)
    name = backends.resolve("beam_step_hidden", hidden.device, dtype)
    if name == "torch":
        return step_hidden_reference(hidden, weight, bias, scores, nodes, tree, *options)
    part = None if bias is None else bias.float()
    arguments = (
        *backends.contiguous(
            hidden, weight, part, scores, nodes, tree, _ends(normalize, tree, name)
        ),
        *(normalize, temperature),
        *backends.contiguous(live, barred, live_leaves, barred_leaves),
        width,
    )
    found: Outputs
    if name == "cuda":
        most = tree_facts(tree).most[normalize]
        found = torch.ops.gflowgr_cuda.beam_step_hidden(*arguments, most)
    else:
        found = torch.ops.gflowgr_cpp.beam_step_hidden(*arguments)
    return found


def _outputs(scores: Tensor, width: int) -> Outputs:
    values = scores.new_empty((scores.shape[0], width), dtype=torch.float32)
    ids = scores.new_empty((scores.shape[0], width), dtype=torch.int64)
    like = (values, ids, ids, ids, values, ids, ids)
    first, second, third, fourth, fifth, sixth, seventh = map(torch.empty_like, like)
    return first, second, third, fourth, fifth, sixth, seventh


def _beam_step_fake(
    logits: Tensor,
    scores: Tensor,
    nodes: Tensor,
    tree: Tensor,
    normalize: str,
    temperature: float,
    live: Tensor | None,
    barred: Tensor | None,
    width: int,
    live_leaves: Tensor | None = None,
    barred_leaves: Tensor | None = None,
) -> Outputs:
    return _outputs(scores, width)


def _beam_step_hidden_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scores: Tensor,
    nodes: Tensor,
    tree: Tensor,
    normalize: str,
    temperature: float,
    live: Tensor | None,
    barred: Tensor | None,
    width: int,
    live_leaves: Tensor | None = None,
    barred_leaves: Tensor | None = None,
) -> Outputs:
    return _outputs(scores, width)


_PROBES = {
    "torch": backends.probe_torch,
    "cpp": backends.float32_only(backends.probe_cpp),
    "cuda": backends.float32_only(backends.probe_cuda),
}
backends.define_op("beam_step", _beam_step, _beam_step_fake, probes=_PROBES)
backends.define_op("beam_step_hidden", _beam_step_hidden, _beam_step_hidden_fake, probes=_PROBES)
