"""Quantise full pages of K and V into the device index, from staging or from the windows."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import IndexPages, StepMeta, Windows
from twilight_engine.ops.cpu.index_pages import index_pages_cpu, index_window_pages_cpu
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


def index_pages(k: Tensor, v: Tensor, page_ids: Tensor, index: IndexPages) -> None:
    """Quantise whole pages of K and V into the index (docs/index_format.md).

    min16 = fp16(min) rounded down, scale16 = fp16((max - min16) / 15) rounded up so that
    min16 + 15 * scale16 >= max, code = clamp(rint((x - min16) / scale16), 0, 15) in float32; over
    the page for each channel (K, int4_channel) or over D for each token (K, int4_token; V).

    Args:
        k, v: [M, S, Hkv, D] float32, float16 or bfloat16, any strides but 1 over D. Values beyond
            +-65504 saturate, and bounds are true only within; NaN gives undefined codes.
        page_ids: [M] int32, distinct pages of the index to write; NO_ROW: skip.
        index: written in place at those pages.
    Raises: ValueError for other shapes or dtypes; NotImplementedError for other row dtypes (CPU:
        other than float32) or, on a GPU, head_dims without a kernel.
    Side effects: runs on torch's current stream. One pass over K and V.
    """
    _, heads, size, half = index.k_codes.shape
    check_shape("k", k, (page_ids.shape[0], size, heads, 2 * half))
    check_shape("v", v, tuple(k.shape))
    check_dtype("v", v, k.dtype)
    check_dtype("page_ids", page_ids, torch.int32)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} over D; it must be 1")
    if page_ids.numel() == 0:
        return
    if not k.is_cuda:
        index_pages_cpu(k, v, page_ids, index)
        return
    dtype = row_dtype("k", k)
    check_head_dim(2 * half)
    k, v = aligned_rows(k), aligned_rows(v)
    kernels().index_pages(
        k=ptr(k),
        v=ptr(v),
        k_strides=k.stride()[:3],
        v_strides=v.stride()[:3],
        page_ids=ptr(page_ids),
        num_pages=page_ids.shape[0],
        dtype=dtype,
        **_index_arguments(index),
        stream=current_stream(k),
    )


def index_window_pages(windows: Windows, meta: StepMeta, index: IndexPages) -> None:
    """Index each page that this step's rows completed, from the ring of recent rows.

    A row n with (positions[n] + 1) % S == 0 completes page positions[n] // S of its sequence; the
    others do nothing. Run it after append_rows of the same step.

    Args:
        windows: rows of float32, float16 or bfloat16; window_rows a multiple of S.
        meta: a sequence's rows of this step must be at most window_rows - S + 1, so that the ring
            still holds the first page they complete; positions < 0 are padding.
        index: written in place.
    Raises: as index_pages.
    Side effects: runs on torch's current stream; the host reads no device value.
    """
    _, heads, size, half = index.k_codes.shape
    check_shape("windows.rows", windows.rows, (None, 4 * half))
    if windows.num_kv_heads != heads:
        raise ValueError(f"windows.num_kv_heads is {windows.num_kv_heads}; the index has {heads}")
    if meta.page_size != size or windows.window_rows % size:
        raise ValueError(
            f"page_size is {meta.page_size} and window_rows {windows.window_rows}; the index has "
            f"pages of {size}, and window_rows must be a multiple of it"
        )
    if meta.num_queries == 0:
        return
    if not windows.rows.is_cuda:
        index_window_pages_cpu(windows, meta, index)
        return
    dtype = row_dtype("windows.rows", windows.rows)
    check_head_dim(2 * half)
    kernels().index_window_pages(
        rows=ptr(windows.rows),
        num_sink=windows.num_sink,
        window_rows=windows.window_rows,
        page_table=ptr(meta.page_table),
        page_table_stride=meta.page_table.stride(0),
        seq_slots=ptr(meta.seq_slots),
        query_seq=ptr(meta.query_seq),
        positions=ptr(meta.positions),
        num_queries=meta.num_queries,
        dtype=dtype,
        **_index_arguments(index),
        stream=current_stream(windows.rows),
    )


def _index_arguments(index: IndexPages) -> dict[str, int]:
    """The arguments that describe where the index lies."""
    _, heads, size, half = index.k_codes.shape
    return {
        "k_codes": ptr(index.k_codes),
        "k_scale": ptr(index.k_scale),
        "k_bounds": ptr(index.k_bounds),
        "v_codes": ptr(index.v_codes),
        "v_scale": ptr(index.v_scale),
        "v_mean": ptr(index.v_mean),
        "page_size": size,
        "num_kv_heads": heads,
        "head_dim": 2 * half,
    }
