"""quest_scores: equal to the reference, and never below any q . k of the block."""

from __future__ import annotations

import pytest
import torch

from tests.compare import compare
from tests.ops.step_meta import make_meta
from twilight_engine.config import KIndex
from twilight_engine.kv.index import allocate_index
from twilight_engine.layout import IndexPages, StepMeta, block_of
from twilight_engine.ops.index_pages import index_pages
from twilight_engine.ops.quest_scores import quest_scores
from twilight_engine.reference.quest_scores import quest_scores as quest_scores_reference


def filled_index(
    meta: StepMeta, heads: int, dim: int, k_index: KIndex, device: torch.device
) -> tuple[IndexPages, torch.Tensor]:
    """An index of random pages with a huge K bias, and the K [P, S, Hkv, D] they hold."""
    num_pages = int(meta.page_table.max()) + 1
    k = torch.randn(num_pages, meta.page_size, heads, dim)
    k[..., 0] += 217
    k[..., 1] -= 217
    k[..., 2] = 0.1
    k = k.to(device)
    index = allocate_index(num_pages, heads, meta.page_size, dim, k_index, "none", device)
    index_pages(k, k, torch.arange(num_pages, dtype=torch.int32, device=device), index)
    return index, k


@pytest.mark.parametrize("k_index", ["int4_channel", "int4_token"])
@pytest.mark.parametrize("page_size", [16, 61, 64])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("batch", "group"), [(1, 1), (3, 3), (1, 4), (3, 6), (1, 7), (17, 8)])
def test_quest_scores(
    device: torch.device, batch: int, group: int, dim: int, page_size: int, k_index: KIndex
) -> None:
    lens = [6 * page_size + 1, 3, 4 * page_size, page_size + 2][:batch]
    lens += [2 * page_size + 5 * b for b in range(batch - len(lens))]
    meta = make_meta(device, lens, page_size=page_size)
    index, _ = filled_index(meta, 2, dim, k_index, device)
    gpu = [torch.float16, torch.bfloat16] if device.type == "cuda" else []
    for dtype in [torch.float32, *gpu]:
        q = torch.randn(batch, 2 * group, dim, device=device).to(dtype)
        options = {"softmax_scale": dim**-0.5, "block": index.candidate_block}
        actual = quest_scores(q, index, meta, **options)
        expected = quest_scores_reference(q, index, meta, **options)
        compare(actual, expected, factor=2.0)


@pytest.mark.parametrize("k_index", ["int4_channel", "int4_token"])
@pytest.mark.parametrize(
    ("dim", "group"), [(64, 1), (80, 9), (128, 1), (128, 2), (128, 5), (256, 4)]
)
def test_long_rows_of_several_queries(
    device: torch.device, dim: int, group: int, k_index: KIndex
) -> None:
    """Warps own stretches of 32 blocks, the last of them cut short; q starts anywhere."""
    size = 61
    meta = make_meta(
        device, [150 * size + 7, 97 * size], q_lens=[3, 2], page_size=size, sliding=5000
    )
    heads = 32 if group == 1 else 8
    index, _ = filled_index(meta, heads, dim, k_index, device)
    q = torch.randn(1 + 5 * heads * group * dim, device=device)[1:].view(5, heads * group, dim)
    options = {"softmax_scale": dim**-0.5, "block": index.candidate_block}
    scores = quest_scores(q, index, meta, **options)
    compare(scores, quest_scores_reference(q, index, meta, **options), factor=2.0)


def test_equal_bounds_have_equal_scores(device: torch.device) -> None:
    meta = make_meta(device, [100 * 64], page_size=64, num_sink=0)
    index, _ = filled_index(meta, 2, 128, "int4_token", device)
    assert index.k_bounds is not None
    index.k_bounds[:] = index.k_bounds[:1, :, :1].clone()
    q = torch.randn(1, 10, 128, device=device)
    scores = quest_scores(q, index, meta, softmax_scale=1.0, block=index.candidate_block)
    listed = scores[:, :, : 99 * 4]
    assert torch.equal(listed, listed[:, :, :1].expand_as(listed))


@pytest.mark.parametrize("k_index", ["int4_channel", "int4_token"])
@pytest.mark.parametrize("sliding", [None, 70])
def test_bounds_hold_for_every_list_token(
    device: torch.device, sliding: int | None, k_index: KIndex
) -> None:
    meta = make_meta(device, [200, 131], q_lens=[4, 1], page_size=40, sliding=sliding)
    index, k = filled_index(meta, 2, 64, k_index, device)
    q = torch.randn(5, 6, 64, device=device) * 3
    q[:, :, 0] = torch.tensor([1.0, -1.0, 0.0, 5.0, -5.0], device=device)[:, None]
    block = index.candidate_block
    scores = quest_scores(q, index, meta, softmax_scale=1.0, block=block).cpu()
    seen = torch.zeros_like(scores, dtype=torch.bool)
    for n, b in enumerate(meta.query_seq.tolist()):
        first = max(int(meta.ctx_starts[n]), meta.num_sink)
        for t in range(first, min(int(meta.positions[n]) + 1, int(meta.window_starts[b]))):
            row = k[int(meta.page_table[b, t // 40]), t % 40].repeat_interleave(3, dim=0)
            exact = (q[n].double() * row.double()).sum(-1).cpu()
            slack = 1e-6 * (q[n] * row).abs().sum(-1).cpu()
            j = int(block_of(torch.tensor(t), block, 40))
            assert (scores[n, :, j] >= exact - slack).all()
            seen[n, :, j] = True
    assert torch.equal(seen, scores > -torch.inf)


def test_messages(device: torch.device) -> None:
    meta = make_meta(device, [60], page_size=16)
    index, _ = filled_index(meta, 2, 64, "int4_channel", device)
    q = torch.randn(1, 4, 64, device=device)
    with pytest.raises(ValueError, match=r"q has 3 heads; it must be a multiple of"):
        quest_scores(q[:, :3].contiguous(), index, meta, softmax_scale=1.0, block=16)
    with pytest.raises(ValueError, match=r"block is 8; an index with int4_channel bounds blocks"):
        quest_scores(q, index, meta, softmax_scale=1.0, block=8)
    with pytest.raises(ValueError, match=r"q has shape"):
        quest_scores(q[..., :32], index, meta, softmax_scale=1.0, block=16)
    with pytest.raises(NotImplementedError, match=r"q has dtype torch.float64; supported"):
        quest_scores(q.double(), index, meta, softmax_scale=1.0, block=16)
