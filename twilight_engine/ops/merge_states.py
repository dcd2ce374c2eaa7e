"""Merge attention states over disjoint sets of tokens into one softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twilight_engine.ops import launch
from twilight_engine.ops.attend_workspace import AttendState
from twilight_engine.reference import merge_states as reference

MAX_STATES = 3  # kMaxStates in csrc/merge_states.h


def merge_states(states: Sequence[AttendState], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Merge up to 3 states as if one softmax had spanned all their tokens; one is normalised.

    lse = log sum_i exp(lse_i);  out = sum_i exp(lse_i - lse) out_i, empty states ignored.

    Args:
        states: of the same step, as attend_pages, attend_rows and attend_lower return them.
        dtype: of the merged output: float32, float16 or bfloat16.
    Returns: out [N, Hq, D] of dtype; lse [N, Hq] float32, natural log; (0, -inf) where every state
        is empty.
    Raises: ValueError for shapes or numbers of states other than these.
    Source: the merge of split-KV decoding (Flash-Decoding); see csrc/merge_states.cu.
    """
    if not 1 <= len(states) <= MAX_STATES:
        raise ValueError(f"there are {len(states)} states; 1 to {MAX_STATES} are allowed")
    shape = states[0].shape
    for i, state in enumerate(states):
        if state.shape != shape:
            raise ValueError(f"states[{i}] has shape {list(state.shape)}; it must be {list(shape)}")
    works = [state.work for state in states if state.work is not None]
    if not works:
        outs, lses = zip(*(state.tensors for state in states), strict=True)
        return reference.merge_states(outs, lses, dtype)
    assert len(works) == len(states), "states of one device"
    device = states[0].tensors[0].device
    out = torch.empty(shape, dtype=dtype, device=device)
    lse = torch.empty(shape[:2], device=device)
    if out.numel() > 0:
        launch.kernels().merge_states(
            works=works,
            out=launch.ptr(out),
            lse=launch.ptr(lse),
            head_dim=shape[2],
            row_dtype=launch.row_dtype("out", out),
            stream=launch.current_stream(out),
        )
    return out, lse
