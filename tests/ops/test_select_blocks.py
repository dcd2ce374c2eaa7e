"""select_blocks: exactly the blocks that a plain sort would keep."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ops.step_meta import make_meta
from twilight_engine.layout import num_blocks
from twilight_engine.ops.select_blocks import select_blocks
from twilight_engine.reference.select_blocks import list_token_counts
from twilight_engine.reference.select_blocks import select_blocks as select_blocks_reference


@pytest.mark.parametrize("budget", [0.01, 0.25, 1.0, 1, 50, 10**6])
@pytest.mark.parametrize(("batch", "group"), [(1, 1), (3, 3), (1, 4), (1, 6), (3, 7), (17, 8)])
@pytest.mark.parametrize(("page_size", "block"), [(16, 16), (61, 16), (64, 64), (61, 61)])
def test_select_blocks(
    device: torch.device, page_size: int, block: int, batch: int, group: int, budget: float
) -> None:
    lens = [2000, 3, page_size * 4, 333][:batch] + [500 + b for b in range(batch - 4)]
    meta = make_meta(device, lens, page_size=page_size)
    total = num_blocks(meta.max_len, block, page_size)
    scores = torch.randn(batch, 2 * group, total)
    scores[0, 0] = scores[0, 0].round()  # ties
    scores[0, -1] = 1.0
    scores[:, :, 1::5] = -torch.inf
    scores[-1, :, -3:] = torch.tensor([0.0, -0.0, 0.0])
    scores = scores.to(device)
    options = {"budget": budget, "block": block, "page_size": page_size, "num_kv_heads": 2}
    actual = select_blocks(scores, meta, **options)
    assert torch.equal(actual, select_blocks_reference(scores, meta, **options))


@pytest.mark.parametrize("budget", [0.1, 1.0, 7, 5000])
@pytest.mark.parametrize("group", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("tokens", [2047, 2050, 8193, 17000])
def test_long_rows(device: torch.device, tokens: int, group: int, budget: float) -> None:
    """Few threads and many; keys in shared memory and beyond; clusters that share a group out."""
    meta = make_meta(device, [tokens, 100], q_lens=[2, 1], page_size=16)
    total = num_blocks(meta.max_len, 1, 16)
    scores = torch.randn(3, 2 * group, total) * torch.logspace(-30, 3, total)
    scores[0, ::2] = scores[0, ::2].round()  # ties
    scores[1, :, : total // 2] = (
        7 + scores[1, :, : total // 2] * 1e-6
    )  # many leading bits in common
    scores[2, 0] = -torch.inf
    scores[:, :, 3::7] = -torch.inf
    scores = scores.to(device)
    options = {"budget": budget, "block": 1, "page_size": 16, "num_kv_heads": 2}
    candidates = torch.full((3, 2, total), 255, dtype=torch.uint8, device=device)
    select_blocks(scores, meta, candidates=candidates, **options)
    assert torch.equal(candidates, select_blocks_reference(scores, meta, **options))


def test_nothing_is_listed(device: torch.device) -> None:
    meta = make_meta(device, [10], page_size=16)
    for group in (1, 4):
        scores = torch.ones(1, 2 * group, num_blocks(meta.max_len, 16, 16), device=device)
        kept = select_blocks(scores, meta, budget=0.5, block=16, page_size=16, num_kv_heads=2)
        assert not kept.any()


def test_ties_keep_the_lower_block(device: torch.device) -> None:
    meta = make_meta(device, [400], page_size=16)
    scores = torch.zeros(1, 2, num_blocks(meta.max_len, 16, 16), device=device)
    scores[0, 0, 7] = 1.0
    scores[0, 1, 2:] = -1.0
    scores[0, :, 0] = -torch.inf
    options = {"block": 16, "page_size": 16, "num_kv_heads": 1}
    kept = select_blocks(scores, meta, budget=48, **options)
    assert kept[0, 0].nonzero().flatten().tolist() == [1, 2, 3, 7]


def test_budget_is_a_share_of_the_list_tokens(device: torch.device) -> None:
    meta = make_meta(device, [1000, 100], page_size=16)
    counts = list_token_counts(meta).tolist()
    assert counts == [976 - 4, 80 - 4]
    scores = torch.rand(2, 1, num_blocks(meta.max_len, 16, 16), device=device)
    kept = select_blocks(scores, meta, budget=0.25, block=16, page_size=16, num_kv_heads=1)
    assert kept.sum(-1).flatten().tolist() == [math.ceil(c / 4 / 16) for c in counts]


def test_empty_step(device: torch.device) -> None:
    meta = make_meta(device, [100], q_lens=[0], page_size=16)
    scores = torch.empty(0, 2, num_blocks(meta.max_len, 16, 16), device=device)
    options = {"budget": 0.5, "block": 16, "page_size": 16, "num_kv_heads": 1}
    assert select_blocks(scores, meta, **options).shape[0] == 0


def test_messages() -> None:
    meta = make_meta(torch.device("cpu"), [100], page_size=16)
    scores = torch.zeros(1, 2, num_blocks(meta.max_len, 16, 16))
    options = {"block": 16, "page_size": 16, "num_kv_heads": 1}
    with pytest.raises(ValueError, match=r"budget is 1.5; it must be a share"):
        select_blocks(scores, meta, budget=1.5, **options)
    with pytest.raises(ValueError, match=r"budget is 0; it must be"):
        select_blocks(scores, meta, budget=0, **options)
    with pytest.raises(ValueError, match=r"scores has shape"):
        select_blocks(scores[..., :2], meta, budget=1, **options)
    with pytest.raises(ValueError, match=r"scores has 2 heads; it must be a multiple of 3"):
        select_blocks(scores, meta, budget=1, block=16, page_size=16, num_kv_heads=3)
