"""Write a step's K,V rows to every tier that keeps them."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import NUM_COUNTERS, StepMeta, Windows
from twilight_engine.ops.cpu.append_rows import append_rows_cpu
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
    counters: Tensor | None = None,
    pages: Tensor | None = None,
) -> None:
    """Write the step's K|V rows to the host pages, the windows and a dense layer's pages.

    Row n is token t = positions[n] of sequence b = query_seq[n]. It goes to
    host_kv[:, page_table[b, t // S], t % S], to the same place of `pages`, to the sink place of
    the windows if t < num_sink, and to their ring place if t >= seq_lens[b] - window_rows.
    A row with t < 0, or whose page is NO_ROW, is padding: it goes nowhere.

    Args:
        k, v: [N, Hkv, D] float32, float16 or bfloat16; any strides over N and Hkv.
        windows: the layer's windows, rows of k's dtype; None: a layer without.
        host_kv: [Hkv, P, S, 2D] CPU tensor (pinned and mapped where k is on a GPU), k's dtype;
            any stride over Hkv, else contiguous.
        meta: the step; positions of a sequence are distinct.
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
    if n == 0:
        return
    if not k.is_cuda:
        append_rows_cpu(k, v, windows, host_kv, meta, counters, pages)
        return
    row_dtype("k", k)
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
        query_seq=ptr(meta.query_seq),
        positions=ptr(meta.positions),
        counters=ptr(counters),
        num_queries=n,
        num_kv_heads=hkv,
        page_size=meta.page_size,
        head_bytes=dim * size,
        stream=current_stream(k),
    )
