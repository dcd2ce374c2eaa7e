"""Bring rows from host memory into hot slots."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import FetchLists
from twilight_engine.ops.cpu import gather_rows as cpu
from twilight_engine.ops.launch import check_dtype, check_shape, current_stream, kernels, ptr
from twilight_engine.ops.resolve_rows import check_announced

# Thread blocks of 256: 32 take 94-95 % of a PCIe 5 x16 link's DMA rate, 16 and 64 a little less.
# More put the rows of a short list, and so their translations, on the link at once, but slow
# whoever reads device memory beside them.
NUM_BLOCKS = 32
MAX_SEGMENTS = 8192  # (sequence, KV head) pairs whose offsets fit in a block's shared memory
ROW_ALIGN_BYTES = 16


def gather_rows(
    host_kv: Tensor,
    fetch: FetchLists,
    rows: Tensor,
    *,
    counters: Tensor | None = None,
    times: Tensor | None = None,
    num_blocks: int = NUM_BLOCKS,
) -> None:
    """Copy the rows that a step misses from host memory to their slots, bit by bit.

    rows[dst[b, h, i]] = host_kv[h, src[b, h, i] // S, src[b, h, i] % S] for i < counts[b, h];
    entries with src or dst NO_ROW are skipped. Whole pages are lists whose rows are adjacent. No
    dst may occur twice. The GPU reads host memory itself, so host_kv must be pinned and mapped, and
    must hold the rows before the stream gets here.

    Args:
        host_kv: [Hkv, P, S, 2D], CPU; heads may lie apart (stride of dim 0), the rest contiguous.
        fetch: lists of resolve_rows, on rows' device. With `announced`, resolve_rows is the kernel
            launched just before on this stream: rows are asked for while it still runs.
        rows: [R, 2D] of host_kv's dtype; 2D elements must be a multiple of 16 bytes.
        counters: [NUM_COUNTERS] int64, on rows' device; adds the bytes moved.
        times: [2] int64, on rows' device (CUDA only): lowered to the start and raised to the end of
            the copy, in ns of the device's clock; left alone by a copy of nothing.
        num_blocks: CUDA thread blocks to use.
    Raises: ValueError for shapes, dtypes, strides or a row size other than these.
    Source: zero-copy gather; see csrc/gather_rows.cu.
    """
    _check(host_kv, fetch, rows, counters, num_blocks)
    if times is not None:
        check_shape("times", times, (2,))
        check_dtype("times", times, torch.int64)
    if not rows.is_cuda:
        cpu.gather_rows(host_kv, fetch, rows, counters)
        return
    if not host_kv.numel() or not rows.numel() or not fetch.src.numel():
        return
    itemsize, told = host_kv.element_size(), fetch.announced
    kernels().gather_rows(
        host_kv=ptr(host_kv),
        src=ptr(fetch.src),
        dst=ptr(fetch.dst),
        counts=ptr(fetch.counts),
        rows=ptr(rows),
        counters=ptr(counters),
        times=ptr(times),
        num_segments=fetch.counts.numel(),
        num_kv_heads=fetch.counts.shape[1],
        fetch_capacity=fetch.src.shape[2],
        head_stride_bytes=host_kv.stride(0) * itemsize,
        row_bytes=host_kv.shape[3] * itemsize,
        num_blocks=num_blocks,
        announced=ptr(told.words if told else None),
        step=ptr(told.step if told else None),
        layer=told.layer if told else 0,
        stream=current_stream(rows),
    )


def _check(
    host_kv: Tensor, fetch: FetchLists, rows: Tensor, counters: Tensor | None, num_blocks: int
) -> None:
    if host_kv.is_cuda:
        raise ValueError(f"host_kv is on {host_kv.device}; it must be in host memory")
    check_shape("host_kv", host_kv, (fetch.counts.shape[1], None, None, None))
    check_shape("rows", rows, (None, host_kv.shape[3]))
    check_dtype("rows", rows, host_kv.dtype)
    check_shape("fetch.src", fetch.src, (*fetch.counts.shape, None))
    check_shape("fetch.dst", fetch.dst, tuple(fetch.src.shape))
    lists = {"fetch.src": fetch.src, "fetch.dst": fetch.dst, "fetch.counts": fetch.counts}
    for name, tensor in lists.items():
        check_dtype(name, tensor, torch.int32)
    check_announced(fetch)
    contiguous = {**lists, "rows": rows}
    if host_kv.shape[0]:
        contiguous["host_kv[0]"] = host_kv[0]
    for name, tensor in contiguous.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
    if counters is not None:
        check_dtype("counters", counters, torch.int64)
    if num_blocks < 1:
        raise ValueError(f"num_blocks is {num_blocks}; it must be >= 1")
    if fetch.counts.numel() > MAX_SEGMENTS:
        raise ValueError(
            f"fetch has {fetch.counts.numel()} segments; at most {MAX_SEGMENTS} are allowed"
        )
    row_bytes = rows.shape[1] * rows.element_size()
    if row_bytes % ROW_ALIGN_BYTES:
        raise ValueError(
            f"rows have {row_bytes} bytes each; they must be a multiple of {ROW_ALIGN_BYTES}"
        )
