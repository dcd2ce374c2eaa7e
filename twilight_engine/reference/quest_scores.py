"""Reference of quest_scores: bounds from the index, one page at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import IndexPages, StepMeta, blocks_per_page, num_blocks


def page_bounds(index: IndexPages, page: int) -> tuple[Tensor, Tensor]:
    """(lo, hi) float32 [Hkv, blocks a page, D]: every K of the block lies between them."""
    if index.k_bounds is not None:
        bounds = index.k_bounds[page].float()  # [Hkv, runs, 2, D]
        return bounds[:, :, 0], bounds[:, :, 1]
    scale, minimum = index.k_scale[page].float().unsqueeze(1).unbind(2)  # [Hkv, 1, D]
    return minimum, minimum + 15 * scale


def quest_scores(
    q: Tensor,
    index: IndexPages,
    meta: StepMeta,
    *,
    softmax_scale: float,
    block: int,
    scores: Tensor | None = None,
) -> Tensor:
    """Upper bounds of softmax_scale * q . k over each block; -inf without a list token."""
    size = meta.page_size
    per_page = blocks_per_page(block, size)
    total = num_blocks(meta.max_len, block, size)
    if scores is None:
        scores = torch.empty(*q.shape[:2], total, dtype=torch.float32, device=q.device)
    scores.fill_(-torch.inf)
    for n, b in enumerate(meta.query_seq.tolist()):
        first = max(int(meta.ctx_starts[n]), meta.num_sink)
        end = min(int(meta.positions[n]) + 1, int(meta.window_starts[b]))
        for p in range(first // size, -(-end // size) if end > first else 0):
            lo, hi = page_bounds(index, int(meta.page_table[b, p]))
            heads = q[n].float().view(lo.shape[0], -1, 1, lo.shape[2])  # [Hkv, G, 1, D]
            bound = torch.maximum(heads * lo[:, None], heads * hi[:, None]).sum(-1)
            for run in range(per_page):
                start = p * size + run * block
                if start < end and min(start + block, (p + 1) * size) > first:
                    scores[n, :, p * per_page + run] = bound[..., run].flatten() * softmax_scale
    return scores
