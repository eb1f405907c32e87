"""Checks of the arguments of every public op: a bad input raises here and reaches no kernel.

There are two kinds of check:

- *static* checks read types, shapes, dtypes and devices only. They cost nothing and always run,
  also while ``torch.compile`` traces.
- *data* checks read values (a NaN reward, a token outside the vocabulary, an identifier outside the
  tree). On a GPU each op's data checks cost one synchronisation with the host. They are on by
  default and have one switch: the environment variable ``GFLOWGR_VALIDATE=0``, or
  :func:`set_validation`. They are skipped while ``torch.compile`` traces, while a CUDA graph is
  captured and under ``torch.func.vmap``, where values cannot be read. With the data checks off, bad
  values give NaN or infinite results, or the error of the PyTorch operation that meets them: a
  valid token outside the vocabulary, or one after a false entry of its mask, has the
  log-probability NaN (-inf where a tree is walked), and its trajectory a loss that is not finite.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gflowgr import backends
from gflowgr.ops import transforms

if TYPE_CHECKING:
    from gflowgr.tree import PrefixTree

Index = tuple[int, ...]

INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NORMALIZERS = ("vocab", "level", "children")
REDUCTIONS = ("none", "sum", "mean", "prompt")

_validate = os.environ.get("GFLOWGR_VALIDATE", "1").strip().lower() not in ("0", "false", "off")


def set_validation(enabled: bool) -> bool:
    """Switch the data checks of all ops on or off; returns the previous setting.

    Types, shapes, dtypes and devices are checked either way. Switch the data checks off where the
    inputs are known to be good and one host synchronisation per op matters.
    """
    global _validate
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be a bool; got {enabled!r}")
    previous, _validate = _validate, enabled
    return previous


@contextmanager
def validation(enabled: bool) -> Iterator[None]:
    """Switch the data checks on or off within; see :func:`set_validation`."""
    previous = set_validation(enabled)
    try:
        yield
    finally:
        set_validation(previous)


def validation_enabled() -> bool:
    """Whether the data checks are switched on."""
    return _validate


def values_readable() -> bool:
    """Whether Python may branch on values: not while tracing, under vmap or in a graph capture."""
    if torch.compiler.is_compiling() or transforms.batched():
        return False
    return not backends.capturing()


def values_looked_at() -> bool:
    """Whether the data checks run here."""
    return _validate and values_readable()


class DataChecks:
    """Conditions on values, evaluated together: one host synchronisation however many there are."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled and values_looked_at()
        self._checks: list[tuple[Callable[[], Tensor], Callable[[Index], str]]] = []
        self._last: list[Callable[[], object]] = []

    def add(self, bad: Callable[[], Tensor], message: Callable[[Index], str]) -> None:
        """Register a condition (true where a value is wrong) and the message for an index.

        Nothing is computed when the data checks are off.
        """
        if self.enabled:
            self._checks.append((bad, message))

    def add_last(self, check: Callable[[], object]) -> None:
        """Register a check that raises ValueError by itself and needs all others to have passed."""
        if self.enabled:
            self._last.append(check)

    def run(self) -> None:
        """Raise ValueError for the first registered condition that holds anywhere."""
        if self._checks:
            self._run_conditions()
        for check in self._last:
            check()

    def _run_conditions(self) -> None:
        conditions = [bad() for bad, _ in self._checks]
        failed = torch.stack([condition.any() for condition in conditions]).tolist()
        for condition, (_, message), hit in zip(conditions, self._checks, failed, strict=True):
            if hit:
                raise ValueError(message(tuple(condition.nonzero()[0].tolist())))


def at(name: str, index: Index) -> str:
    """``name[1, 2]``, the way errors point at an element."""
    return f"{name}[{', '.join(map(str, index))}]"


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | None],
    symbols: Sequence[str],
    *,
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
    source: str = "",
) -> Tensor:
    """Check one tensor argument and return it.

    `shape` holds the expected sizes (None = any), `symbols` their letters ("B", "N", ...), `source`
    the argument that fixed sizes and device. Raises TypeError for what is no tensor or has another
    dtype, ValueError for another shape or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {str(value.layout)[6:]}")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have dtype {wanted}; got {str(value.dtype)[6:]}")
    if value.dim() != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, value.shape, strict=True)
    ):
        sizes = ", ".join(
            s if n is None else f"{s}={n}" for s, n in zip(symbols, shape, strict=True)
        )
        origin = f", as in {source}" if source and any(n is not None for n in shape) else ""
        raise ValueError(f"{name} must have shape [{sizes}]{origin}; got shape {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(
            f"{name} must be on {device}, the device of {source}; it is on {value.device}"
        )
    return value


def check_number(
    name: str, value: object, *, above: float | None = None, least: float | None = None
) -> float:
    """Check a finite real Python number (`above`: exclusive bound, `least`: inclusive one)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number; got {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite; got {number}")
    if above is not None and not number > above:
        raise ValueError(f"{name} must be greater than {above:g}; got {number:g}")
    if least is not None and not number >= least:
        raise ValueError(f"{name} must be at least {least:g}; got {number:g}")
    return number


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """Check that `value` is one of the named options."""
    if not isinstance(value, str) or value not in choices:
        options = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} must be one of {options}; got {value!r}")
    return value


def check_mask(
    mask: object, shape: Sequence[int], device: torch.device, source: str, data: DataChecks
) -> Tensor:
    """Check the mask [B, N, L] (None = all true): bool, and true then false along every row."""
    if mask is None:
        return torch.ones(tuple(shape), dtype=torch.bool, device=device)
    checked = check_tensor(
        "mask", mask, tuple(shape), "BNL", dtypes=(torch.bool,), device=device, source=source
    )
    data.add(
        lambda: checked[..., 1:] & ~checked[..., :-1],
        lambda i: (
            f"{at('mask', i[:-1])} must be a prefix of its row (true, then false): position "
            f"{i[-1] + 1} is true after a false one"
        ),
    )
    return checked


