"""append_rows on a CPU: one pass in numba, float32 rows."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from twilight_engine.layout import COUNTER_WRITTEN_BYTES, StepMeta, Windows

EMPTY_ROWS = np.empty((0, 0), dtype=np.float32)
EMPTY_PAGES = np.empty((0, 0, 0, 0), dtype=np.float32)


@numba.njit(cache=True)
def _append(
    k: Any, v: Any, rows: Any, host_kv: Any, pages: Any, table: Any, slots: Any, lens: Any,
    query_seq: Any, positions: Any, page_size: int, num_sink: int, window_rows: int,
) -> int:  # fmt: skip
    dim = k.shape[2]
    written = 0
    for n in range(k.shape[0]):
        b, t = query_seq[n], positions[n]
        page = table[b, t // page_size] if t >= 0 else -1
        if page < 0:
            continue
        offset = t % page_size
        for h in range(k.shape[1]):
            host_kv[h, page, offset, :dim] = k[n, h]
            host_kv[h, page, offset, dim:] = v[n, h]
            written += 1
            if pages.size:
                pages[h, page, offset] = host_kv[h, page, offset]
            first = (slots[b] * k.shape[1] + h) * (num_sink + window_rows)
            if window_rows and t < num_sink:
                rows[first + t] = host_kv[h, page, offset]
            if window_rows and t >= lens[b] - window_rows:
                rows[first + num_sink + t % window_rows] = host_kv[h, page, offset]
    return written


def append_rows_cpu(
    k: Tensor,
    v: Tensor,
    windows: Windows | None,
    host_kv: Tensor,
    meta: StepMeta,
    counters: Tensor | None,
    pages: Tensor | None,
) -> None:
    """The rows of one step, written in place; see ops.append_rows."""
    if k.dtype != torch.float32:
        raise NotImplementedError(f"k has dtype {k.dtype}; supported on a CPU: torch.float32")
    written = _append(
        k.numpy(),
        v.numpy(),
        EMPTY_ROWS if windows is None else windows.rows.numpy(),
        host_kv.numpy(),
        EMPTY_PAGES if pages is None else pages.numpy(),
        meta.page_table.numpy(),
        meta.seq_slots.numpy(),
        meta.seq_lens.numpy(),
        meta.query_seq.numpy(),
        meta.positions.numpy(),
        meta.page_size,
        0 if windows is None else windows.num_sink,
        0 if windows is None else windows.window_rows,
    )
    if counters is not None:
        counters[COUNTER_WRITTEN_BYTES] += written * 2 * k.shape[2] * k.element_size()


def place_new_rows(k: Tensor, v: Tensor, windows: Windows, meta: StepMeta) -> None:
    """Put one row a sequence where the windows keep it; see ops.estimate_scores' new_rows."""
    heads, rows_each = torch.arange(k.shape[1]), windows.num_sink + windows.window_rows
    for n, t in enumerate(meta.positions.tolist()):
        slot = int(meta.seq_slots[int(meta.query_seq[n])])
        if t < 0 or slot < 0:
            continue
        place = t if t < windows.num_sink else windows.num_sink + t % windows.window_rows
        windows.rows[(slot * k.shape[1] + heads) * rows_each + place] = torch.cat((k[n], v[n]), -1)
