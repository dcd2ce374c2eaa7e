"""Quantise full pages of K and V into the device index."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import IndexPages
from twilight_engine.ops.cpu.index_pages import index_pages_cpu
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
        page_size=size,
        num_kv_heads=heads,
        dtype=dtype,
        **index_arguments(index),
        stream=current_stream(k),
    )


def index_arguments(index: IndexPages | None) -> dict[str, int]:
    """The arguments that say where an index lies; zeros for none."""
    if index is None:
        names = ("k_codes", "k_scale", "k_bounds", "v_codes", "v_scale", "v_mean", "head_dim")
        return dict.fromkeys(names, 0)
    return {
        "k_codes": ptr(index.k_codes),
        "k_scale": ptr(index.k_scale),
        "k_bounds": ptr(index.k_bounds),
        "v_codes": ptr(index.v_codes),
        "v_scale": ptr(index.v_scale),
        "v_mean": ptr(index.v_mean),
        "head_dim": index.head_dim,
    }
