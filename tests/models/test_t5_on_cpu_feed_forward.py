"""T5's feed-forward without the copies that change nothing: the same bits, fewer copies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import MT5Config, T5Config
from transformers.models.mt5.modeling_mt5 import MT5DenseActDense, MT5DenseGatedActDense
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense

from gflowgr.models.t5_on_cpu import use_direct_feed_forward

SIZES = {"d_model": 8, "d_ff": 24, "dropout_rate": 0.3, "vocab_size": 11}
LAYERS = [
    T5DenseActDense(T5Config(**SIZES)),
    T5DenseGatedActDense(T5Config(**SIZES, feed_forward_proj="gated-gelu")),
    MT5DenseActDense(MT5Config(**SIZES, feed_forward_proj="relu")),
    MT5DenseGatedActDense(MT5Config(**SIZES)),
]
KINDS = [type(layer).__name__ for layer in LAYERS]


def twins(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A layer as it is, and one that takes the short way."""
    direct = copy.deepcopy(layer)
    use_direct_feed_forward(nn.ModuleList([direct]))
    assert isinstance(direct, type(layer))
    assert type(direct) is not type(layer)
    return copy.deepcopy(layer), direct


def run(layer: nn.Module, dtype: torch.dtype | None) -> list[Tensor]:
    """The output and all gradients, in training, with the same dropout."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        y = layer(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(weight.grad for weight in layer.parameters())]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", LAYERS, ids=KINDS)
def test_nothing_changes(layer: nn.Module, dtype: torch.dtype | None) -> None:
    plain, direct = twins(layer)
    for wanted, found in zip(run(plain, dtype), run(direct, dtype), strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


def test_without_autocast_a_float32_projection_gets_float32() -> None:
    """As in a model that was loaded in bfloat16: ``transformers`` keeps wo in float32."""
    plain, direct = twins(LAYERS[0])
    x = torch.randn(2, 8).bfloat16()
    for layer in (plain, direct):
        layer.eval().bfloat16().wo.float()
    assert direct(x).dtype == torch.float32
    assert torch.equal(direct(x), plain(x))


def copies(layer: nn.Module) -> int:
    """Tensors of the activations' size that are copied to another dtype, forward and backward."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        run(layer, torch.bfloat16)
    shapes = seen.key_averages(group_by_input_shape=True)
    return sum(
        e.count for e in shapes if e.key == "aten::copy_" and e.input_shapes[0] == [3, 5, 24]
    )


def test_the_activations_are_not_copied() -> None:
    plain, direct = twins(LAYERS[0])
    assert copies(plain) == 4
    assert copies(direct) == 0
