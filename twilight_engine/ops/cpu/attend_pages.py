"""The numba path of attend_pages: chunks of 256 tokens in parallel, read in place."""

from __future__ import annotations

import numpy as np
from numba import njit, prange
from torch import Tensor

from twilight_engine.layout import COUNTER_STREAMED_BYTES, StepMeta
from twilight_engine.ops.cpu.attend_chunk import (
    CHUNK_TOKENS,
    ChunkStates,
    add_row,
    exponentiate,
    score_row,
)


@njit(parallel=True, cache=True)
def _attend_chunks(  # type: ignore[no-untyped-def]
    q, rows, table, query_seq, ctx_starts, lengths, page_size, scale, chunk_out, chunk_state
):
    n_rows, num_kv_heads, max_chunks = chunk_out.shape[:3]
    group, head_dim = q.shape[2], q.shape[3]
    for task in prange(n_rows * num_kv_heads * max_chunks):
        c = task % max_chunks
        h = task // max_chunks % num_kv_heads
        n = task // max_chunks // num_kv_heads
        length = min(CHUNK_TOKENS, lengths[n, h] - c * CHUNK_TOKENS)
        if length <= 0:
            continue
        first = ctx_starts[n] + c * CHUNK_TOKENS
        pages = table[query_seq[n]]
        q_h, rows_h = q[n, h], rows[h]
        scores = np.empty((group, CHUNK_TOKENS), np.float32)
        for i in range(length):
            t = first + i
            row = np.int64(pages[t // page_size]) * page_size + t % page_size
            score_row(q_h, rows_h, row, scale, scores, i)
        exponentiate(scores, length, chunk_state[n, h, c])
        out = chunk_out[n, h, c]
        out[:] = np.float32(0)
        for i in range(length):
            t = first + i
            row = np.int64(pages[t // page_size]) * page_size + t % page_size
            add_row(out, scores, i, rows_h, row, head_dim)


def attend_pages(
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    meta: StepMeta,
    softmax_scale: float,
    counters: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill out and lse, add to counters; arguments are checked by the op."""
    n, hq, head_dim = q.shape
    hkv, num_pages, page_size, _ = pages.shape
    group = hq // hkv
    seen = (meta.positions.long() + 1 - meta.ctx_starts).clamp(min=0)
    lengths = np.ascontiguousarray(seen[:, None].expand(n, hkv).numpy())
    states = ChunkStates(lengths, group, head_dim)
    _attend_chunks(
        q.view(n, hkv, group, head_dim).numpy(),
        pages.view(hkv, num_pages * page_size, 2 * head_dim).numpy(),
        page_table.numpy(),
        meta.query_seq.numpy(),
        meta.ctx_starts.numpy(),
        lengths,
        page_size,
        np.float32(softmax_scale),
        states.out,
        states.state,
    )
    states.merge_into(out, lse)
    if counters is not None:
        row_bytes = 2 * head_dim * pages.element_size()
        counters[COUNTER_STREAMED_BYTES] += int(lengths.sum()) * row_bytes
