"""quest_scores on a CPU: one numba pass, on one thread."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from twilight_engine.layout import IndexPages, StepMeta, blocks_per_page
from twilight_engine.ops.cpu.halves import half_bits, halves_to_floats


@numba.njit(cache=True, error_model="numpy")
def _scores(
    q: Any, bounds: Any, by_channel: bool, table: Any, query_seq: Any,
    positions: Any, ctx_starts: Any, window_starts: Any, page_size: int, num_sink: int, block: int,
    scale: float, scores: Any,
) -> None:  # fmt: skip
    heads, per_page, dim = bounds.shape[1], bounds.shape[2], q.shape[2]
    group = q.shape[1] // heads
    for n, h in np.ndindex(q.shape[0], heads):
        b = query_seq[n]
        first = max(ctx_starts[n], num_sink)
        end = min(positions[n] + 1, window_starts[b])
        lo = np.empty(dim, dtype=np.float32)
        hi = np.empty(dim, dtype=np.float32)
        scratch = np.empty(dim, dtype=np.uint32)
        for j in range(scores.shape[2]):
            p, run = j // per_page, j % per_page
            start = p * page_size + run * block
            stop = min(start + block, (p + 1) * page_size)
            if start >= end or stop <= first:
                for g in range(group):
                    scores[n, h * group + g, j] = -np.inf
                continue
            page = table[b, p]
            halves_to_floats(bounds[page, h, run, 0], scratch, lo)
            halves_to_floats(bounds[page, h, run, 1], scratch, hi)
            if by_channel:  # what was read is (scale, min)
                for d in range(dim):
                    scale_d, lo[d] = lo[d], hi[d]
                    hi[d] = lo[d] + np.float32(15) * scale_d
            for g in range(group):
                total = np.float32(0)
                for d in range(dim):
                    value = q[n, h * group + g, d]
                    total += max(value * lo[d], value * hi[d])
                scores[n, h * group + g, j] = total * np.float32(scale)


def quest_scores_cpu(
    q: Tensor,
    index: IndexPages,
    meta: StepMeta,
    softmax_scale: float,
    block: int,
    scores: Tensor,
) -> None:
    """Bounds of every block; see ops.quest_scores."""
    if q.dtype != torch.float32:
        raise NotImplementedError(f"q has dtype {q.dtype}; supported on a CPU: torch.float32")
    by_channel = index.k_bounds is None
    bounds = index.k_scale.unsqueeze(2) if index.k_bounds is None else index.k_bounds
    assert bounds.shape[2] == blocks_per_page(block, meta.page_size)
    _scores(
        q.numpy(),
        half_bits(bounds),
        by_channel,
        meta.page_table.numpy(),
        meta.query_seq.numpy(),
        meta.positions.numpy(),
        meta.ctx_starts.numpy(),
        meta.window_starts.numpy(),
        meta.page_size,
        meta.num_sink,
        block,
        softmax_scale,
        scores.numpy(),
    )
