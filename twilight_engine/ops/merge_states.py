"""Merge attention states over disjoint sets of tokens into one softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twilight_engine.ops import launch
from twilight_engine.reference import merge_states as reference

MAX_STATES = 8  # kMaxStates in csrc/merge_states.h


def merge_states(
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge up to 8 states (out, lse) as if one softmax had spanned all their tokens.

    lse = log sum_i exp(lses[i]);  out = sum_i exp(lses[i] - lse) outs[i]; empty states
    (lse -inf) are ignored, whatever their out holds.

    Args:
        outs: tensors [N, Hq, D] float32.
        lses: tensors [N, Hq] float32, one for each of outs.
        dtype: of the merged output: float32, float16 or bfloat16.
        out, lse: [N, Hq, D] of dtype and [N, Hq] float32 to fill; allocated if None.
    Returns: out, lse; (0, -inf) where every state is empty.
    Raises: ValueError for shapes, dtypes or numbers of states other than these.
    Source: the merge of split-KV decoding (Flash-Decoding); see csrc/merge_states.cu.
    """
    if not 1 <= len(outs) <= MAX_STATES or len(lses) != len(outs):
        raise ValueError(
            f"there are {len(outs)} outs and {len(lses)} lses; as many of both are allowed, "
            f"1 to {MAX_STATES}"
        )
    shape = tuple(outs[0].shape)
    launch.check_shape("outs[0]", outs[0], (None, None, None))
    for i, (o, s) in enumerate(zip(outs, lses, strict=True)):
        launch.check_shape(f"outs[{i}]", o, shape)
        launch.check_shape(f"lses[{i}]", s, shape[:2])
        launch.check_dtype(f"outs[{i}]", o, torch.float32)
        launch.check_dtype(f"lses[{i}]", s, torch.float32)
        if not (o.is_contiguous() and s.is_contiguous()):
            raise ValueError(f"outs[{i}] or lses[{i}] is not contiguous")
    out = torch.empty(shape, dtype=dtype, device=outs[0].device) if out is None else out
    lse = torch.empty(shape[:2], device=outs[0].device) if lse is None else lse
    launch.check_shape("out", out, shape)
    launch.check_dtype("out", out, dtype)
    launch.row_dtype("out", out)
    launch.check_shape("lse", lse, shape[:2])
    launch.check_dtype("lse", lse, torch.float32)
    if not outs[0].is_cuda:
        merged, merged_lse = reference.merge_states(outs, lses, dtype)
        out.copy_(merged)
        lse.copy_(merged_lse)
    elif out.numel() > 0:
        launch.kernels().merge_states(
            outs=[launch.ptr(o) for o in outs],
            lses=[launch.ptr(s) for s in lses],
            out=launch.ptr(out),
            lse=launch.ptr(lse),
            rows=shape[0] * shape[1],
            head_dim=shape[2],
            row_dtype=launch.row_dtype("out", out),
            stream=launch.current_stream(out),
        )
    return out, lse
