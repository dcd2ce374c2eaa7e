"""The numba path of attend_index: chunks of 256 listed tokens in parallel."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from twilight_engine.layout import IndexPages, RowLists, StepMeta
from twilight_engine.ops.cpu.attend_chunk import (
    CHUNK_TOKENS,
    ChunkStates,
    add_row,
    exponentiate,
)


@njit(parallel=True, cache=True)
def _attend_chunks(  # type: ignore[no-untyped-def]
    scores, codes, scales, tokens, counts, table, query_seq, page_size, chunk_out, chunk_state
):
    n_rows, num_kv_heads, max_chunks, group, head_dim = chunk_out.shape
    for task in prange(n_rows * num_kv_heads * max_chunks):
        c = task % max_chunks
        h = task // max_chunks % num_kv_heads
        n = task // max_chunks // num_kv_heads
        first = c * CHUNK_TOKENS
        length = min(CHUNK_TOKENS, counts[n, h] - first)
        if length <= 0:
            continue
        weights = np.empty((group, CHUNK_TOKENS), np.float32)
        for g in range(group):
            for i in range(length):
                weights[g, i] = scores[n, h, g, tokens[n, h, first + i]]
        exponentiate(weights, length, chunk_state[n, h, c])
        out = chunk_out[n, h, c]
        out[:] = np.float32(0)
        v = np.empty((1, head_dim), np.float32)
        for i in range(length):
            t = tokens[n, h, first + i]
            page, offset = table[query_seq[n], t // page_size], t % page_size
            scale, low = scales[n, h, first + i, 0], scales[n, h, first + i, 1]
            for j in range(head_dim // 2):
                code = codes[page, h, offset, j]
                v[0, 2 * j] = low + scale * np.float32(code & 15)
                v[0, 2 * j + 1] = low + scale * np.float32(code >> 4)
            add_row(out, weights, i, v, 0, 0)


def _listed_scales(
    index: IndexPages, index_list: RowLists, tokens: Tensor, meta: StepMeta
) -> Tensor:
    """[N, Hkv, C, 2] float32 scale and min of the listed tokens' V; numba has no float16."""
    assert index.v_scale is not None
    n, hkv, capacity = tokens.shape
    valid = torch.arange(capacity) < index_list.counts[:, :, None]
    t = torch.where(valid, tokens, 0).long()
    table = meta.page_table[meta.query_seq.long()].long()  # [N, P_max]
    page = table.gather(1, (t // index.page_size).view(n, -1)).view_as(t).clamp(min=0)
    head = torch.arange(hkv)[None, :, None]
    return index.v_scale[page, head, t % index.page_size].float()


def attend_index(
    scores: Tensor,
    index: IndexPages,
    index_list: RowLists,
    meta: StepMeta,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill out and lse; arguments are checked by the op."""
    assert index.v_codes is not None and index.v_scale is not None
    n, hq, capacity = scores.shape
    hkv, head_dim = index.k_codes.shape[1], index.head_dim
    group = hq // hkv
    lengths = index_list.counts.numpy().astype(np.int64)
    tokens = index_list.tokens[:, :, : max(1, int(lengths.max(initial=0)))]
    scales = _listed_scales(index, index_list, tokens, meta)
    states = ChunkStates(lengths, group, head_dim)
    _attend_chunks(
        scores.view(n, hkv, group, capacity).numpy(),
        index.v_codes.numpy(),
        scales.numpy(),
        index_list.tokens.numpy(),
        lengths,
        meta.page_table.numpy(),
        meta.query_seq.numpy(),
        index.page_size,
        states.out,
        states.state,
    )
    states.merge_into(out, lse)
