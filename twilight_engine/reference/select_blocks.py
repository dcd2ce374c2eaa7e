"""Reference of select_blocks: a stable sort for each query head."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import StepMeta


def list_token_counts(meta: StepMeta) -> Tensor:
    """[N] list tokens (visible, not resident) of each query row."""
    window_starts = meta.window_starts[meta.query_seq.long()]
    end = torch.minimum(meta.positions + 1, window_starts)
    return (end - meta.ctx_starts.clamp(min=meta.num_sink)).clamp(min=0)


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
    """The best blocks of each query head within the budget, united over its KV head's group."""
    tokens = list_token_counts(meta).double()
    tokens = budget * tokens if isinstance(budget, float) else torch.full_like(tokens, budget)
    keep = (tokens / block).ceil()  # [N]
    # + 0.0: -0 ranks as +0 also where a sort compares bits.
    order = (scores + 0.0).sort(dim=-1, descending=True, stable=True).indices
    rank = order.argsort(dim=-1)
    chosen = (rank < keep[:, None, None]) & (scores > -torch.inf)  # [N, Hq, NB]
    n, hq, total = scores.shape
    union = chosen.view(n, num_kv_heads, hq // num_kv_heads, total).any(2).to(torch.uint8)
    if candidates is None:
        return union
    return candidates.copy_(union)
