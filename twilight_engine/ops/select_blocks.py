"""Choose the blocks of tokens that a selector's scores rank highest."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import StepMeta, num_blocks
from twilight_engine.ops.launch import check_dtype, check_shape, current_stream, kernels, ptr
from twilight_engine.reference.select_blocks import select_blocks as select_blocks_reference


def select_blocks(
    scores: Tensor,
    meta: StepMeta,
    *,
    budget: float | int,
    block: int,
    page_size: int,
    num_kv_heads: int,
    candidates: Tensor | None = None,
) -> Tensor:
    """Keep the best blocks of each query head, united over the heads of a group.

    candidates[n, h, j] = 1 if block j is among the k best of any query head of KV head h, where
    k = ceil(budget tokens / block); equal scores: the lower block first. Blocks scored -inf are
    never kept; all others are where k is at least their number.

    Args:
        scores: [N, Hq, NB] float32, contiguous, NB = num_blocks(max_len, block, page_size).
        budget: tokens a query head may keep: a float in (0, 1], as a share of the row's list
            tokens (counted on the device), or a count >= 1.
        candidates: [N, Hkv, NB] uint8 to write to.
    Returns: candidates.
    Raises: ValueError for other shapes, dtypes or budgets.
    Source: radix select, after Alabi et al. (2012); see csrc/select_blocks.cu.
    """
    n, hq, total = meta.num_queries, scores.shape[1], num_blocks(meta.max_len, block, page_size)
    check_shape("scores", scores, (n, None, total))
    check_dtype("scores", scores, torch.float32)
    if hq % num_kv_heads:
        raise ValueError(f"scores has {hq} heads; it must be a multiple of {num_kv_heads}")
    if not scores.is_contiguous():
        raise ValueError(f"scores has strides {scores.stride()}; it must be contiguous")
    if budget <= 0 or (isinstance(budget, float) and budget > 1):
        raise ValueError(
            f"budget is {budget!r}; it must be a share in (0, 1] as a float, or a count >= 1"
        )
    if candidates is None:
        shape = (n, num_kv_heads, total)
        candidates = torch.empty(shape, dtype=torch.uint8, device=scores.device)
    check_shape("candidates", candidates, (n, num_kv_heads, total))
    check_dtype("candidates", candidates, torch.uint8)
    if candidates.numel() == 0:
        return candidates
    if not scores.is_cuda:
        return select_blocks_reference(
            scores,
            meta,
            budget=budget,
            block=block,
            page_size=page_size,
            num_kv_heads=num_kv_heads,
            candidates=candidates,
        )
    kernels().select_blocks(
        scores=ptr(scores),
        query_seq=ptr(meta.query_seq),
        positions=ptr(meta.positions),
        ctx_starts=ptr(meta.ctx_starts),
        window_starts=ptr(meta.window_starts),
        candidates=ptr(candidates),
        budget=float(budget),
        budget_is_share=isinstance(budget, float),
        block=block,
        num_queries=n,
        num_q_heads=hq,
        num_kv_heads=num_kv_heads,
        num_blocks=total,
        num_sink=meta.num_sink,
        stream=current_stream(scores),
    )
    return candidates
