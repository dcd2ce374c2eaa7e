"""Attend to the grades below exact: INT4 V of index-grade tokens, page means of the tail."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import IndexPages, StepMeta
from twilight_engine.ops import attend_workspace as ws
from twilight_engine.ops import launch
from twilight_engine.ops.attend_workspace import AttendState
from twilight_engine.ops.cpu import attend_lower as cpu


def attend_lower(
    scores: Tensor,
    lse: Tensor,
    grades: Tensor,
    index: IndexPages,
    meta: StepMeta,
    *,
    tail: bool = True,
    index_counts: Tensor | None = None,
) -> AttendState:
    """Weigh the V that the index has of every token below exact by its estimated score.

    sum_t exp(scores[n, hq, t]) v[t], t over the tokens that row n sees and that are not resident:
    v[t] is the INT4 V of tokens graded GRADE_INDEX, the page's mean V of those graded GRADE_TAIL.

    Args:
        scores: [N, Hq, C] float32 logits by token position.
        lse: [N, Hq] float32, their log-sum-exp over all tokens, which scales the weights; the
            result does not depend on it, but no score may exceed it by more than a few units.
        grades: [N, Hkv, C'] uint8 by token position.
        index: the layer's index pages; without v_codes no token may be graded GRADE_INDEX.
        tail: whether tokens graded GRADE_TAIL take part.
        index_counts: [N, Hkv] int32 tokens graded GRADE_INDEX, by which a GPU deals out the work: a
            head that has many then takes no longer than others. The result changes by rounding.
    Returns: the state, for merge_states; it holds on to no argument: keep scores, lse and grades
        until the launch is done, where another stream than theirs runs it.
    Raises: ValueError for shapes or dtypes other than these.
    Source: graded attention, docs/method.md; see csrc/attend_lower.cu.
    """
    n, hq, head_dim = ws.check_scores(scores, index, meta)
    hkv = index.k_codes.shape[1]
    if index.v_codes is None and not tail:
        raise ValueError("tail is False, and index has no INT4 V (v_codes is None): no V is left")
    launch.check_shape("lse", lse, (n, hq))
    launch.check_dtype("lse", lse, torch.float32)
    if not lse.is_contiguous():
        raise ValueError(f"lse has strides {lse.stride()}; it must be contiguous")
    launch.check_shape("grades", grades, (n, hkv, None))
    launch.check_dtype("grades", grades, torch.uint8)
    if grades.shape[2] < meta.max_len or not grades.is_contiguous():
        raise ValueError(
            f"grades holds {grades.shape[2]} tokens, strides {grades.stride()}; it must be "
            f"contiguous and hold max_len ({meta.max_len})"
        )
    if index_counts is not None:
        launch.check_shape("index_counts", index_counts, (n, hkv))
        launch.check_dtype("index_counts", index_counts, torch.int32)
        if not index_counts.is_contiguous():
            raise ValueError(
                f"index_counts has strides {index_counts.stride()}; it must be contiguous"
            )
    state = ws.new_state("lower", (n, hq, head_dim), hkv, scores.device)
    if n == 0:
        return state
    if not scores.is_cuda:
        cpu.attend_lower(scores, grades, index, meta, tail, *state.tensors)
        return state
    launch.kernels().attend_lower(
        work=state.work,
        step=ws.step_view(meta),
        scores=launch.ptr(scores),
        lse=launch.ptr(lse),
        grades=launch.ptr(grades),
        index_counts=launch.ptr(index_counts),
        v_codes=launch.ptr(index.v_codes),
        v_scale=launch.ptr(index.v_scale),
        v_mean=launch.ptr(index.v_mean) if tail else 0,
        score_capacity=scores.shape[2],
        grade_capacity=grades.shape[2],
        head_dim=head_dim,
        stream=launch.current_stream(scores),
    )
    return state
