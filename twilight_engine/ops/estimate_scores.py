"""Estimate a query's attention scores from the device index."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import IndexPages, StepMeta, Windows, num_blocks
from twilight_engine.ops import launch
from twilight_engine.ops.cpu import estimate_scores as cpu
from twilight_engine.ops.cpu.append_rows import place_new_rows
from twilight_engine.ops.estimate_errors import estimate_errors

LEFT_OUT = ("midpoint", "drop")


def _check(
    q: Tensor,
    index: IndexPages,
    windows: Windows,
    meta: StepMeta,
    candidates: Tensor | None,
    block: int,
    left_out: str,
) -> None:
    num_rows, num_q_heads, head_dim = q.shape
    num_kv_heads = windows.num_kv_heads
    if num_q_heads % num_kv_heads:
        raise ValueError(f"q has {num_q_heads} heads; it must be a multiple of {num_kv_heads}")
    if left_out not in LEFT_OUT:
        raise ValueError(f"left_out is {left_out!r}; allowed: {', '.join(map(repr, LEFT_OUT))}")
    launch.row_dtype("q", q)
    launch.check_dtype("windows.rows", windows.rows, q.dtype)
    launch.check_shape("windows.rows", windows.rows, (None, 2 * head_dim))
    launch.check_shape(
        "index.k_codes", index.k_codes, (None, num_kv_heads, meta.page_size, head_dim // 2)
    )
    launch.check_shape("meta.positions", meta.positions, (num_rows,))
    if block not in (1, index.candidate_block):
        raise ValueError(f"block is {block}; allowed: 1, {index.candidate_block} (the index's)")
    by_token = block == 1
    bounds = index.k_bounds is not None or index.k_index == "int4_channel" or by_token
    if candidates is not None and not bounds:
        raise ValueError("index.k_bounds is None; candidates over an int4_token index need it")
    if candidates is not None:
        blocks = num_blocks(meta.max_len, block, meta.page_size)
        launch.check_shape("candidates", candidates, (num_rows, num_kv_heads, None))
        if candidates.shape[2] != blocks:
            raise ValueError(
                f"candidates holds {candidates.shape[2]} blocks; {meta.max_len} tokens in blocks "
                f"of {block} need {blocks}"
            )
        launch.check_dtype("candidates", candidates, torch.uint8)


def _check_outputs(
    scores: Tensor, lse: Tensor, errors: Tensor | None, q: Tensor, meta: StepMeta
) -> None:
    num_rows, num_q_heads, _ = q.shape
    launch.check_shape("scores", scores, (num_rows, num_q_heads, None))
    launch.check_dtype("scores", scores, torch.float32)
    launch.check_shape("lse", lse, (num_rows, num_q_heads))
    if scores.shape[2] < meta.max_len:
        raise ValueError(f"scores holds {scores.shape[2]} tokens; max_len is {meta.max_len}")
    if errors is not None:
        launch.check_shape("errors", errors, (num_rows, num_q_heads, None))
        launch.check_dtype("errors", errors, torch.float32)
        pages = num_blocks(meta.max_len, meta.page_size, meta.page_size)
        if errors.shape[2] < pages:
            raise ValueError(f"errors holds {errors.shape[2]} pages; it needs {pages}")


def _check_new_rows(
    new_rows: tuple[Tensor, Tensor], q: Tensor, windows: Windows, meta: StepMeta
) -> None:
    if meta.num_queries != meta.num_seqs:
        raise ValueError(
            f"new_rows came with {meta.num_queries} query rows of {meta.num_seqs} sequences; it "
            "takes one row a sequence"
        )
    for name, rows in zip(("new_rows[0]", "new_rows[1]"), new_rows, strict=True):
        launch.check_shape(name, rows, (q.shape[0], windows.num_kv_heads, q.shape[2]))
        launch.check_dtype(name, rows, q.dtype)


def _workspace_size(num_rows: int, num_q_heads: int, num_kv_heads: int) -> int:
    size: int = launch.kernels().estimate_scores_workspace(
        num_rows=num_rows, num_kv_heads=num_kv_heads, group=num_q_heads // num_kv_heads
    )
    return size


def allocate_workspace(
    num_rows: int, num_q_heads: int, num_kv_heads: int, device: torch.device
) -> Tensor | None:
    """The workspace of steps of up to num_rows query rows, ready for use; None on a CPU."""
    if device.type != "cuda":
        return None
    size = _workspace_size(num_rows, num_q_heads, num_kv_heads)
    return torch.zeros(size, dtype=torch.int32, device=device)


def _check_workspace(workspace: Tensor, size: int) -> None:
    launch.check_dtype("workspace", workspace, torch.int32)
    if workspace.numel() < size:
        raise ValueError(f"workspace holds {workspace.numel()} elements; it needs {size}")


def _may_start_early(windows: Windows, meta: StepMeta, candidates: Tensor | None) -> bool:
    """Whether the kernel may read the index before the kernels before it have ended.

    In a plain decode step they write none of it: csrc/dependent_launch.cuh has the reasons. A ring
    of less than two pages cannot hold a page that the step completes besides an open one.
    """
    one_row_each = meta.num_queries == meta.num_seqs
    return candidates is None and one_row_each and windows.window_rows >= 2 * meta.page_size


def _row_strides(rows: Tensor | None) -> tuple[int, int]:
    """Bytes from a row of [N, Hkv, D] to the next one of N and of Hkv."""
    if rows is None:
        return 0, 0
    return rows.stride(0) * rows.element_size(), rows.stride(1) * rows.element_size()


def _launch(
    q: Tensor,
    index: IndexPages,
    windows: Windows,
    meta: StepMeta,
    *,
    softmax_scale: float,
    candidates: Tensor | None,
    block: int,
    left_out: str,
    scores: Tensor,
    lse: Tensor,
    errors: Tensor | None,
    workspace: Tensor | None,
    new_rows: tuple[Tensor, Tensor] | None,
) -> None:
    num_rows, num_q_heads, head_dim = q.shape
    launch.check_head_dim(head_dim)
    if workspace is None:
        workspace = allocate_workspace(num_rows, num_q_heads, windows.num_kv_heads, q.device)
    assert workspace is not None
    _check_workspace(workspace, _workspace_size(num_rows, num_q_heads, windows.num_kv_heads))
    bounds = index.k_bounds
    new_k, new_v = (None, None) if new_rows is None else map(launch.aligned_rows, new_rows)
    launch.kernels().estimate_scores(
        q=launch.ptr(q),
        k_codes=launch.ptr(index.k_codes),
        k_scale=launch.ptr(index.k_scale),
        k_bounds=launch.ptr(bounds),
        rows=launch.ptr(windows.rows),
        candidates=launch.ptr(candidates),
        page_table=launch.ptr(meta.page_table),
        seq_slots=launch.ptr(meta.seq_slots),
        window_starts=launch.ptr(meta.window_starts),
        query_seq=launch.ptr(meta.query_seq),
        positions=launch.ptr(meta.positions),
        ctx_starts=launch.ptr(meta.ctx_starts),
        scores=launch.ptr(scores),
        lse=launch.ptr(lse),
        errors=launch.ptr(errors),
        workspace=launch.ptr(workspace),
        workspace_size=workspace.numel(),
        num_rows=num_rows,
        num_kv_heads=windows.num_kv_heads,
        group=num_q_heads // windows.num_kv_heads,
        head_dim=head_dim,
        page_size=meta.page_size,
        num_sink=meta.num_sink,
        window_rows=windows.window_rows,
        capacity=scores.shape[2],
        table_stride=meta.page_table.stride(0),
        num_pages=0 if errors is None else errors.shape[2],
        num_blocks=0 if candidates is None else candidates.shape[2],
        by_token=candidates is not None and block == 1,
        row_dtype=launch.row_dtype("q", q),
        per_token=index.k_index == "int4_token",
        early=_may_start_early(windows, meta, candidates),
        new_k=launch.ptr(new_k),
        new_v=launch.ptr(new_v),
        new_k_stride_bytes=_row_strides(new_k),
        new_v_stride_bytes=_row_strides(new_v),
        drop=left_out == "drop",
        softmax_scale=softmax_scale,
        codes_page_stride=index.k_codes.stride(0),
        scale_page_stride=index.k_scale.stride(0),
        bounds_page_stride=0 if bounds is None else bounds.stride(0),
        stream=launch.current_stream(q),
    )


def estimate_scores(
    q: Tensor,
    index: IndexPages,
    windows: Windows,
    meta: StepMeta,
    *,
    softmax_scale: float,
    candidates: Tensor | None = None,
    block: int | None = None,
    left_out: str = "midpoint",
    scores: Tensor | None = None,
    lse: Tensor | None = None,
    errors: Tensor | None = None,
    workspace: Tensor | None = None,
    new_rows: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits of every visible token: from INT4 codes, or exact for resident tokens.

    scores[n, h, t] = softmax_scale * q[n, h] . k[t], where k is the full-precision row of a
    resident token, min + scale * code of a list token, and the middle of its block's bounds (or
    the score -inf, with left_out "drop") for a list token outside the candidates. The middle of a
    block of one token is that token's min + scale * code.
    lse[n, h] = log of the sum of exp(scores[n, h, t]) over visible t; -inf if there is none.

    Args:
        q: [N, Hq, D] float32, float16 or bfloat16, contiguous.
        index: the layer's index pages; list tokens lie in pages that are indexed. On a GPU, neither
            their pages nor meta are written by the kernel just before (append_rows and index_pages
            keep to it): csrc/dependent_launch.cuh.
        windows: the layer's resident rows, of q's dtype.
        candidates: [N, Hkv, num_blocks(max_len, block, S)] uint8 (layout.block_of); None: every
            token.
        block: tokens of a candidate entry: 1, or index.candidate_block (the default).
        left_out: "midpoint" or "drop".
        scores: [N, Hq, C] float32 with C >= meta.max_len; tokens a row cannot see stay as they are.
        lse: [N, Hq] float32.
        errors: [N, Hq, P] float32 with a P that holds max_len, to be given the standard error of
            each page with list tokens (ops.estimate_errors); other entries are arbitrary.
        workspace: from allocate_workspace, for this many rows or more (CUDA only). One launch at a
            time may use it; None: a new one, which costs a launch.
        new_rows: K and V [N, Hkv, D] of the step's own tokens, of q's dtype and one a sequence,
            which windows.rows may lack as long as append_rows runs beside this op: they are written
            there, where append_rows writes the same.
    Returns: scores, lse.
    Raises: ValueError for shapes, dtypes or a left_out other than these; NotImplementedError for a
        head_dim or dtype without a kernel.
    Source: the SpGEMV of Twilight (arXiv 2502.02770), with the scales folded into q once a page.
    """
    block = index.candidate_block if block is None else block
    _check(q, index, windows, meta, candidates, block, left_out)
    num_rows, num_q_heads, _ = q.shape
    if scores is None:
        scores = torch.empty(num_rows, num_q_heads, meta.max_len, device=q.device)
    if lse is None:
        lse = torch.empty(num_rows, num_q_heads, device=q.device)
    _check_outputs(scores, lse, errors, q, meta)
    if new_rows is not None:
        _check_new_rows(new_rows, q, windows, meta)
    if q.is_cuda:
        _launch(
            launch.aligned_rows(q.contiguous()), index, windows, meta, softmax_scale=softmax_scale,
            candidates=candidates, block=block, left_out=left_out, scores=scores, lse=lse,
            errors=errors, workspace=workspace, new_rows=new_rows,
        )  # fmt: skip
        return scores, lse
    if q.dtype != torch.float32:
        raise NotImplementedError(f"q has dtype {q.dtype}; supported on a CPU: torch.float32")
    if new_rows is not None:
        place_new_rows(*new_rows, windows, meta)
    cpu.estimate_scores(
        q, index, windows, meta, softmax_scale=softmax_scale, candidates=candidates,
        block=block, left_out=left_out, scores=scores, lse=lse,
    )  # fmt: skip
    if errors is not None:
        of_pages = estimate_errors(q, index, meta, softmax_scale=softmax_scale)
        count = min(errors.shape[2], of_pages.shape[2])
        errors[..., :count] = of_pages[..., :count]
    return scores, lse
