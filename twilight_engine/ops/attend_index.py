"""Attend to the index-grade tokens: estimated scores and INT4 V."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import IndexPages, RowLists, StepMeta
from twilight_engine.ops import attend_workspace as ws
from twilight_engine.ops import launch
from twilight_engine.ops.cpu import attend_index as cpu


def attend_index(
    scores: Tensor,
    index: IndexPages,
    index_list: RowLists,
    meta: StepMeta,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum the INT4 V of the listed tokens, weighted by their estimated scores.

    lse[n, hq] = log sum exp(scores[n, hq, t]);  out = sum exp(scores[n, hq, t] - lse) v_hat[t]

    Args:
        scores: [N, Hq, C] float32 logits by token position; only listed tokens are read.
        index: the layer's index pages, with v_codes and v_scale.
        index_list: the listed tokens, all in full, indexed pages.
        out, lse: [N, Hq, D] and [N, Hq] float32 to fill; allocated if None.
        workspace: float32, attend_workspace_floats(...) elements, CUDA only; allocated if None.
    Returns: out [N, Hq, D] float32; lse [N, Hq] float32, natural log; (0, -inf) where empty.
    Raises: ValueError for shapes or dtypes other than these, or an index without an INT4 V.
    Source: graded attention, docs/method.md; see csrc/attend_index.cu.
    """
    if index.v_codes is None or index.v_scale is None:
        raise ValueError("index has no INT4 V (v_codes is None); build it with v_index='int4'")
    n, hq, head_dim = ws.check_scores(scores, index, meta)
    hkv = index.k_codes.shape[1]
    launch.check_shape("index_list.counts", index_list.counts, (n, hkv))
    launch.check_shape("index_list.tokens", index_list.tokens, (n, hkv, None))
    for name, tensor in (("tokens", index_list.tokens), ("counts", index_list.counts)):
        launch.check_dtype(f"index_list.{name}", tensor, torch.int32)
    if not index_list.tokens.is_contiguous():
        raise ValueError(f"index_list.tokens has strides {index_list.tokens.stride()}")
    out, lse = ws.state_tensors(n, hq, head_dim, scores.device, out, lse)
    if n == 0:
        return out, lse
    if not scores.is_cuda:
        cpu.attend_index(scores, index, index_list, meta, out, lse)
        return out, lse
    work, _keep = ws.split_work("index", hkv, out, lse, workspace)
    launch.kernels().attend_index(
        work=work,
        step=ws.step_view(meta),
        scores=launch.ptr(scores),
        v_codes=launch.ptr(index.v_codes),
        v_scale=launch.ptr(index.v_scale),
        tokens=launch.ptr(index_list.tokens),
        counts=launch.ptr(index_list.counts),
        score_capacity=scores.shape[2],
        list_capacity=index_list.tokens.shape[2],
        head_dim=head_dim,
        stream=launch.current_stream(scores),
    )
    return out, lse
