"""Reference of twilight_engine.ops.attend_rows."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import COUNTER_DIRECT_BYTES, RowLists, StepMeta, Windows
from twilight_engine.reference.attend_pages import attend
from twilight_engine.reference.step_tokens import page_rows, resident_mask, visible_tokens


def window_row_ids(windows: Windows, seq_slot: int, head: int, tokens: Tensor) -> Tensor:
    """Rows of the pool that hold these resident tokens of a sequence slot and KV head."""
    first = (seq_slot * windows.num_kv_heads + head) * windows.rows_per_head
    ring = windows.num_sink + tokens % max(windows.window_rows, 1)
    return first + torch.where(tokens < windows.num_sink, tokens, ring)


def attend_rows(
    q: Tensor,
    windows: Windows,
    host_kv: Tensor,
    exact: RowLists,
    locations: Tensor,
    meta: StepMeta,
    *,
    softmax_scale: float,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query row to its resident and listed tokens; shapes as in the op."""
    n, hq, head_dim = q.shape
    hkv = windows.num_kv_heads
    out = torch.zeros(n, hq, head_dim)
    lse = torch.full((n, hq), -torch.inf)
    pool, table = windows.rows.cpu(), meta.page_table.cpu()
    direct = 0
    for i in range(n):
        b = int(meta.query_seq[i])
        resident = visible_tokens(meta, i)[resident_mask(meta, i)]
        for h in range(hkv):
            group = slice(h * hq // hkv, (h + 1) * hq // hkv)
            count = int(exact.counts[i, h])
            tokens, where = exact.tokens[i, h, :count].cpu(), locations[i, h, :count].cpu().long()
            from_host = host_kv[h].reshape(-1, 2 * head_dim)[
                page_rows(table[b], tokens[where < 0], meta.page_size)
            ]
            near = pool[window_row_ids(windows, int(meta.seq_slots[b]), h, resident)]
            kv = torch.cat([near, pool[where[where >= 0]], from_host])  # [L, 2D], any order
            out[i, group], lse[i, group] = attend(q[i, group].cpu(), kv, softmax_scale)
            direct += from_host.numel() * from_host.element_size()
    if counters is not None:
        counters[COUNTER_DIRECT_BYTES] += direct
    return out.to(q.device), lse.to(q.device)
