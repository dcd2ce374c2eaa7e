"""Random steps over a random index: what the tests of the estimate and the pruner start from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twilight_engine.config import QUEST_BLOCK
from twilight_engine.layout import IndexPages, StepMeta, Windows, num_blocks


@dataclass
class GradedCase:
    q: Tensor
    index: IndexPages
    windows: Windows
    meta: StepMeta
    softmax_scale: float

    def candidates(self, share: float) -> Tensor:
        n, heads = self.meta.num_queries, self.windows.num_kv_heads
        blocks = num_blocks(self.meta.max_len, self.index.candidate_block, self.meta.page_size)
        return (torch.rand(n, heads, blocks) < share).to(torch.uint8).to(self.q.device)


def make_case(
    meta: StepMeta,
    *,
    group: int = 2,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    k_index: str = "int4_channel",
    dtype: torch.dtype = torch.float32,
    sharpness: float = 1.0,
) -> GradedCase:
    """K of order one, some channels with a large bias, as models with a K bias have."""
    device, size, d = meta.positions.device, meta.page_size, head_dim
    num_pages = int(meta.page_table.max()) + 2
    codes = torch.randint(0, 256, (num_pages, num_kv_heads, size, d // 2), dtype=torch.uint8)
    bounds = None
    if k_index == "int4_channel":
        scale = torch.rand(num_pages, num_kv_heads, 2, d) * 0.4
        scale[:, :, 1] = scale[:, :, 1] * 5 - 3
        scale[:, :, 1, 3], scale[:, :, 0, 5] = 40.0, 0.0
    else:
        scale = torch.rand(num_pages, num_kv_heads, size, 2) * 0.4
        scale[..., 1] = scale[..., 1] * 5 - 3
        runs = -(-size // QUEST_BLOCK)
        bounds = torch.randn(num_pages, num_kv_heads, runs, 2, d).sort(dim=3).values
    index = IndexPages(
        k_index=k_index,
        k_codes=codes.to(device),
        k_scale=scale.half().to(device),
        k_bounds=None if bounds is None else bounds.half().to(device),
        v_codes=None,
        v_scale=None,
        v_mean=torch.randn(num_pages, num_kv_heads, d).half().to(device),
    )
    longest = int((meta.seq_lens - meta.window_starts).max())
    window_rows = -(-longest // size) * size
    slots = int(meta.seq_slots.max()) + 1
    rows = torch.randn(slots * num_kv_heads * (meta.num_sink + window_rows) + 7, 2 * d)
    windows = Windows(rows.to(device, dtype), num_kv_heads, meta.num_sink, window_rows)
    q = torch.randn(meta.num_queries, group * num_kv_heads, d) * sharpness
    return GradedCase(q.to(device, dtype), index, windows, meta, head_dim**-0.5)
