"""Reference of twilight_engine.ops.attend_rows."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import (
    COUNTER_DIRECT_BYTES,
    COUNTER_FETCHED_BYTES,
    FETCHED,
    RowLists,
    StepMeta,
    Windows,
)
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
    """Attention of every query row to its resident and listed tokens; shapes as in the op.

    Fetched rows are written to windows.rows.
    """
    n, hq, head_dim = q.shape
    hkv = windows.num_kv_heads
    out = torch.zeros(n, hq, head_dim)
    lse = torch.full((n, hq), -torch.inf)
    pool, table = windows.rows.cpu(), meta.page_table.cpu()
    direct = fetched = 0
    for i in range(n):
        b = int(meta.query_seq[i])
        resident = visible_tokens(meta, i)[resident_mask(meta, i)]
        for h in range(hkv):
            group = slice(h * hq // hkv, (h + 1) * hq // hkv)
            count = int(exact.counts[i, h])
            tokens, where = exact.tokens[i, h, :count].cpu(), locations[i, h, :count].cpu().long()
            rows = host_kv[h].reshape(-1, 2 * head_dim)
            stays, comes = where < 0, where >= FETCHED
            from_host = rows[page_rows(table[b], tokens[stays], meta.page_size)]
            brought = rows[page_rows(table[b], tokens[comes], meta.page_size)]
            windows.rows[(where[comes] - FETCHED).to(windows.rows.device)] = brought.to(q.device)
            near = pool[window_row_ids(windows, int(meta.seq_slots[b]), h, resident)]
            hot = pool[where[~stays & ~comes]]
            kv = torch.cat([near, hot, from_host, brought])  # [L, 2D], any order
            out[i, group], lse[i, group] = attend(q[i, group].cpu(), kv, softmax_scale)
            direct += from_host.numel() * from_host.element_size()
            fetched += brought.numel() * brought.element_size()
    if counters is not None:
        counters[COUNTER_DIRECT_BYTES] += direct
        counters[COUNTER_FETCHED_BYTES] += fetched
    return out.to(q.device), lse.to(q.device)
