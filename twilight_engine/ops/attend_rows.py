"""Attend to the exact rows: the resident ones, hot rows, and rows left in host memory."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import COUNTER_DIRECT_BYTES, RowLists, StepMeta, Windows
from twilight_engine.ops import attend_workspace as ws
from twilight_engine.ops import launch
from twilight_engine.ops.attend_workspace import AttendState
from twilight_engine.ops.cpu import attend_rows as cpu


def attend_rows(
    q: Tensor,
    windows: Windows,
    host_kv: Tensor,
    exact: RowLists,
    locations: Tensor,
    meta: StepMeta,
    *,
    softmax_scale: float,
    counters: Tensor | None = None,
) -> AttendState:
    """Attend from every query row to its resident tokens and its listed tokens.

    out[n, hq] = softmax(softmax_scale * q[n, hq] . K[resident and listed]) V[the same]

    A listed token's row is windows.rows[location], or, where the location is NO_ROW, the row in
    host memory, which the kernel reads in place.

    Args:
        q: [N, Hq, D] of the rows' dtype.
        windows: the layer's resident rows and its row pool, on q's device.
        host_kv: [Hkv, P, S, 2 * D] rows in (pinned) host memory.
        exact: the listed tokens; none of them resident.
        locations: [N, Hkv, C] int32 rows of the pool, or NO_ROW, for exact.tokens.
        softmax_scale: multiplies the logits.
        counters: [NUM_COUNTERS] int64; COUNTER_DIRECT_BYTES grows by the bytes read from host_kv.
    Returns: the state, for merge_states.
    Raises: ValueError for shapes or dtypes other than these; NotImplementedError for an
        unsupported dtype or head_dim.
    Source: split-KV decoding (Flash-Decoding), balanced as stream-K; see csrc/attend_rows.cu.
    """
    n, hq, head_dim = ws.check_queries(q, meta)
    hkv = ws.check_heads(hq, windows.num_kv_heads, "windows")
    launch.check_shape("windows.rows", windows.rows, (None, 2 * head_dim))
    launch.check_dtype("windows.rows", windows.rows, q.dtype)
    launch.check_shape("host_kv", host_kv, (hkv, None, meta.page_size, 2 * head_dim))
    launch.check_dtype("host_kv", host_kv, q.dtype)
    launch.check_shape("exact.counts", exact.counts, (n, hkv))
    launch.check_shape("exact.tokens", exact.tokens, (n, hkv, None))
    launch.check_shape("locations", locations, tuple(exact.tokens.shape))
    for name, tensor in (("tokens", exact.tokens), ("counts", exact.counts)):
        launch.check_dtype(f"exact.{name}", tensor, torch.int32)
    launch.check_dtype("locations", locations, torch.int32)
    for name, tensor in (("exact.tokens", exact.tokens), ("locations", locations)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
    if meta.num_sink != windows.num_sink:
        raise ValueError(f"meta.num_sink is {meta.num_sink}; windows has {windows.num_sink}")
    ws.check_rows_layout("host_kv", host_kv)
    state = ws.new_state("rows", (n, hq, head_dim), hkv, q.device)
    if n == 0:
        return state
    if not q.is_cuda:
        ws.check_cpu_dtype(q)
        cpu.attend_rows(
            q, windows, host_kv, exact, locations, meta, softmax_scale, counters, *state.tensors
        )
        return state
    launch.kernels().attend_rows(
        work=state.work,
        step=ws.step_view(meta),
        q=launch.ptr(q),
        pool=launch.ptr(windows.rows),
        host_kv=launch.ptr(host_kv),
        host_head_bytes=host_kv.stride(0) * host_kv.element_size(),
        tokens=launch.ptr(exact.tokens),
        counts=launch.ptr(exact.counts),
        locations=launch.ptr(locations),
        direct_bytes=ws.counter(counters, COUNTER_DIRECT_BYTES),
        capacity=exact.tokens.shape[2],
        window_rows=windows.window_rows,
        softmax_scale=softmax_scale,
        head_dim=head_dim,
        row_dtype=launch.row_dtype("q", q),
        stream=launch.current_stream(q),
    )
    return state