def check_log_reward(
    log_reward: object,
    like: Tensor,
    floor: float | None,
    source: str,
    data: DataChecks,
) -> Tensor:
    """Check log_reward [B, N]: finite at valid trajectories; with a floor only +inf is an error.

    `like` [B, N, L] fixes sizes and device; where it is a mask it says what is valid.
    """
    checked = check_tensor(
        "log_reward",
        log_reward,
        like.shape[:2],
        "BN",
        dtypes=FLOAT_DTYPES,
        device=like.device,
        source=source,
    )
    if floor is None:
        hint = "give log_reward_floor to floor the log-reward of non-positive rewards"
    else:
        hint = "log_reward_floor stands in for -inf and NaN only"

    def bad() -> Tensor:
        wrong = ~torch.isfinite(checked) if floor is None else checked == math.inf
        if like.dtype == torch.bool:
            return wrong & like.any(-1)
        return wrong if like.shape[-1] > 0 else torch.zeros_like(wrong)

    data.add(
        bad,
        lambda i: f"{at('log_reward', i)} must be finite; got {checked[i].item():g} ({hint})",
    )
    return checked


def flow_inputs_ok(log_reward: Tensor, mask: Tensor | None, floor: float | None) -> bool:
    """Whether one fast pass finds all values that :func:`check_mask` and :func:`check_log_reward`
    test valid; False also where there is no such pass."""
    if log_reward.device.type != "cpu" or log_reward.dtype not in (torch.float32, torch.float64):
        return False
    if transforms.active():
        return False
    if backends.forced_backend() not in (None, "cpp") or backends.cpp_missing() is not None:
        # A sum is finite only where all of its terms are.
        return mask is None and floor is None and math.isfinite(log_reward.detach().sum())
    if not log_reward.is_contiguous() or not (mask is None or mask.is_contiguous()):
        return False
    ok: bool = torch.ops.gflowgr_cpp.flow_inputs_ok(log_reward, mask, floor is not None)
    return ok


def check_log_z(log_z: object, like: Tensor, source: str) -> Tensor:
    """Check log_z: [B], or a zero-dimensional tensor shared by all prompts; returns it as [B]."""
    prompts = like.shape[0]
    if isinstance(log_z, Tensor) and log_z.dim() == 0:
        log_z = log_z.expand(prompts)
    return check_tensor(
        "log_z", log_z, (prompts,), "B", dtypes=FLOAT_DTYPES, device=like.device, source=source
    )


def check_log_flow(log_flow: object, like: Tensor, source: str) -> Tensor:
    """Check log_flow [B, N, L], the log-flow of the state before each token."""
    return check_tensor(
        "log_flow",
        log_flow,
        like.shape,
        "BNL",
        dtypes=FLOAT_DTYPES,
        device=like.device,
        source=source,
    )


def check_tokens(
    tokens: Tensor,
    mask: Tensor,
    vocab_size: int,
    data: DataChecks,
) -> None:
    """Register the check that every valid token is a row of the head."""
    data.add(
        lambda: mask & ((tokens < 0) | (tokens >= vocab_size)),
        lambda i: (
            f"{at('tokens', i)} = {tokens[i].item()} is outside the vocabulary: weight has "
            f"{vocab_size} rows, so tokens must be 0..{vocab_size - 1}"
        ),
    )


def check_in_tree(tokens: Tensor, mask: Tensor | None, tree: PrefixTree, data: DataChecks) -> None:
    """Register the check that every trajectory is an identifier of the tree."""
    data.add_last(lambda: tree.validate(tokens, mask=mask, name="tokens"))


def mask_rises(mask: Tensor) -> Tensor:
    """True [..., L] at entries of a mask that are true after a false one: none in a prefix."""
    before = torch.cat([torch.ones_like(mask[..., :1]), mask[..., :-1]], -1)
    return mask & ~before


def mark_tokens(tokens: Tensor, mask: Tensor | None, vocab_size: int, *, looked_at: bool) -> Tensor:
    """Tokens [..., L] in the ops' form: int64, -1 under a false mask.

    Where the data checks have not `looked_at` the values, a valid token outside the vocabulary, or
    one after a false entry of its mask, becomes ``vocab_size + 1``: no token, log-probability NaN.
    """
    marked = tokens.long()
    if not looked_at:
        none = marked != marked.clamp(0, vocab_size - 1)
        if mask is not None:
            none = none | mask_rises(mask)
        marked = marked.masked_fill(none, vocab_size + 1)
    return marked if mask is None else marked.masked_fill(~mask, -1)


def check_tree(tree: PrefixTree, vocab_size: int, device: torch.device, source: str) -> None:
    """Check that the tree fits the head (its tokens are rows of it) and lies on the same device."""
    for method in ("walk", "child_ranges", "node_tokens", "validate"):
        if not callable(getattr(tree, method, None)):
            raise TypeError(f"tree must be a gflowgr.PrefixTree; got {type(tree).__name__}")
    if torch.device(tree.device) != device:
        raise ValueError(
            f"tree must be on {device}, the device of {source}; it is on {tree.device}: "
            "move it with tree.to(device)"
        )
    if tree.vocab_size > vocab_size:
        raise ValueError(
            f"weight has {vocab_size} rows, but the tree holds tokens up to {tree.vocab_size - 1}: "
            "the head must cover every token of the tree"
        )
