"""Selector `streaming`: sinks and the last tokens, whatever the query."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.attention.selectors.base import LayerView
from twilight_engine.layout import blocks_per_page, num_blocks


class StreamingSelector:
    """StreamingLLM (arXiv 2309.17453): the last `budget` tokens, in whole blocks.

    A budget below 1 is a share of the tokens a row sees. Sinks and the engine's own window are
    resident and exact anyway, so a budget inside the window leaves no candidate.
    """

    def select(self, q: Tensor, view: LayerView) -> Tensor | None:
        meta, block = view.meta, view.block
        device = meta.positions.device
        per_page = blocks_per_page(block, meta.page_size)
        number = torch.arange(num_blocks(meta.max_len, block, meta.page_size), device=device)
        first = number // per_page * meta.page_size + number % per_page * block
        end = torch.minimum(first + block, (number // per_page + 1) * meta.page_size)
        length = meta.positions + 1
        if isinstance(view.budget, float):
            kept = ((length - meta.ctx_starts) * view.budget).ceil()
        else:
            kept = torch.full_like(length, view.budget)
        inside = end[None] > (length - kept)[:, None]
        heads = view.windows.num_kv_heads
        return inside[:, None].expand(-1, heads, -1).to(torch.uint8).contiguous()
