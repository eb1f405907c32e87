"""Top-k against a stable sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gflowgr.ops.topk import stable_topk


@pytest.mark.parametrize("spare", [0, 1, 32])
@given(rows=st.integers(0, 4), columns=st.integers(1, 30), values=st.integers(1, 5), data=st.data())
def test_equals_the_head_of_a_stable_sort(
    spare: int, rows: int, columns: int, values: int, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 1000))
    k = data.draw(st.integers(1, columns))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, values, (rows, columns), generator=generator).float().log()
    expected = scores.sort(dim=1, descending=True, stable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gflowgr.ops.topk._SPARE", spare)
        found, places = stable_topk(scores, k)
    assert torch.equal(places, expected.indices[:, :k])
    assert torch.equal(found, expected.values[:, :k])
