from __future__ import annotations

import pytest
import torch

from tests.compare import compare
from tests.ops.step_meta import make_meta
from twilight_engine.kv.index import allocate_index
from twilight_engine.ops.estimate_errors import estimate_errors
from twilight_engine.ops.index_pages import index_pages
from twilight_engine.reference.estimate_errors import estimate_errors as reference
from twilight_engine.reference.estimate_scores import dequantise_keys


@pytest.mark.parametrize("k_index", ["int4_channel", "int4_token"])
@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize(("page_size", "head_dim"), [(16, 64), (61, 80), (64, 128)])
def test_matches_reference(
    device: torch.device, k_index: str, group: int, page_size: int, head_dim: int
) -> None:
    meta = make_meta(device, [200, 33], q_lens=[2, 1], page_size=page_size)
    pages = int(meta.page_table.max()) + 1
    index = allocate_index(pages, 2, page_size, head_dim, k_index, "none", device)
    keys = torch.randn(pages, page_size, 2, head_dim, device=device)
    index_pages(keys, keys, torch.arange(pages, dtype=torch.int32, device=device), index)
    q = torch.randn(3, 2 * group, head_dim, device=device)
    got = estimate_errors(q, index, meta, softmax_scale=0.2)
    want = reference(q, index, meta, softmax_scale=0.2)
    compare(torch.where(want > 0, got, 0.0), want)


def test_is_the_spread_of_the_real_errors(device: torch.device) -> None:
    """Over many pages the logits' errors have the variance that the steps say."""
    meta = make_meta(device, [64 * 40], page_size=64)
    pages = int(meta.page_table.max()) + 1
    index = allocate_index(pages, 1, 64, 64, "int4_channel", "none", device)
    keys = torch.randn(pages, 64, 1, 64, device=device)
    ids = torch.arange(pages, dtype=torch.int32, device=device)
    index_pages(keys, keys, ids, index)
    q = torch.randn(1, 1, 64, device=device)
    errors = estimate_errors(q, index, meta, softmax_scale=1.0)[0, 0]
    table = meta.page_table[0].long()
    table = table[table >= 0]
    approximate = dequantise_keys(index, table, 0)
    off = (approximate - keys[table, :, 0]) @ q[0, 0]  # [pages, 64]
    ratio = off.square().mean(1).sum() / errors[: len(table)].square().sum()
    assert 0.85 < ratio.item() < 1.15


def test_bad_query(device: torch.device) -> None:
    meta = make_meta(device, [100])
    index = allocate_index(9, 1, 16, 64, "int4_channel", "none", device)
    with pytest.raises(ValueError, match="q"):
        estimate_errors(torch.zeros(1, 2, 80, device=device), index, meta, softmax_scale=1.0)
