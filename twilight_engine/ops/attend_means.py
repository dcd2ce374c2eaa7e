"""Attend to the tail: each page's estimated mass on the mean of its V."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import IndexPages, StepMeta
from twilight_engine.ops import attend_workspace as ws
from twilight_engine.ops import launch
from twilight_engine.ops.cpu import attend_means as cpu


def attend_means(
    scores: Tensor,
    grades: Tensor,
    index: IndexPages,
    meta: StepMeta,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Give every tail token its estimated weight and the mean V of its page.

    lse[n, hq] = log sum exp(scores[n, hq, t]);
    out = sum exp(scores[n, hq, t] - lse) v_mean[page of t], t over tokens graded GRADE_TAIL that
    row n sees and that are not resident

    Args:
        scores: [N, Hq, C] float32 logits by token position.
        grades: [N, Hkv, C'] uint8 by token position.
        index: the layer's index pages.
        out, lse: [N, Hq, D] and [N, Hq] float32 to fill; allocated if None.
        workspace: float32, attend_workspace_floats(...) elements, CUDA only; allocated if None.
    Returns: out [N, Hq, D] float32; lse [N, Hq] float32, natural log; (0, -inf) where empty.
    Raises: ValueError for shapes or dtypes other than these.
    Source: graded attention, docs/method.md; see csrc/attend_means.cu.
    """
    n, hq, head_dim = ws.check_scores(scores, index, meta)
    hkv = index.k_codes.shape[1]
    launch.check_shape("grades", grades, (n, hkv, None))
    launch.check_dtype("grades", grades, torch.uint8)
    if grades.shape[2] < meta.max_len or not grades.is_contiguous():
        raise ValueError(
            f"grades holds {grades.shape[2]} tokens, strides {grades.stride()}; it must be "
            f"contiguous and hold max_len ({meta.max_len})"
        )
    out, lse = ws.state_tensors(n, hq, head_dim, scores.device, out, lse)
    if n == 0:
        return out, lse
    if not scores.is_cuda:
        cpu.attend_means(scores, grades, index, meta, out, lse)
        return out, lse
    work, _keep = ws.split_work("means", hkv, out, lse, workspace)
    launch.kernels().attend_means(
        work=work,
        step=ws.step_view(meta),
        scores=launch.ptr(scores),
        grades=launch.ptr(grades),
        v_mean=launch.ptr(index.v_mean),
        score_capacity=scores.shape[2],
        grade_capacity=grades.shape[2],
        head_dim=head_dim,
        stream=launch.current_stream(scores),
    )
    return out, lse
