"""Find each exact row's place and bring those that have none from host memory: one op for both."""

from __future__ import annotations

from torch import Tensor

from twilight_engine.layout import FetchLists, HotRows, RowLists, StepMeta
from twilight_engine.ops.gather_rows import NUM_BLOCKS, check_gather, gather_rows
from twilight_engine.ops.launch import current_stream, kernels, ptr
from twilight_engine.ops.resolve_rows import (
    check_resolve,
    outputs,
    resolve_arguments,
    resolve_rows,
)

# (Sequence, KV head) pairs up to which one kernel resolves and fetches. Each takes a multiprocessor
# until its rows are there, which whatever runs beside it lacks.
FUSED_SEGMENTS = 16
# Thread blocks that a gather beside other work has at least. More put more reads on the link at
# once, which brings short lists sooner and long ones not, and slows the work beside it.
LEAST_BLOCKS = 16


def fetch_rows(
    exact: RowLists,
    hot: HotRows | None,
    meta: StepMeta,
    host_kv: Tensor,
    rows: Tensor,
    *,
    locations: Tensor | None = None,
    fetch: FetchLists | None = None,
    counters: Tensor | None = None,
    times: Tensor | None = None,
    shared_pages: bool = True,
    beside: bool = False,
) -> tuple[Tensor, FetchLists]:
    """resolve_rows, then gather_rows of what it lists.

    On a GPU a small batch, of one query row a sequence and no pages in common, takes one kernel:
    the rows of the misses are on the link while their slots are chosen.

    Args:
        exact, hot, meta, locations, fetch, counters, shared_pages: as resolve_rows takes them.
        host_kv, rows, counters, times: as gather_rows takes them.
        beside: whether other work of the step runs at the same time.
    Returns: locations and fetch, as resolve_rows returns them.
    Raises: ValueError for shapes, dtypes, strides or a row size that these two refuse.
    Source: LRU at the granularity of decode steps, zero-copy gather; see csrc/resolve_fetch.cuh.
    """
    locations, fetch = outputs(exact, hot, meta, locations, fetch)
    segments = fetch.counts.numel()
    alone = meta.num_seqs == 1 or not shared_pages
    one_row_each = meta.num_queries == meta.num_seqs
    fused = rows.is_cuda and hot is not None and alone and one_row_each
    if not (fused and 0 < segments <= FUSED_SEGMENTS and host_kv.numel()):
        resolve_rows(
            exact, hot, meta, locations=locations, fetch=fetch, counters=counters,
            shared_pages=shared_pages,
        )  # fmt: skip
        blocks = max(LEAST_BLOCKS, NUM_BLOCKS // meta.num_seqs) if beside else NUM_BLOCKS
        gather_rows(host_kv, fetch, rows, counters=counters, times=times, num_blocks=blocks)
        return locations, fetch
    check_resolve(exact, hot, meta, locations, fetch, counters)
    check_gather(host_kv, fetch, rows, counters, times)
    itemsize = host_kv.element_size()
    kernels().resolve_rows(
        **resolve_arguments(exact, hot, meta, locations, fetch, counters),
        shared_pages=False,
        host_kv=ptr(host_kv),
        rows=ptr(rows),
        times=ptr(times),
        head_stride_bytes=host_kv.stride(0) * itemsize,
        row_bytes=host_kv.shape[3] * itemsize,
        stream=current_stream(rows),
    )
    return locations, fetch
