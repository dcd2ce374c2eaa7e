"""Write a step's K,V rows to every tier that keeps them."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import NUM_COUNTERS, IndexPages, StepMeta, Windows
from twilight_engine.ops.cpu.append_rows import append_rows_cpu
from twilight_engine.ops.cpu.index_pages import index_window_pages_cpu
from twilight_engine.ops.index_pages import index_arguments
from twilight_engine.ops.launch import (
    aligned_rows,
    check_dtype,
    check_head_dim,
    check_shape,
    current_stream,
    kernels,
    ptr,
    row_dtype,
)


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
    """Write the step's K|V rows to every tier, and index the pages that they complete.

    Row n is token t = positions[n] of sequence b = query_seq[n]. It goes to
    host_kv[:, page_table[b, t // S], t % S], to the same place of `pages`, to the sink place of
    the windows if t < num_sink, and to their ring place if t >= seq_lens[b] - window_rows.
    A row with t < 0, or whose page is NO_ROW, is padding: it goes nowhere. With an index, a row
    with (t + 1) % S == 0 completes page t // S of its sequence, which is quantised from the ring as
    index_pages does it; a block for each (sequence, KV head) does all of it, so steps are meant
    to have few rows a sequence.

    Args:
        k, v: [N, Hkv, D] float32, float16 or bfloat16; any strides over N and Hkv.
        windows: the layer's windows, rows of k's dtype; None: a layer without.
        host_kv: [Hkv, P, S, 2D] CPU tensor (pinned and mapped where k is on a GPU), k's dtype;
            any stride over Hkv, else contiguous.
        meta: the step; positions of a sequence are distinct.
        index: the layer's index, written in place. It needs windows whose window_rows are a
            multiple of S, and rows of a sequence in this step at most window_rows - S + 1, so that
            the ring still holds the first page they complete. None: nothing is indexed.
        counters: [NUM_COUNTERS] int64; COUNTER_WRITTEN_BYTES grows by the bytes of host rows.
        pages: [Hkv, P, S, 2D] on k's device, strides as host_kv's.
    Raises: ValueError for other shapes, dtypes or strides; NotImplementedError for other row
        dtypes (CPU: other than float32) or, on a GPU, head_dims without a kernel.
    Side effects: runs on torch's current stream; host rows are there once it reaches this point.
    """
    n, hkv, dim = k.shape
    check_shape("v", v, (n, hkv, dim))
    check_shape("positions", meta.positions, (n,))
    tensors = {"v": v, "host_kv": host_kv}
    if pages is not None:
        check_shape("pages", pages, (hkv, host_kv.shape[1], meta.page_size, 2 * dim))
        tensors["pages"] = pages
    if windows is not None:
        check_shape("windows.rows", windows.rows, (None, 2 * dim))
        tensors["windows.rows"] = windows.rows
        if windows.num_kv_heads != hkv:
            raise ValueError(f"windows.num_kv_heads is {windows.num_kv_heads}; k has {hkv} heads")
    check_shape("host_kv", host_kv, (hkv, None, meta.page_size, 2 * dim))
    for name, tensor in tensors.items():
        check_dtype(name, tensor, k.dtype)
        if name != "v" and not tensor[0].is_contiguous():
            raise ValueError(f"{name}[0] has strides {tensor[0].stride()}; it must be contiguous")
    if counters is not None:
        check_shape("counters", counters, (NUM_COUNTERS,))
        check_dtype("counters", counters, torch.int64)
    if index is not None:
        _check_index(index, windows, meta, hkv, dim)
    if n == 0:
        return
    if not k.is_cuda:
        append_rows_cpu(k, v, windows, host_kv, meta, counters, pages)
        if index is not None and windows is not None:
            index_window_pages_cpu(windows, meta, index)
        return
    check_head_dim(dim)
    k, v = aligned_rows(k), aligned_rows(v)
    size = k.element_size()
    kernels().append_rows(
        k=ptr(k),
        v=ptr(v),
        k_stride_bytes=(k.stride(0) * size, k.stride(1) * size),
        v_stride_bytes=(v.stride(0) * size, v.stride(1) * size),
        host_kv=ptr(host_kv),
        host_head_bytes=host_kv.stride(0) * size,
        pages=ptr(pages),
        pages_head_bytes=0 if pages is None else pages.stride(0) * size,
        windows=0 if windows is None else ptr(windows.rows),
        window_rows=0 if windows is None else windows.window_rows,
        num_sink=0 if windows is None else windows.num_sink,
        page_table=ptr(meta.page_table),
        page_table_stride=meta.page_table.stride(0),
        seq_slots=ptr(meta.seq_slots),
        seq_lens=ptr(meta.seq_lens),
        cu_seqlens_q=ptr(meta.cu_seqlens_q),
        query_seq=ptr(meta.query_seq),
        positions=ptr(meta.positions),
        counters=ptr(counters),
        num_queries=n,
        num_seqs=meta.num_seqs,
        num_kv_heads=hkv,
        page_size=meta.page_size,
        head_bytes=dim * size,
        dtype=row_dtype("k", k),
        **index_arguments(index),
        stream=current_stream(k),
    )


def _check_index(
    index: IndexPages, windows: Windows | None, meta: StepMeta, num_kv_heads: int, head_dim: int
) -> None:
    check_shape("index.k_codes", index.k_codes, (None, num_kv_heads, None, head_dim // 2))
    size = index.page_size
    if windows is None:
        raise ValueError("windows is None; an index needs the windows that hold its pages' rows")
    if meta.page_size != size or windows.window_rows % size:
        raise ValueError(
            f"page_size is {meta.page_size} and window_rows {windows.window_rows}; the index has "
            f"pages of {size}, and window_rows must be a multiple of it"
        )
