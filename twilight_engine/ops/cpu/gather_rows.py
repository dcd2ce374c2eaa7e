"""gather_rows on the CPU: rows as whole words."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from twilight_engine.layout import COUNTER_FETCHED_BYTES, FetchLists

Array = np.ndarray[Any, Any]


def gather_rows(host_kv: Tensor, fetch: FetchLists, rows: Tensor, counters: Tensor | None) -> None:
    """Copy the rows listed; arguments as in ops.gather_rows."""
    moved = _gather(
        host_kv.flatten(1, 2).view(torch.int64).numpy(),  # dtype does not matter to a copy
        fetch.src.flatten(0, 1).numpy(),
        fetch.dst.flatten(0, 1).numpy(),
        fetch.counts.flatten().numpy(),
        rows.view(torch.int64).numpy(),
    )
    if counters is not None:
        counters[COUNTER_FETCHED_BYTES] += moved * rows.shape[1] * rows.element_size()


@njit(cache=True)
def _gather(by_key: Array, src: Array, dst: Array, counts: Array, rows: Array) -> int:
    moved = 0
    for segment in range(counts.shape[0]):
        h = segment % by_key.shape[0]
        for i in range(counts[segment]):
            if src[segment, i] >= 0 and dst[segment, i] >= 0:
                rows[dst[segment, i]] = by_key[h, src[segment, i]]
                moved += 1
    return moved
