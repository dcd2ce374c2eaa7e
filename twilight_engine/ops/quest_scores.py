"""Quest's upper bounds of attention scores, block by block, from the index."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import IndexPages, StepMeta, num_blocks
from twilight_engine.ops.cpu.quest_scores import quest_scores_cpu
from twilight_engine.ops.launch import (
    aligned_rows,
    check_dtype,
    check_head_dim,
    check_shape,
    current_stream,
    kernels,
    ptr,
    row_dtype,
)


def quest_scores(
    q: Tensor,
    index: IndexPages,
    meta: StepMeta,
    *,
    softmax_scale: float,
    block: int,
    scores: Tensor | None = None,
) -> Tensor:
    """Bound each query head's score from above over each block of tokens.

    scores[n, hq, j] = softmax_scale * sum_d max(q[d] * lo[d], q[d] * hi[d]), where [lo, hi] are
    the block's bounds of K: min and min + 15 * scale of its page (int4_channel), k_bounds of its
    run (int4_token). -inf for blocks without a list token (visible and not resident).

    Args:
        q: [N, Hq, D] float32, float16 or bfloat16, contiguous.
        index: pages of the sequences' list tokens.
        block: index.candidate_block; layout.block_of says which block a token is in.
        scores: [N, Hq, num_blocks(max_len, block, S)] float32 to write to.
    Returns: scores.
    Raises: ValueError for other shapes, dtypes or blocks; NotImplementedError for other q dtypes
        (CPU: other than float32) or, on a GPU, head_dims without a kernel.
    Source: Quest (Tang et al., ICML 2024), section 3.3.
    """
    n, hq, dim = q.shape
    hkv = index.k_codes.shape[1]
    check_shape("q", q, (meta.num_queries, hq, index.head_dim))
    if hq % hkv:
        raise ValueError(f"q has {hq} heads; it must be a multiple of the index's {hkv}")
    if not q.is_contiguous():
        raise ValueError(f"q has strides {q.stride()}; it must be contiguous")
    if block != index.candidate_block:
        raise ValueError(
            f"block is {block}; an index with {index.k_index} bounds blocks of "
            f"{index.candidate_block} tokens"
        )
    total = num_blocks(meta.max_len, block, meta.page_size)
    if scores is None:
        scores = torch.empty(n, hq, total, dtype=torch.float32, device=q.device)
    check_shape("scores", scores, (n, hq, total))
    check_dtype("scores", scores, torch.float32)
    if scores.numel() == 0:
        return scores
    if not q.is_cuda:
        quest_scores_cpu(q, index, meta, softmax_scale, block, scores)
        return scores
    dtype = row_dtype("q", q)
    check_head_dim(dim)
    q = aligned_rows(q)
    by_channel = index.k_bounds is None
    kernels().quest_scores(
        q=ptr(q),
        bounds=ptr(index.k_scale if by_channel else index.k_bounds),
        by_channel=by_channel,
        page_table=ptr(meta.page_table),
        page_table_stride=meta.page_table.stride(0),
        query_seq=ptr(meta.query_seq),
        positions=ptr(meta.positions),
        ctx_starts=ptr(meta.ctx_starts),
        window_starts=ptr(meta.window_starts),
        scores=ptr(scores),
        num_queries=n,
        num_q_heads=hq,
        num_kv_heads=hkv,
        head_dim=dim,
        num_blocks=total,
        block=block,
        page_size=meta.page_size,
        num_sink=meta.num_sink,
        softmax_scale=softmax_scale,
        dtype=dtype,
        stream=current_stream(q),
    )
    return scores
