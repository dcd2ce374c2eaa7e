"""The CPU path of attend_lower: index tokens in parallel chunks of 256 by numba, the tail by torch.

Each page's tail mass is one masked sum, and a product with the means gives their output.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from twilight_engine.layout import GRADE_INDEX, GRADE_TAIL, IndexPages, RowLists, StepMeta
from twilight_engine.ops.cpu.attend_chunk import (
    CHUNK_TOKENS,
    ChunkStates,
    add_row,
    exponentiate,
)
from twilight_engine.reference import merge_states

State = tuple[Tensor, Tensor]  # out [N, Hq, D], lse [N, Hq]


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


def _listed_mask(meta: StepMeta, length: int) -> Tensor:
    """[N, 1, length] bool: tokens that a row sees and that are not resident."""
    tokens = torch.arange(length)
    window_starts = meta.window_starts[meta.query_seq.long()]
    first = meta.ctx_starts.clamp(min=meta.num_sink)[:, None]
    last = torch.minimum(window_starts, meta.positions + 1)[:, None]
    return ((tokens >= first) & (tokens < last))[:, None]


def _list_tokens(mask: Tensor) -> RowLists:
    """The tokens of a mask [N, Hkv, length]."""
    counts = mask.sum(dim=-1, dtype=torch.int32)
    capacity = max(1, int(counts.max()) if counts.numel() else 0)
    lists = RowLists.empty(mask.shape[0], mask.shape[1], capacity, mask.device)
    n, h, token = mask.nonzero(as_tuple=True)
    place = mask.cumsum(dim=-1)[n, h, token] - 1
    lists.tokens.zero_()
    lists.tokens[n, h, place] = token.int()
    lists.counts.copy_(counts)
    return lists


def _listed_scales(index: IndexPages, lists: RowLists, meta: StepMeta) -> Tensor:
    """[N, Hkv, C, 2] float32 scale and min of the listed tokens' V; numba has no float16."""
    assert index.v_scale is not None
    n, hkv, _ = lists.tokens.shape
    t = lists.tokens.long()
    table = meta.page_table[meta.query_seq.long()].long()  # [N, P_max]
    page = table.gather(1, (t // index.page_size).view(n, -1)).view_as(t).clamp(min=0)
    head = torch.arange(hkv)[None, :, None]
    return index.v_scale[page, head, t % index.page_size].float()


def _attend_index(scores: Tensor, index: IndexPages, mask: Tensor, meta: StepMeta) -> State:
    """INT4 V of the tokens of mask [N, Hkv, length]."""
    assert index.v_codes is not None
    n, hq, capacity = scores.shape
    hkv, head_dim = index.k_codes.shape[1], index.head_dim
    out, lse = torch.empty(n, hq, head_dim), torch.empty(n, hq)
    lists = _list_tokens(mask)
    lengths = lists.counts.numpy().astype(np.int64)
    states = ChunkStates(lengths, hq // hkv, head_dim)
    _attend_chunks(
        scores.view(n, hkv, hq // hkv, capacity).numpy(),
        index.v_codes.numpy(),
        _listed_scales(index, lists, meta).numpy(),
        lists.tokens.numpy(),
        lengths,
        meta.page_table.numpy(),
        meta.query_seq.numpy(),
        index.page_size,
        states.out,
        states.state,
    )
    states.merge_into(out, lse)
    return out, lse


def _attend_tail(scores: Tensor, index: IndexPages, mask: Tensor, meta: StepMeta) -> State:
    """Page means of the tokens of mask [N, Hkv, length]."""
    n, hq, _ = scores.shape
    hkv, length = mask.shape[1:]
    group, page_size = hq // hkv, index.page_size
    s = scores[:, :, :length].view(n, hkv, group, length)
    s = torch.where(mask[:, :, None], s, -torch.inf)
    lse = torch.logsumexp(s, dim=-1)
    weights = torch.exp(s - lse[..., None]).nan_to_num_(nan=0.0)
    pages = -(-length // page_size)
    weights = torch.nn.functional.pad(weights, (0, pages * page_size - length))
    mass = weights.view(n, hkv, group, pages, page_size).sum(dim=-1)  # [N, Hkv, G, pages]
    table = meta.page_table[meta.query_seq.long(), :pages].long().clamp(min=0)
    v_mean = index.v_mean[table].float().transpose(1, 2)  # [N, Hkv, pages, D]
    return (mass @ v_mean).reshape(n, hq, -1), lse.view(n, hq)


def attend_lower(
    scores: Tensor,
    grades: Tensor,
    index: IndexPages,
    meta: StepMeta,
    tail: bool,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill out and lse; arguments are checked by the op."""
    length = min(scores.shape[2], grades.shape[2], int(meta.window_starts.max()))
    listed, grades = _listed_mask(meta, length), grades[:, :, :length]
    states: list[State] = []
    if index.v_codes is not None:
        states.append(_attend_index(scores, index, listed & (grades == GRADE_INDEX), meta))
    if tail:
        states.append(_attend_tail(scores, index, listed & (grades == GRADE_TAIL), meta))
    merged, merged_lse = merge_states.merge_states(
        [s[0] for s in states], [s[1] for s in states], torch.float32
    )
    out.copy_(merged)
    lse.copy_(merged_lse)
