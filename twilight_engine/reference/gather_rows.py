"""Reference of gather_rows: one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import COUNTER_FETCHED_BYTES, FetchLists


def gather_rows(
    host_kv: Tensor,
    fetch: FetchLists,
    rows: Tensor,
    *,
    counters: Tensor | None = None,
    num_blocks: int = 1,
    stream: torch.cuda.Stream | None = None,
) -> None:
    by_key = host_kv.flatten(1, 2)  # [Hkv, P * S, 2D]
    for b in range(fetch.counts.shape[0]):
        for h in range(fetch.counts.shape[1]):
            for i in range(int(fetch.counts[b, h])):
                src, dst = int(fetch.src[b, h, i]), int(fetch.dst[b, h, i])
                if src >= 0 and dst >= 0:
                    rows[dst] = by_key[h, src].to(rows.device)
                    if counters is not None:
                        counters[COUNTER_FETCHED_BYTES] += rows.shape[1] * rows.element_size()
