"""Attend densely to every visible token of a paged KV."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import COUNTER_STREAMED_BYTES, StepMeta
from twilight_engine.ops import attend_workspace as ws
from twilight_engine.ops import launch
from twilight_engine.ops.attend_workspace import AttendState
from twilight_engine.ops.cpu import attend_pages as cpu


def attend_pages(
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    meta: StepMeta,
    *,
    softmax_scale: float,
    counters: Tensor | None = None,
) -> AttendState:
    """Attend from every query row to all the tokens it sees.

    out[n, hq] = softmax(softmax_scale * q[n, hq] . K[ctx_starts[n] .. positions[n]]) V

    Args:
        q: [N, Hq, D] of the pages' dtype.
        pages: [Hkv, P, S, 2 * D] rows of K then V; on q's device, or pinned host memory that the
            kernel reads in place.
        page_table: [B, P_max] int32 page ids of each sequence.
        softmax_scale: multiplies the logits.
        counters: [NUM_COUNTERS] int64; COUNTER_STREAMED_BYTES grows by the bytes read. For pages
            in host memory.
    Returns: the state, for merge_states.
    Raises: ValueError for shapes or dtypes other than these; NotImplementedError for an
        unsupported dtype or head_dim.
    Source: split-KV decoding (Flash-Decoding); see csrc/attend_pages.cu.
    """
    n, hq, head_dim = ws.check_queries(q, meta)
    hkv = ws.check_heads(hq, pages.shape[0], "pages")
    launch.check_shape("pages", pages, (hkv, None, meta.page_size, 2 * head_dim))
    launch.check_dtype("pages", pages, q.dtype)
    launch.check_shape("page_table", page_table, (meta.num_seqs, None))
    launch.check_dtype("page_table", page_table, torch.int32)
    ws.check_rows_layout("pages", pages)
    state = ws.new_state("rows", (n, hq, head_dim), hkv, q.device)
    if n == 0:
        return state
    if not q.is_cuda:
        ws.check_cpu_dtype(q)
        cpu.attend_pages(q, pages, page_table, meta, softmax_scale, counters, *state.tensors)
        return state
    launch.kernels().attend_pages(
        work=state.work,
        step=ws.step_view(meta, page_table),
        q=launch.ptr(q),
        pages=launch.ptr(pages),
        head_bytes=pages.stride(0) * pages.element_size(),
        streamed_bytes=ws.counter(counters, COUNTER_STREAMED_BYTES),
        softmax_scale=softmax_scale,
        head_dim=head_dim,
        row_dtype=launch.row_dtype("q", q),
        stream=launch.current_stream(q),
    )
    return state
