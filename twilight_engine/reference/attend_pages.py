"""Reference of twilight_engine.ops.attend_pages."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import COUNTER_STREAMED_BYTES, StepMeta
from twilight_engine.reference.step_tokens import page_rows, visible_tokens


def attend(q: Tensor, rows: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [G, D] to rows [L, 2D], K then V, in float32: out [G, D], lse [G]."""
    head_dim = q.shape[-1]
    scores = softmax_scale * q.float() @ rows[:, :head_dim].float().T
    lse = torch.logsumexp(scores, dim=-1)
    if rows.shape[0] == 0:
        return torch.zeros_like(q, dtype=torch.float32), lse
    return torch.softmax(scores, dim=-1) @ rows[:, head_dim:].float(), lse


def attend_pages(
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    meta: StepMeta,
    *,
    softmax_scale: float,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention of every query row to all the tokens it sees; shapes as in the op."""
    n, hq, head_dim = q.shape
    hkv, _, page_size, _ = pages.shape
    out = torch.zeros(n, hq, head_dim)
    lse = torch.full((n, hq), -torch.inf)
    for i in range(n):
        table = page_table[int(meta.query_seq[i])]
        rows = page_rows(table, visible_tokens(meta, i), page_size)
        for h in range(hkv):
            group = slice(h * hq // hkv, (h + 1) * hq // hkv)
            kv = pages[h].reshape(-1, 2 * head_dim).cpu()[rows]  # [L, 2D]
            out[i, group], lse[i, group] = attend(q[i, group].cpu(), kv, softmax_scale)
            if counters is not None:
                counters[COUNTER_STREAMED_BYTES] += kv.numel() * kv.element_size()
    return out.to(q.device), lse.to(q.device)
