"""How far the estimate's logits may be off: a standard error a page and query head."""

from __future__ import annotations

from torch import Tensor

from twilight_engine.layout import IndexPages, StepMeta
from twilight_engine.ops import launch

# A code is off by at most half a step, evenly spread: its variance is step^2 / 12. Measured on real
# K (SmolLM2, Qwen2.5-Coder-0.5B): 0.92-1.02 of that.
ROUNDING_VARIANCE = 1 / 12


def estimate_errors(
    q: Tensor, index: IndexPages, meta: StepMeta, *, softmax_scale: float
) -> Tensor:
    """The standard error of the INT4 logits of each page, from the steps of its codes.

    errors[n, h, j] = softmax_scale * sqrt(sum over d of (q[n, h, d] * step[d])^2 / 12) for page j
    of n's sequence, with the step of each channel; with a step a token the mean of its square over
    the page stands for step^2.

    Torch ops, on a GPU as on a CPU. On a GPU estimate_scores gives the same as it reads the steps.

    Args:
        q: [N, Hq, D] float32, float16 or bfloat16.
    Returns: [N, Hq, P] float32, P the pages of meta.page_table; arbitrary beyond a sequence's.
    Raises: ValueError for another shape of q.
    Source: docs/method.md, the margin of attn_top_p.
    """
    heads, dim = index.k_codes.shape[1], index.head_dim
    launch.check_shape("q", q, (meta.num_queries, None, dim))
    pages = meta.page_table.clamp(min=0)[meta.query_seq.long()]  # [N, P]
    squared = q.float().square().unflatten(1, (heads, -1))  # [N, Hkv, G, D]
    if index.k_index == "int4_channel":
        steps = index.k_scale[:, :, 0][pages.long()].float()  # [N, P, Hkv, D]
        variance = squared @ steps.square().permute(0, 2, 3, 1)
    else:
        steps = index.k_scale[..., 0][pages.long()].float()  # [N, P, Hkv, S]
        mean = steps.square().mean(-1).transpose(1, 2)  # [N, Hkv, P]
        variance = squared.sum(-1, keepdim=True) * mean[:, :, None]
    errors: Tensor = (variance * ROUNDING_VARIANCE).sqrt().flatten(1, 2) * softmax_scale
    return errors.contiguous()
