"""The numba path of attend_rows: chunks of 256 rows in parallel, read in place."""

from __future__ import annotations

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

from twilight_engine.layout import COUNTER_DIRECT_BYTES, RowLists, StepMeta, Windows
from twilight_engine.ops.cpu.attend_chunk import (
    CHUNK_TOKENS,
    ChunkStates,
    add_row,
    exponentiate,
    score_row,
)


@njit(cache=True)
def _locate(i, spans, first_row, num_sink, window_rows, tokens, locations, pages, page_size):  # type: ignore[no-untyped-def]
    """Row of entry i of a segment: (in the pool, row). Sinks, then window, then the list."""
    if i < spans[1]:
        return True, np.int64(first_row) + spans[0] + i
    if i < spans[1] + spans[3]:
        t = spans[2] + i - spans[1]
        return True, np.int64(first_row) + num_sink + t % window_rows
    j = i - spans[1] - spans[3]
    if locations[j] >= 0:
        return True, np.int64(locations[j])
    t = tokens[j]
    return False, np.int64(pages[t // page_size]) * page_size + t % page_size


@njit(parallel=True, cache=True)
def _attend_chunks(  # type: ignore[no-untyped-def]
    q,
    pool,
    host,
    first_rows,
    spans,
    num_sink,
    window_rows,
    tokens,
    locations,
    table,
    query_seq,
    lengths,
    page_size,
    scale,
    chunk_out,
    chunk_state,
    direct_rows,
):
    n_rows, num_kv_heads, max_chunks = chunk_out.shape[:3]
    group, head_dim = q.shape[2], q.shape[3]
    for task in prange(n_rows * num_kv_heads * max_chunks):
        c = task % max_chunks
        h = task // max_chunks % num_kv_heads
        n = task // max_chunks // num_kv_heads
        length = min(CHUNK_TOKENS, lengths[n, h] - c * CHUNK_TOKENS)
        direct_rows[n, h, c] = 0
        if length <= 0:
            continue
        q_h, host_h = q[n, h], host[h]
        span, listed, where = spans[n], tokens[n, h], locations[n, h]
        pages = table[query_seq[n]]
        near = np.empty(CHUNK_TOKENS, np.bool_)
        row = np.empty(CHUNK_TOKENS, np.int64)
        scores = np.empty((group, CHUNK_TOKENS), np.float32)
        for i in range(length):
            near[i], row[i] = _locate(
                c * CHUNK_TOKENS + i,
                span,
                first_rows[n, h],
                num_sink,
                window_rows,
                listed,
                where,
                pages,
                page_size,
            )
            if near[i]:
                score_row(q_h, pool, row[i], scale, scores, i)
            else:
                score_row(q_h, host_h, row[i], scale, scores, i)
                direct_rows[n, h, c] += 1
        exponentiate(scores, length, chunk_state[n, h, c])
        out = chunk_out[n, h, c]
        out[:] = np.float32(0)
        for i in range(length):
            if near[i]:
                add_row(out, scores, i, pool, row[i], head_dim)
            else:
                add_row(out, scores, i, host_h, row[i], head_dim)


def _resident_spans(meta: StepMeta) -> NDArray[np.int64]:
    """[N, 4] int64: first sink and their number, first window token and their number."""
    ends = meta.positions.numpy().astype(np.int64) + 1
    starts = meta.ctx_starts.numpy().astype(np.int64)
    sinks = np.maximum(np.minimum(ends, meta.num_sink) - starts, 0)
    window = meta.window_starts.numpy()[meta.query_seq.numpy()].astype(np.int64)
    window = np.maximum(np.maximum(window, starts), meta.num_sink)
    spans: NDArray[np.int64] = np.stack(
        [starts, sinks, window, np.maximum(ends - window, 0)], axis=1
    )
    return spans


def attend_rows(
    q: Tensor,
    windows: Windows,
    host_kv: Tensor,
    exact: RowLists,
    locations: Tensor,
    meta: StepMeta,
    softmax_scale: float,
    counters: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill out and lse, add to counters; arguments are checked by the op."""
    n, hq, head_dim = q.shape
    hkv, num_pages, page_size, _ = host_kv.shape
    group = hq // hkv
    spans = _resident_spans(meta)
    lengths = (
        exact.counts.numpy().astype(np.int64) + (spans[:, 1] + spans[:, 3])[:, None]
    )  # [N, Hkv] int64
    slots = meta.seq_slots.numpy()[meta.query_seq.numpy()].astype(np.int64)
    first_rows = (slots[:, None] * hkv + np.arange(hkv)) * windows.rows_per_head
    states = ChunkStates(lengths, group, head_dim)
    direct_rows = np.empty(states.out.shape[:3], np.int64)
    _attend_chunks(
        q.view(n, hkv, group, head_dim).numpy(),
        windows.rows.numpy(),
        host_kv.view(hkv, num_pages * page_size, 2 * head_dim).numpy(),
        first_rows,
        spans,
        windows.num_sink,
        max(windows.window_rows, 1),
        exact.tokens.numpy(),
        locations.numpy(),
        meta.page_table.numpy(),
        meta.query_seq.numpy(),
        lengths,
        page_size,
        np.float32(softmax_scale),
        states.out,
        states.state,
        direct_rows,
    )
    states.merge_into(out, lse)
    if counters is not None:
        row_bytes = 2 * head_dim * host_kv.element_size()
        counters[COUNTER_DIRECT_BYTES] += int(direct_rows.sum()) * row_bytes
