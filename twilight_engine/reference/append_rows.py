"""Reference of append_rows: one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import COUNTER_WRITTEN_BYTES, IndexPages, StepMeta, Windows
from twilight_engine.reference.index_pages import index_window_pages


def append_rows(
    k: Tensor,
    v: Tensor,
    windows: Windows | None,
    host_kv: Tensor,
    meta: StepMeta,
    *,
    index: IndexPages | None = None,
    counters: Tensor | None = None,
    pages: Tensor | None = None,
) -> None:
    """Write the step's K|V rows to every tier, and index the pages that they complete."""
    page_size = meta.page_size
    heads = torch.arange(k.shape[1])
    written = 0
    for n, (b, t) in enumerate(zip(meta.query_seq.tolist(), meta.positions.tolist(), strict=True)):
        page = int(meta.page_table[b, t // page_size]) if t >= 0 else -1
        if page < 0:
            continue
        rows = torch.cat([k[n], v[n]], dim=-1)  # [Hkv, 2D]
        host_kv[:, page, t % page_size] = rows.to(host_kv.device)
        written += rows.numel() * rows.element_size()
        if pages is not None:
            pages[:, page, t % page_size] = rows
        if windows is not None:
            first = (int(meta.seq_slots[b]) * windows.num_kv_heads + heads) * windows.rows_per_head
            first = first.to(windows.rows.device)
            if t < windows.num_sink:
                windows.rows[first + t] = rows
            if t >= int(meta.seq_lens[b]) - windows.window_rows:
                windows.rows[first + windows.num_sink + t % windows.window_rows] = rows
    if index is not None and windows is not None:
        index_window_pages(windows, meta, index)
    if counters is not None:
        counters[COUNTER_WRITTEN_BYTES] += written
