"""What the attention ops share: argument checks, and the states they leave for merge_states."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twilight_engine.layout import NUM_COUNTERS, IndexPages, StepMeta
from twilight_engine.ops import launch

if TYPE_CHECKING:
    from twilight_engine import _C

HEAD_TILE = 8  # query heads that share one pass over K and V; kHeadTile in csrc/split_attend.h
# Persistent blocks a multiprocessor gets. Rows at head_dim 128 fill its shared memory (101 KB a
# block; 68 KB in a step of one sequence). The lower grades run beside the fetch (256 threads a
# block) and the rows: three blocks take 56 % of the registers and, at head_dim 128, 122 KB, which
# leaves room for a block of rows. Four leave room for one of 68 KB, and just so; five do not.
BLOCKS_PER_SM = {"rows": 2, "lower": 3}


@lru_cache
def num_blocks(kind: str, device: torch.device) -> int:
    """Persistent blocks of a split-KV kernel on this GPU."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return BLOCKS_PER_SM[kind] * count


@dataclass(frozen=True)
class AttendState:
    """What attention over one set of tokens leaves: an op's result, for merge_states to normalise.

    On a GPU `tensors` is one float32 workspace that holds each block's partial states, and `work`
    describes it (csrc/split_attend.cuh). On a CPU `work` is None and `tensors` are out [N, Hq, D]
    and lse [N, Hq], float32: (0, -inf) where the set is empty.
    """

    shape: tuple[int, int, int]  # N, Hq, D
    work: _C.SplitWork | None
    tensors: tuple[Tensor, ...]


def new_state(
    kind: str, shape: tuple[int, int, int], num_kv_heads: int, device: torch.device
) -> AttendState:
    """An op's state, yet to be filled: memory of its own, so that ops may run side by side."""
    n, hq, head_dim = shape
    if device.type != "cuda":
        tensors = torch.empty(shape, device=device), torch.empty(shape[:2], device=device)
        return AttendState(shape, None, tensors)
    group = hq // num_kv_heads
    segments = n * num_kv_heads * -(-group // HEAD_TILE)
    blocks = num_blocks(kind, device)
    floats = (blocks + segments) * HEAD_TILE * (head_dim + 2) + 2 * segments
    workspace = torch.empty(floats, dtype=torch.float32, device=device)
    work = launch.kernels().SplitWork(
        num_queries=n,
        num_kv_heads=num_kv_heads,
        group=group,
        num_blocks=blocks,
        workspace=launch.ptr(workspace),
    )
    return AttendState(shape, work, (workspace,))


def step_view(meta: StepMeta, page_table: Tensor | None = None) -> _C.StepView:
    """The kernels' view of a step, with another page table if one is given."""
    table = meta.page_table if page_table is None else page_table
    view: _C.StepView = launch.kernels().StepView(
        page_table=launch.ptr(table),
        seq_slots=launch.ptr(meta.seq_slots),
        window_starts=launch.ptr(meta.window_starts),
        query_seq=launch.ptr(meta.query_seq),
        positions=launch.ptr(meta.positions),
        ctx_starts=launch.ptr(meta.ctx_starts),
        page_table_stride=table.stride(0),
        page_size=meta.page_size,
        num_sink=meta.num_sink,
    )
    return view


def counter(counters: Tensor | None, column: int) -> int:
    """The address of one counter; 0 for None."""
    if counters is None:
        return 0
    launch.check_shape("counters", counters, (NUM_COUNTERS,))
    launch.check_dtype("counters", counters, torch.int64)
    return launch.ptr(counters) + column * counters.element_size()


def check_queries(q: Tensor, meta: StepMeta) -> tuple[int, int, int]:
    """N, Hq and D of q, checked against the step."""
    launch.check_shape("q", q, (meta.num_queries, None, None))
    launch.row_dtype("q", q)
    launch.check_head_dim(q.shape[2])
    if not q.is_contiguous():
        raise ValueError(f"q has strides {q.stride()}; it must be contiguous")
    return q.shape[0], q.shape[1], q.shape[2]


def check_heads(num_q_heads: int, num_kv_heads: int, name: str) -> int:
    """num_kv_heads; ValueError unless it divides the query heads."""
    if num_kv_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(f"{name} has {num_kv_heads} KV heads; they must divide {num_q_heads}")
    return num_kv_heads


def check_scores(scores: Tensor, index: IndexPages, meta: StepMeta) -> tuple[int, int, int]:
    """N, Hq and D of a step whose scores these are."""
    launch.check_shape("scores", scores, (meta.num_queries, None, None))
    launch.check_dtype("scores", scores, torch.float32)
    if not scores.is_contiguous():
        raise ValueError(f"scores has strides {scores.stride()}; it must be contiguous")
    if scores.shape[2] < meta.max_len:
        raise ValueError(f"scores holds {scores.shape[2]} tokens; max_len is {meta.max_len}")
    check_heads(scores.shape[1], index.k_codes.shape[1], "index")
    launch.check_head_dim(index.head_dim)
    if index.page_size != meta.page_size:
        raise ValueError(f"index has page_size {index.page_size}; the step has {meta.page_size}")
    return scores.shape[0], scores.shape[1], index.head_dim


def check_rows_layout(name: str, pages: Tensor) -> None:
    """ValueError unless each KV head's pages are contiguous."""
    if not pages[0].is_contiguous():
        raise ValueError(f"{name} has strides {pages.stride()}; pages of a head must be contiguous")


def check_cpu_dtype(q: Tensor) -> None:
    """NotImplementedError for rows that the numba paths do not read."""
    if q.dtype != torch.float32:
        raise NotImplementedError(f"q has dtype {q.dtype}; on a CPU only float32 is supported")
