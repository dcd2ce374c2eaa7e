"""What the attention ops share: argument checks, state tensors, and the split-KV workspace."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from twilight_engine.layout import IndexPages, StepMeta
from twilight_engine.ops import launch

HEAD_TILE = 8  # query heads that share one pass over K and V; kHeadTile in csrc/split_attend.cuh
BLOCKS_PER_SM = 2  # persistent blocks a multiprocessor holds at head_dim 128


@lru_cache
def num_blocks(device_index: int) -> int:
    """Persistent blocks of a split-KV kernel on this GPU."""
    return BLOCKS_PER_SM * torch.cuda.get_device_properties(device_index).multi_processor_count


def attend_workspace_floats(
    num_queries: int, num_q_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> int:
    """Float32 elements of workspace that any of the attention ops needs at these sizes.

    A partial state (HEAD_TILE heads of out, max and sum) for each block and each segment (query
    row, KV head, tile of query heads), and the segments' starts. See csrc/split_attend.cuh.
    """
    group = num_q_heads // num_kv_heads
    segments = num_queries * num_kv_heads * -(-group // HEAD_TILE)
    blocks = num_blocks(device.index or 0)
    return (blocks + segments) * HEAD_TILE * (head_dim + 2) + segments + 1


def workspace_for(
    workspace: Tensor | None, n: int, hq: int, hkv: int, head_dim: int, device: torch.device
) -> Tensor:
    """The workspace given, checked, or a new one."""
    needed = attend_workspace_floats(n, hq, hkv, head_dim, device)
    if workspace is None:
        return torch.empty(needed, dtype=torch.float32, device=device)
    launch.check_dtype("workspace", workspace, torch.float32)
    if workspace.numel() < needed or workspace.device != device:
        raise ValueError(
            f"workspace has {workspace.numel()} elements on {workspace.device}; "
            f"at least {needed} on {device} are needed"
        )
    return workspace


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


def state_tensors(
    n: int, hq: int, head_dim: int, device: torch.device, out: Tensor | None, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output tensors given, checked, or new ones."""
    if out is None:
        out = torch.empty(n, hq, head_dim, device=device)
    if lse is None:
        lse = torch.empty(n, hq, device=device)
    launch.check_shape("out", out, (n, hq, head_dim))
    launch.check_shape("lse", lse, (n, hq))
    for name, tensor in (("out", out), ("lse", lse)):
        launch.check_dtype(name, tensor, torch.float32)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
    return out, lse
